"""The run directory: who may write into it, what belongs to a run, and which run may be gone on with."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sinder_cli.errors import BadInputError, CannotCreateError, ConflictError, TryAgainError
from sinder_cli.events import Warned, silent
from sinder_cli.images.sources import ImageFiles
from sinder_cli.repairing import run_identity as imagelist
from sinder_cli.repairing.folder import RunFolder
from sinder_cli.repairing.loop import StepRecord
from sinder_cli.repairing.run_identity import listed_images
from sinder_cli.repairing.settings import WITHOUT_EFFECT, RepairSettings


def config(**changes: Any) -> dict[str, Any]:
    """A configuration, some of whose parts are others."""
    return {
        "model": "demo_vit",
        "heads": None,
        "revision": None,
        "attention": "sdpa",
        "weights": {"source": "demo_vit", "fingerprint": "0123"},
        "images": {"count": 4, "fingerprint": "4567"},
        "settings": RepairSettings().model_dump(),
        "device": "cpu",
        "threads": 1,
        "versions": {"torch": "2.13.0"},
    } | changes


def with_setting(**changes: Any) -> dict[str, Any]:
    return config(settings=RepairSettings().model_dump() | changes)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The folder of a run that has begun."""
    folder = RunFolder(tmp_path / "run")
    with folder.held():
        folder.begin(config())
    return folder


def test_a_folder_is_kept_from_a_second_process(run: RunFolder) -> None:
    with run.held():
        with pytest.raises(TryAgainError, match="another process is repairing into it") as caught, run.held():
            pass
        assert caught.value.exit_code == 75
    with run.held():
        pass


def test_a_forked_process_does_not_keep_the_folder(run: RunFolder) -> None:
    ours, theirs = socket.socketpair()
    with run.held():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, of which it has none
            child = os.fork()
        if child == 0:
            ours.close()
            theirs.send(b"here")
            theirs.recv(1)  # until the parent closes its end
            os._exit(0)
        theirs.close()
        assert ours.recv(4) == b"here"
    with run.held():  # as after the death of the first parent, whose child hangs
        pass
    ours.close()
    assert os.waitpid(child, 0)[1] == 0


