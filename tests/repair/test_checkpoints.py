"""Checkpoints: a run goes on from one bit for bit, and one that is torn is never taken for whole."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import RED, Pictures, Run, another, same
from torch import Tensor

from sinder_cli.errors import BadInputError, CannotCreateError, StorageError
from sinder_cli.events import Warned
from sinder_cli.images.loading import shuffled
from sinder_cli.repairing import checkpoints as module_of_checkpoints
from sinder_cli.repairing.checkpoints import COUNTERS, MANIFEST, STATE, Checkpoints
from sinder_cli.repairing.deltas import Deltas, SingularBasis, singular_basis
from sinder_cli.repairing.loop import Best, Progress

BLUE = [(2, 7), (6, 3), (8, 8)]
STEPS = 8
SETTINGS: dict[str, Any] = {"lr": 0.01, "max_steps": STEPS, "stop_clean_fraction": 1.0}


def pictures(planted: Any) -> Pictures:
    """Some with a defect at an early block, one at a late one, one clean."""
    red = [planted.image(index, torch.float32, red=RED) for index in range(2)]
    return Pictures(*red, planted.image(2, torch.float32, blue=BLUE), planted.image(3, torch.float32))


def without_time(records: list[Any]) -> list[dict[str, Any]]:
    return [{name: value for name, value in vars(record).items() if name != "seconds"} for record in records]


def restored(planted: Any, folder: Path, **settings: Any) -> Run:
    """A new run that goes on from the checkpoints in a folder."""
    run = Run(another(planted), pictures(planted), **SETTINGS | settings)
    assert Checkpoints(folder).restore(run.deltas, run.progress, run.events.append)
    return run


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def with_other_bits(weight: Tensor) -> SingularBasis:
    basis = singular_basis(weight)
    return replace(basis, U=basis.U * (1 + 1e-6))


DAMAGE: list[Callable[[Path], None]] = [truncate, flip, empty, Path.unlink]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("steps", [1, 4, STEPS - 1, STEPS])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(single: Any, steps: int, batch_size: int, tmp_path: Path) -> None:
    whole = Run(another(single), pictures(single), **SETTINGS, batch_size=batch_size)
    records = whole.finish()
    first = Run(another(single), pictures(single), **SETTINGS, batch_size=batch_size)
    first.take(steps)
    Checkpoints(tmp_path).write(first.deltas, first.progress)
    second = restored(single, tmp_path, batch_size=batch_size)
    assert same(second.weights, first.weights)
    assert without_time(second.finish()) == without_time(records[steps:])
    assert same(second.weights, whole.weights)
    assert {record.block for record in records} == {1, 4, None} or batch_size > 1
    for one, other in zip(second.deltas.touched, whole.deltas.touched, strict=True):
        assert one.name == other.name
        assert torch.equal(one.delta, other.delta)
        assert torch.equal(one.velocity, other.velocity)
        assert one.velocity.any()


def test_a_checkpoint_brings_back_the_random_state_and_the_counters(single: Any, tmp_path: Path) -> None:
    first = Run(another(single), pictures(single), **SETTINGS)
    first.take(5)
    first.progress.nonfinite, first.progress.nonfinite_in_a_row = 4, 2
    first.progress.unreadable["odd \udcff\nname.png"] = "it is broken"
    Checkpoints(tmp_path).write(first.deltas, first.progress)
    drawn = torch.rand(3)
    second = restored(single, tmp_path)
    assert torch.equal(torch.rand(3), drawn)
    assert second.progress == first.progress
    assert second.progress.recent.maxlen == first.progress.recent.maxlen


def of_greedy_steps(progress: Progress) -> tuple[dict[str, Tensor], list[Any]]:
    """What greedy steps have observed and the guard's best state: tensors by name, and numbers."""
    tensors, numbers = {}, []
    for block, observed in progress.observed.by_block.items():
        parts = dict(vars(observed))
        numbers.append((block, parts.pop("weight"), parts.pop("probes")))
        tensors |= {f"{block}.{name}": part for name, part in parts.items()}
    if progress.best is not None:
        tensors |= {f"best.{name}": delta for name, delta in progress.best.deltas.items()}
        numbers.append({name: value for name, value in vars(progress.best).items() if name != "deltas"})
    return tensors, numbers