def test_folders_that_were_made_and_stay_empty_are_removed(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a" / "b").held():
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_above_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with RunFolder(tmp_path / "a" / "b").held():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_system_that_locks_no_folder_is_reported(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    told: list[object] = []
    with run.held(told.append):
        pass
    assert [event.text for event in told if isinstance(event, Warned)] == [
        f"cannot keep other processes out of {run.path}: Bad file descriptor"
    ]


def test_only_what_a_killed_process_has_left_is_removed(run: RunFolder) -> None:
    leftovers = [".config.json.abcd1234.part", ".model.safetensors.abcd1234.part", "checkpoints/.step-000001.ab.part"]
    others = [".notes.txt.abcd1234.part", "model.safetensors.part", "checkpoints/notes.part"]
    (run.path / "checkpoints").mkdir()
    for name in (*leftovers, *others):
        (run.path / name).write_text("half")
    with run.held():
        assert not any((run.path / name).exists() for name in leftovers)
        assert all((run.path / name).exists() for name in others)


def test_a_folder_with_nothing_but_leftovers_is_free(tmp_path: Path) -> None:
    (tmp_path / ".config.json.abcd1234.part").write_text("half")
    folder = RunFolder(tmp_path)
    with folder.held():
        assert folder.require_free(resume=False, force=False) is False


@pytest.mark.parametrize(("resume", "force"), [(False, False), (True, False), (False, True)])
def test_a_folder_that_holds_no_run_is_never_touched(resume: bool, force: bool, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("dear")
    for held in (None, json.dumps({"model_type": "vit"}), json.dumps({"model": "a", "settings": {}})):
        if held:
            (tmp_path / "config.json").write_text(held)
        with pytest.raises((CannotCreateError, BadInputError)):
            RunFolder(tmp_path).require_free(resume, force)
    assert (tmp_path / "model.safetensors").read_text() == "dear"


def test_a_run_that_is_there_needs_resume_or_force(run: RunFolder) -> None:
    with pytest.raises(CannotCreateError, match="did not finish; --resume continues it, --force starts anew"):
        run.require_free(resume=False, force=False)
    assert run.require_free(resume=True, force=False) is True
    assert run.require_free(resume=False, force=True) is False
    run.summary.write_text("{}")
    with pytest.raises(CannotCreateError, match="a finished run without all its files; --resume continues it, --force"):
        run.require_free(resume=False, force=False)
    for path in run.written[:-1]:
        path.write_text("{}")
    with pytest.raises(CannotCreateError, match="a finished run; --force starts anew") as caught:
        run.require_free(resume=False, force=False)
    assert caught.value.exit_code == 73


def test_a_new_run_removes_only_what_the_old_one_left(run: RunFolder) -> None:
    for path in (*run.written, run.path / "notes.txt", run.path / "checkpoints" / "step-000001" / "state.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    run.begin(config(model="another"))
    assert {path.name for path in run.path.iterdir()} == {"config.json", "notes.txt"}
    assert json.loads(run.config.read_text())["model"] == "another"


def test_a_run_is_complete_with_all_its_files(run: RunFolder) -> None:
    for path in run.written[:-1]:
        assert not run.complete
        path.write_text("{}")
    assert run.complete


DIFFERENT = {
    "model was demo_vit and is other": config(model="other"),
    "heads was None and is 4": config(heads=4),
    "revision was None and is main": config(revision="main"),
    "attention was sdpa and is eager": config(attention="eager"),
    "device was cpu and is cuda": config(device="cuda:1"),
    "fingerprint of the weights was 0123 and is 8": config(weights={"source": "demo_vit", "fingerprint": "8"}),
    "fingerprint of the images was 4567 and is 8": config(images={"count": 4, "fingerprint": "8"}),
    "count of the images was 4 and is 5": config(images={"count": 5, "fingerprint": "8"}),
} | {
    f"setting {name} was {was} and is other": with_setting(**{name: "other"})
    for name, was in RepairSettings().model_dump().items()
    if name not in WITHOUT_EFFECT
}


@pytest.mark.parametrize("why", DIFFERENT)
def test_a_run_is_not_gone_on_with_under_anything_else(why: str, run: RunFolder) -> None:
    with pytest.raises(ConflictError) as caught:
        run.require_same(DIFFERENT[why])
    assert str(caught.value).startswith(f"cannot resume {run.path}: {why}; ")
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_settings_without_effect_may_change(name: str, run: RunFolder) -> None:
    run.require_same(with_setting(**{name: "other"}))


def test_another_device_of_the_same_kind_will_do(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(config(device="cuda:0"))
    folder.require_same(config(device="cuda:1"))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Image files, whose bytes alone count here."""
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


def begun_over(run: RunFolder, files: list[Path]) -> None:
    run.begin(config(), listed_images(ImageFiles(tuple(files)), silent))


CHANGES: dict[str, Callable[[list[Path]], object]] = {
    "image {0} had 5 bytes and has 6": lambda files: files[0].write_bytes(b"longer"),
    "image {1} has other contents of the same size": lambda files: files[1].write_bytes(b"other"),
    "image {2} had 5 bytes and has -1": lambda files: files[2].unlink(),
    "image {0} is now {1}, a different image": lambda files: (
        files.reverse() or files.sort(key=lambda p: p.name != "b.png")
    ),
    "there were 3 images and now there are 2, {2} is gone": lambda files: files.pop(),
    "there were 3 images and now there are 4, {3} is new": lambda files: files.append(files[0]),
}


@pytest.mark.parametrize("why", CHANGES)
def test_a_run_does_not_go_on_over_other_images(why: str, run: RunFolder, files: list[Path]) -> None:
    begun_over(run, files)
    before = list(files)
    CHANGES[why](files)
    with pytest.raises(ConflictError) as caught:
        run.require_same(config(), ImageFiles(tuple(files)))
    said = why.format(*before, files[-1])
    assert str(caught.value).startswith(
        f"cannot resume {run.path}: {said}; give what the run began with, as `sinder repair "
    )
    assert caught.value.exit_code == 78


def test_images_of_the_same_bytes_may_have_moved(
    run: RunFolder, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun_over(run, files)
    os.utime(files[0], ns=(1, 1))
    run.require_same(config(), ImageFiles(tuple(files)))
    moved = [path.rename(tmp_path / f"moved {path.name}") for path in files]
    run.require_same(config(), ImageFiles(tuple(moved)))
    monkeypatch.chdir(tmp_path)
    run.require_same(config(), ImageFiles(tuple(Path(path.name) for path in moved)))


def test_images_that_are_what_they_were_are_not_read_again(
    run: RunFolder, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun_over(run, files)
    monkeypatch.setattr(imagelist, "_digest", lambda path: pytest.fail(f"{path} was read"))
    monkeypatch.chdir(files[0].parent)
    run.require_same(config(), ImageFiles(tuple(Path(path.name) for path in files)))


def test_an_image_that_stays_unreadable_is_the_same(run: RunFolder, files: list[Path]) -> None:
    odd = [*files, Path("nul\0.png"), files[0].parent, files[0].parent / "odd \udcff\n.png"]
    begun_over(run, odd)
    run.require_same(config(), ImageFiles(tuple(odd)))


@pytest.mark.parametrize("text", ["[1, 2", "[1, 2]\n", "3\n"])
def test_a_torn_list_of_images_is_bad_input(text: str, run: RunFolder, files: list[Path]) -> None:
    run.images.write_text(text)
    with pytest.raises(BadInputError, match="cannot read") as caught:
        run.require_same(config(), ImageFiles(tuple(files)))
    assert caught.value.exit_code == 65


def test_weights_may_have_moved(run: RunFolder) -> None:
    run.require_same(config(weights={"source": "elsewhere", "fingerprint": "0123"}))


@pytest.mark.parametrize(("name", "value"), [("threads", 2), ("versions", {"torch": "2.14.0"})])
def test_what_may_change_the_last_bits_is_reported(name: str, value: object, run: RunFolder) -> None:
    told: list[object] = []
    run.require_same(config(**{name: value}), emit=told.append)
    (warned,) = told
    assert isinstance(warned, Warned)
    assert name in warned.text
    assert "the last bits may differ" in warned.text


@pytest.mark.parametrize(
    "stored",
    [
        {name: part for name, part in config().items() if name != "attention"},
        with_setting(forgotten=3),
        config(weights="a file"),
    ],
)
def test_a_run_of_another_format_is_told_to_be_one(stored: dict[str, Any], run: RunFolder) -> None:
    run.config.write_text(json.dumps(stored))
    with pytest.raises(ConflictError, match=r"its config\.json is of another version of sinder"):
        run.require_same(config())


@pytest.mark.parametrize("text", ["", "{", '{"model"', "[]", "3", "\x00"])
def test_a_torn_config_is_bad_input(text: str, run: RunFolder) -> None:
    run.config.write_text(text)
    for refused in (lambda: run.require_same(config()), lambda: run.require_free(resume=True, force=False)):
        with pytest.raises(BadInputError, match="cannot read") as caught:
            refused()
        assert caught.value.exit_code == 65


def test_sidecars_are_kept_unless_of_an_earlier_run(run: RunFolder) -> None:
    assert run.read_sidecars() == {}
    run.write_sidecars({"config.json": "{}", "more.json": "größer"})
    assert run.read_sidecars() == {"config.json": "{}", "more.json": "größer"}
    run.write_sidecars({"config.json": "[]"})
    (run.sidecars / ".more.json.abc.part").write_text("half")  # as a killed process leaves it
    assert run.read_sidecars() == {"config.json": "[]"}
    run.write_sidecars({})
    assert not run.sidecars.exists()


def test_a_sidecar_never_leaves_its_folder(run: RunFolder) -> None:
    before = run.config.read_text()
    run.write_sidecars({"../config.json": "not ours"})
    assert run.read_sidecars() == {"config.json": "not ours"}
    assert run.config.read_text() == before


def test_a_sidecar_that_is_no_text_is_bad_input(run: RunFolder) -> None:
    run.write_sidecars({"config.json": ""})
    (run.sidecars / "config.json").write_bytes(b"\xff")
    with pytest.raises(BadInputError, match=r"cannot read .*sidecars"):
        run.read_sidecars()


def record(step: int) -> StepRecord:
    return StepRecord(step, step, 0, None, 0, None, None, None, None, 0.0, 0.0)


def test_metrics_after_a_checkpoint_are_dropped(run: RunFolder) -> None:
    for step in range(1, 6):
        run.record(record(step))
    whole = run.metrics.read_text().splitlines(keepends=True)
    with run.metrics.open("ab") as file:
        file.write(b"\0\0\xff\n" + b"{}\n" + whole[1][:20].encode())
    run.forget_after(3)
    assert run.metrics.read_text() == "".join(whole[:3])
    run.forget_after(0)
    assert run.metrics.read_text() == ""