GREEDY: dict[str, Any] = {"recipe": "sinder", "trust": 0.1, "max_steps": 9, "stop_clean_fraction": 1.0}


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_greedy_run_goes_on_bit_for_bit(single_writer: Any, steps: int, tmp_path: Path) -> None:
    red = [single_writer.image(index, torch.float32, red=RED) for index in range(3)]
    whole, first, second = (Run(another(single_writer), Pictures(*red), **GREEDY) for _ in range(3))
    records = whole.finish()
    assert [record.moved is not None for record in records] == [step >= 3 for step in range(1, 10)]
    first.take(steps)
    Checkpoints(tmp_path).write(first.deltas, first.progress)
    assert Checkpoints(tmp_path).restore(second.deltas, second.progress, second.events.append)
    (tensors, numbers), (stored, stored_numbers) = (of_greedy_steps(run.progress) for run in (first, second))
    assert same(stored, tensors)
    assert stored_numbers == numbers
    assert tensors
    assert without_time(second.finish()) == without_time(records[steps:])
    assert same(second.weights, whole.weights)


@pytest.mark.parametrize("cls", [0.75, None])
def test_a_checkpoint_brings_back_what_the_guard_has_seen(
    single_writer: Any, cls: float | None, tmp_path: Path
) -> None:
    red = [single_writer.image(index, torch.float32, red=RED) for index in range(3)]
    first, second = (Run(another(single_writer), Pictures(*red), **GREEDY) for _ in range(2))
    first.take(4)
    best = first.deltas.values()
    assert best
    first.progress.best = Best(4, 7, cls, 0.5, None, best)
    first.progress.last_look, first.progress.clean_looks, first.progress.spoilt_looks = 4, 1, 2
    first.progress.idle_looks = 3
    first.take(2)
    first.progress.stopped = "fidelity"
    assert first.progress.last_move == 6
    Checkpoints(tmp_path).write(first.deltas, first.progress)
    assert Checkpoints(tmp_path).restore(second.deltas, second.progress, second.events.append)
    (tensors, numbers), (stored, stored_numbers) = (of_greedy_steps(run.progress) for run in (first, second))
    assert same(stored, tensors)
    assert stored_numbers == numbers
    assert same({name[5:]: delta for name, delta in stored.items() if name.startswith("best.")}, best)
    assert not same(second.deltas.values(), best)
    for name in ("last_move", "last_look", "clean_looks", "spoilt_looks", "idle_looks", "stopped"):
        assert getattr(second.progress, name) == getattr(first.progress, name) != getattr(Progress(1), name)


def test_a_module_off_cuda_saves_no_cuda_random_state(
    single: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: pytest.fail("it starts CUDA"))
    run = Run(single, pictures(single), **SETTINGS)
    run.take(1)
    Checkpoints(tmp_path).write(run.deltas, run.progress)
    assert "random.cuda" not in load_file(tmp_path / "step-000001" / STATE)


@pytest.mark.parametrize("number", [0, 1])
def test_the_random_state_saved_is_that_of_the_modules_device(
    number: int, single: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", number)
    states = {torch.device("cuda", each): torch.tensor([each], dtype=torch.uint8) for each in range(2)}
    monkeypatch.setattr(Deltas, "cuda", device)
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    run = Run(another(single), pictures(single), **SETTINGS)
    run.take(1)
    Checkpoints(tmp_path).write(run.deltas, run.progress)
    put_back: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, at: put_back.append((state.item(), at)))
    restored(single, tmp_path)
    assert put_back == [(number, device)]


def test_without_a_checkpoint_there_is_nothing_to_restore(single: Any, tmp_path: Path) -> None:
    run = Run(single, pictures(single))
    assert not Checkpoints(tmp_path).restore(run.deltas, run.progress, run.events.append)
    assert run.events == []


def test_the_newest_two_are_kept_with_each_basis_once(single: Any, tmp_path: Path) -> None:
    run = Run(single, pictures(single), **SETTINGS)
    checkpoints = Checkpoints(tmp_path)
    written: dict[Path, int] = {}
    for _ in range(4):
        run.take(2)
        checkpoints.write(run.deltas, run.progress)
        bases = {path: path.stat().st_mtime_ns for path in checkpoints.bases.iterdir()}
        assert bases.items() >= written.items()
        assert len(bases) == len(run.deltas.touched)
        written = bases
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bases", "step-000006", "step-000008"]
    again = restored(single, tmp_path)
    goes_on = Checkpoints(tmp_path)
    goes_on.restore(again.deltas, again.progress, again.events.append)
    again.progress.steps += 1
    goes_on.write(again.deltas, again.progress)
    assert {path: path.stat().st_mtime_ns for path in checkpoints.bases.iterdir()} == written


def test_a_checkpoint_is_safetensors_and_json_with_a_manifest(single: Any, tmp_path: Path) -> None:
    run = Run(single, pictures(single), **SETTINGS)
    run.take(3)
    Checkpoints(tmp_path).write(run.deltas, run.progress)
    files = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    inside = {path.name for path in files if path.parts[0] == "step-000003"}
    assert inside == {STATE, COUNTERS, MANIFEST}
    for path in files:
        if path.suffix == ".safetensors":
            load_file(tmp_path / path)
        else:
            json.loads((tmp_path / path).read_text())
    assert set(json.loads((tmp_path / "step-000003" / MANIFEST).read_text())) == {STATE, COUNTERS}
    counters = json.loads((tmp_path / "step-000003" / COUNTERS).read_text())
    assert {f"{digest}.safetensors" for digest in counters["bases"].values()} == {
        path.name for path in files if path.parts[0] == "bases"
    }


@pytest.mark.parametrize("name", [STATE, COUNTERS, MANIFEST])
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_checkpoint_before_a_torn_newest_one_is_used(
    single: Any, name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    whole = Run(another(single), pictures(single), **SETTINGS)
    checkpoints = Checkpoints(tmp_path)
    for steps in (3, 2):
        whole.take(steps)
        checkpoints.write(whole.deltas, whole.progress)
    whole.finish()
    damage(tmp_path / "step-000005" / name)
    run = restored(single, tmp_path)
    assert run.progress.steps == 3
    assert len(run.warnings) == 1
    assert "step-000005 is damaged" in run.warnings[0]
    assert "using the checkpoint before it" in run.warnings[0]
    assert not (tmp_path / "step-000005").exists()
    run.finish()
    assert same(run.weights, whole.weights)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_torn_basis_is_found_again_from_its_weight(
    single: Any, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    whole = Run(another(single), pictures(single), **SETTINGS, window=1)
    whole.take(2)
    Checkpoints(tmp_path).write(whole.deltas, whole.progress)
    torn = min((tmp_path / "bases").iterdir())
    bits = torn.read_bytes()
    damage(torn)
    run = restored(single, tmp_path, window=1)
    assert run.progress.steps == 2
    assert ["is damaged: decomposing blocks." in warning for warning in run.warnings] == [True]
    assert torn.read_bytes() == bits
    whole.finish()
    run.finish()
    assert same(run.weights, whole.weights)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_torn_basis_tears_the_checkpoints_that_name_it(
    single: Any, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    order = list(zip(range(4), shuffled(4, 0), strict=False))
    late = next(at for at, index in order if index == 2) + 1  # the step at which the late block is touched
    whole = Run(another(single), pictures(single), **SETTINGS, window=1)
    checkpoints = Checkpoints(tmp_path)
    whole.take(late - 1)
    checkpoints.write(whole.deltas, whole.progress)
    early = set(checkpoints.bases.iterdir())
    whole.take(1)
    checkpoints.write(whole.deltas, whole.progress)
    damage(min(set(checkpoints.bases.iterdir()) - early))
    whole.finish()
    run = Run(another(single), pictures(single), **SETTINGS, window=1)
    run.deltas.decompose = with_other_bits
    again = Checkpoints(tmp_path)
    assert again.restore(run.deltas, run.progress, run.events.append)
    assert run.progress.steps == late - 1
    assert "gives another one on this machine): using the checkpoint before it" in run.warnings[1]
    run.deltas.decompose = singular_basis
    run.take(1)
    again.write(run.deltas, run.progress)
    third = restored(single, tmp_path, window=1)
    assert third.warnings == []
    third.finish()
    assert same(third.weights, whole.weights)


def test_nothing_is_resumed_where_all_checkpoints_are_torn(single: Any, tmp_path: Path) -> None:
    run = Run(single, pictures(single), **SETTINGS)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for _ in range(2):
        run.take(1)
        checkpoints.write(run.deltas, run.progress)
    for folder in checkpoints.folder.glob("step-*"):
        flip(folder / STATE)
    told: list[object] = []
    with pytest.raises(BadInputError, match="no checkpoint is intact") as caught:
        checkpoints.restore(run.deltas, run.progress, told.append)
    assert caught.value.exit_code == 65
    assert "--force" in str(caught.value)
    assert len([event for event in told if isinstance(event, Warned)]) == 2
    assert len(list(checkpoints.folder.glob("step-*"))) == 2


@pytest.mark.parametrize("read", ["sha256_of", "_tensors_of"])
def test_a_disk_that_fails_for_a_while_costs_no_checkpoint(
    single: Any, read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(another(single), pictures(single), **SETTINGS)
    checkpoints = Checkpoints(tmp_path)
    for _ in range(2):
        run.take(1)
        checkpoints.write(run.deltas, run.progress)
    before = sorted(tmp_path.rglob("*"))

    def fails(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(module_of_checkpoints, read, fails)
        with pytest.raises(StorageError, match=r"cannot read .*: Input/output error; check the disk") as caught:
            restored(single, tmp_path)
    assert caught.value.exit_code == 74
    assert sorted(tmp_path.rglob("*")) == before
    assert restored(single, tmp_path).progress.steps == 2


def test_a_torn_checkpoint_is_put_aside_until_another_is_whole(single: Any, tmp_path: Path) -> None:
    run = Run(another(single), pictures(single), **SETTINGS)
    checkpoints = Checkpoints(tmp_path)
    for _ in range(2):
        run.take(1)
        checkpoints.write(run.deltas, run.progress)
    flip(tmp_path / "step-000002" / STATE)
    again = restored(single, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"bases", "step-000001", "torn-step-000002"}
    again.take(1)
    Checkpoints(tmp_path).write(again.deltas, again.progress)
    assert {path.name for path in tmp_path.iterdir()} == {"bases", "step-000001", "step-000002"}


def test_a_basis_that_no_checkpoint_names_is_removed(single: Any, tmp_path: Path) -> None:
    run = Run(another(single), pictures(single), **SETTINGS)
    checkpoints = Checkpoints(tmp_path)
    run.take(3)
    checkpoints.write(run.deltas, run.progress)
    named = sorted(checkpoints.bases.iterdir())
    orphan = checkpoints.bases / f"{'0' * 64}.safetensors"
    orphan.write_bytes(b"of a run that went back")
    run.take(1)
    checkpoints.write(run.deltas, run.progress)
    assert set(named) <= set(checkpoints.bases.iterdir())
    assert not orphan.exists()
    orphan.write_bytes(b"again")
    (tmp_path / "step-000003" / COUNTERS).write_text("torn")
    run.take(1)
    run.progress.proven = 3
    checkpoints.write(run.deltas, run.progress)
    assert orphan.exists()  # nobody knows whose it is


def test_a_checkpoint_is_flushed_before_it_is_named(
    single: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves what was flushed, and names in folders that were: every order of both must do."""
    run = Run(single, pictures(single), **SETTINGS)
    run.take(1)
    done: list[tuple[str, str]] = []

    def named(path: Any) -> str:
        place = str(Path(path).relative_to(tmp_path))
        return re.sub(r"\.[^./]+\.part", ".part", re.sub(r"[0-9a-f]{64}", "HASH", place))

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and watching:
            done.append(("rename", named(arguments[1])))

    genuine = os.fsync

    def fsync(handle: int) -> None:
        done.append(("flush", named(Path(f"/proc/self/fd/{handle}").readlink())))
        genuine(handle)

    watching = [True]
    sys.addaudithook(hear)
    monkeypatch.setattr(os, "fsync", fsync)
    Checkpoints(tmp_path / "checkpoints").write(run.deltas, run.progress)
    watching.clear()

    step, part = "checkpoints/step-000001", "checkpoints/.step-000001.part"
    assert done[:2] == [("flush", "checkpoints"), ("flush", ".")]  # bases/ in it, and it in the run's folder
    bases = [entry for entry in done if "bases" in entry[1]]
    one = [("flush", "checkpoints/bases/.HASH.safetensors.part"), ("rename", "checkpoints/bases/HASH.safetensors")]
    assert bases == [*one, ("flush", "checkpoints/bases")] * len(run.deltas.touched)
    files = [entry for entry in done if entry[0] == "rename" and entry[1].startswith(part)]
    assert files == [("rename", f"{part}/{name}") for name in (STATE, COUNTERS, MANIFEST)]
    renamed = done.index(("rename", step))
    for name in (STATE, COUNTERS, MANIFEST):
        assert ("flush", f"{part}/{name}") in done[:renamed]
        assert done.index(("flush", f"{part}/.{name}.part")) < done.index(("rename", f"{part}/{name}"))
    assert ("flush", part) in done[:renamed]
    assert done[-1] == ("flush", "checkpoints")
    assert done.index(bases[-1]) < done.index(files[0])


def test_what_a_killed_write_left_is_swept_away(single: Any, tmp_path: Path) -> None:
    run = Run(another(single), pictures(single), **SETTINGS)
    checkpoints = Checkpoints(tmp_path)
    run.take(2)
    checkpoints.write(run.deltas, run.progress)
    whole = sorted(tmp_path.rglob("*"))
    half = tmp_path / ".step-000009.abcd1234.part"
    half.mkdir()
    (half / STATE).write_bytes(b"half")
    (checkpoints.bases / ".0123.safetensors.abcd1234.part").write_bytes(b"half")
    assert restored(single, tmp_path).progress.steps == 2
    checkpoints.sweep()
    assert sorted(tmp_path.rglob("*")) == whole


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_delta_that_is_not_finite_is_never_written(single: Any, value: float, tmp_path: Path) -> None:
    run = Run(single, pictures(single), **SETTINGS)
    checkpoints = Checkpoints(tmp_path)
    run.take(3)
    checkpoints.write(run.deltas, run.progress)
    before = sorted(tmp_path.rglob("*"))
    run.take(1)
    run.deltas.touched[1].delta[0] = value
    with pytest.raises(BadInputError, match=f"the delta of {run.deltas.touched[1].name} is not finite"):
        checkpoints.write(run.deltas, run.progress)
    assert sorted(tmp_path.rglob("*")) == before


def test_steps_that_are_not_finite_drive_out_no_proven_state(single: Any, tmp_path: Path) -> None:
    run = Run(single, pictures(single), **SETTINGS)
    checkpoints = Checkpoints(tmp_path)
    for finite in (True, True, True, False, False, False):
        run.progress.count(images=1, defective=1, finite=finite)
        checkpoints.write(run.deltas, run.progress)
    assert run.progress.proven == 2  # whether the third step was good no step has shown
    assert [int(path.name[5:]) for path in sorted(tmp_path.glob("step-*"))] == [2, 5, 6]
    checkpoints.forget_after(run.progress.proven)
    assert restored(single, tmp_path).progress.steps == 2


def test_all_before_a_finite_step_is_proven(single: Any, tmp_path: Path) -> None:
    run = Run(single, pictures(single), **SETTINGS)
    checkpoints = Checkpoints(tmp_path)
    for finite in (True, False, False, False, True, True):
        run.progress.count(images=1, defective=1, finite=finite)
        checkpoints.write(run.deltas, run.progress)
    assert [int(path.name[5:]) for path in sorted(tmp_path.glob("step-*"))] == [5, 6]


@pytest.mark.parametrize("writer", ["write_safetensors", "write_json"])
def test_a_full_disk_leaves_the_checkpoint_before(
    single: Any, writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(another(single), pictures(single), **SETTINGS)
    checkpoints = Checkpoints(tmp_path)
    run.take(3)
    checkpoints.write(run.deltas, run.progress)
    before = sorted(tmp_path.rglob("*"))
    run.take(1)

    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module_of_checkpoints, writer, full)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        checkpoints.write(run.deltas, run.progress)
    assert caught.value.exit_code == 74
    assert sorted(tmp_path.rglob("*")) == before
    assert restored(single, tmp_path).progress.steps == 3


def test_a_place_where_no_checkpoint_can_be_is_reported(single: Any, tmp_path: Path) -> None:
    run = Run(single, pictures(single), **SETTINGS)
    run.take(1)
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CannotCreateError) as caught:
        Checkpoints(tmp_path / "checkpoints").write(run.deltas, run.progress)
    assert caught.value.exit_code == 73


def test_random_damage_is_always_noticed(single: Any, tmp_path: Path) -> None:
    run = Run(another(single), pictures(single), **SETTINGS)
    run.take(4)
    Checkpoints(tmp_path).write(run.deltas, run.progress)
    drawn = random.Random(0)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    noticed = 0
    for _ in range(60):
        path = drawn.choice(files)
        whole = path.read_bytes()
        torn = bytearray(whole)
        torn[drawn.randrange(len(torn))] ^= 1 << drawn.randrange(8)
        path.write_bytes(torn)
        if path.parent.name == "bases":
            mended = restored(single, tmp_path)
            noticed += "is damaged: decomposing" in mended.warnings[0] and path.read_bytes() == whole
        else:
            with pytest.raises(BadInputError):
                restored(single, tmp_path)
            noticed += 1
        path.write_bytes(whole)
    assert noticed == 60
