"""Two ranks repair as one does: in memory, and under torchrun with everything that can end a run."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from sinder_cli import ModelRequest, api
from sinder_cli.distributed import ALONE, LostRankError, Ranks
from sinder_cli.errors import StorageError
from sinder_cli.events import Warned
from sinder_cli.images.decoding import UnreadableImageError
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.repairing import step as step_module
from sinder_cli.repairing.checkpoints import Checkpoints
from sinder_cli.repairing.deltas import Deltas
from sinder_cli.repairing.loop import Progress, clean_window, repair_steps
from sinder_cli.repairing.preparing import Prepared, Start
from sinder_cli.repairing.session import checkpointed, restored
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.requests import Process, RepairRequest
from sinder_cli.signals import Ended, Stop

Torchrun = Callable[..., "subprocess.Popen[str]"]
RED, BLUE = [(3, 3), (5, 8), (9, 4)], [(2, 7), (6, 2), (8, 8)]
BROKEN = 7  # of nine pictures; in the first pass it falls to one rank


class Pictures:
    """Clean ones, some with an early defect, some with a late one, and one that cannot be decoded."""

    in_memory = True

    def __init__(self, tiny: ModuleType, *spots: dict[str, Any]) -> None:
        spots = spots or ({}, {"red": RED}, {"blue": BLUE})
        self.tensors = [tiny.coloured(index, torch.float32, **spots[index % 3]) for index in range(9)]

    def __len__(self) -> int:
        return len(self.tensors)

    def name(self, index: int) -> str:
        return f"picture {index}"

    def load(self, index: int, side: int | None = None) -> Image.Image:  # noqa: ARG002
        if index == BROKEN:
            raise UnreadableImageError("it is broken")
        pixels = (self.tensors[index].permute(1, 2, 0).numpy() * 255).round()
        return Image.fromarray(pixels.astype(np.uint8))

    def fingerprint(self) -> str:
        return "in memory"


class Run:
    """One rank's part of a repair of the tiny planted model."""

    def __init__(
        self, tiny: ModuleType, ranks: Ranks = ALONE, pictures: Pictures | None = None, **settings: Any
    ) -> None:
        planted = tiny.plant(True, torch.float32)
        paper = {"recipe": "paper", "min_gap": 1.1, "lr": 0.05, "stop_clean_fraction": 1.0}
        chosen = paper | {"batch_size": 3, "max_steps": 8} | settings
        self.settings, self.ranks = RepairSettings.model_validate(chosen), ranks
        pictures = pictures or Pictures(tiny)
        self.progress = Progress(clean_window(len(pictures), self.settings))
        self.deltas = Deltas(planted.backbone, planted.module)
        self.warnings: list[str] = []
        preprocess = Preprocessing(24, planted.backbone.mean, planted.backbone.std)
        start = Start(planted.backbone, preprocess, pictures, self.settings, "cpu", {}, len(pictures))
        prepared = Prepared(start, planted.directions, planted.module, self.deltas, self.hear, ranks)
        self.steps = repair_steps(prepared, pictures, self.progress)

    def hear(self, event: object) -> None:
        if isinstance(event, Warned):
            self.warnings.append(event.text)

    def finish(self) -> dict[str, Any]:
        records = [asdict(record) | {"seconds": 0} for record in self.steps]
        return {"records": records, "deltas": self.state, "warnings": self.warnings, "progress": self.facts}

    @property
    def state(self) -> dict[str, Tensor]:
        """ε and its momentum by target."""
        both = ("delta", "velocity")
        return {f"{name}.{target.name}": getattr(target, name) for target in self.deltas.touched for name in both}

    @property
    def facts(self) -> tuple[Any, ...]:
        return self.progress.images, list(self.progress.recent), dict(self.progress.unreadable)


def assert_near(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """To 1e-5 of the largest of each target."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() <= 1e-5 * tensor.abs().max(), name


@pytest.fixture
def alone(tiny: ModuleType) -> dict[str, Any]:
    """What one process makes of it."""
    return Run(tiny).finish()


def test_two_ranks_give_the_deltas_of_one(tiny: ModuleType, forked: Any, alone: dict[str, Any]) -> None:
    first, second = forked(lambda ranks: Run(tiny, ranks).finish()).answers()
    assert_near(alone["deltas"], first["deltas"])
    assert all(torch.equal(tensor, second["deltas"][name]) for name, tensor in first["deltas"].items())
    assert len({name.split(".blocks.")[1].split(".")[0] for name in first["deltas"]}) == 5  # both windows were touched
    for mine, theirs in zip(alone["records"], first["records"], strict=True):
        assert theirs == mine | {"loss": pytest.approx(mine["loss"], rel=1e-5)}
    assert first["records"] == second["records"]
    assert first["progress"] == second["progress"] == alone["progress"]
    assert alone["progress"][2] == {f"picture {BROKEN}": "it is broken"}
    assert first["warnings"] == alone["warnings"] == [f"skipped picture {BROKEN}: it is broken"]  # rank 0 tells it


def test_a_batch_that_is_shared_unevenly_gives_the_same(tiny: ModuleType, forked: Any) -> None:
    for batch_size in (2, 5):
        alone = Run(tiny, batch_size=batch_size, max_steps=4).finish()
        first, _ = forked(
            lambda ranks, size=batch_size: Run(tiny, ranks, batch_size=size, max_steps=4).finish()
        ).answers()
        assert_near(alone["deltas"], first["deltas"])
        assert first["progress"] == alone["progress"]


def stopped(run: Run, checkpoints: Checkpoints, after: int, asked_on: int) -> int | None:
    """Take steps until a signal comes to one rank, and say which step was the last."""
    stop = Stop(once=True)

    def save() -> None:
        if run.ranks.writes:
            checkpoints.write(run.deltas, run.progress)

    try:
        for record in checkpointed(run.steps, save, run.progress, run.settings, stop, run.hear, run.ranks):
            if record.step == after and run.ranks.rank == asked_on:
                stop.hear(signal.SIGTERM)
                stop.hear(signal.SIGTERM)  # by the cluster, and by torchrun
    except Ended as end:
        return run.progress.steps if end.number == signal.SIGTERM else None
    return None


@pytest.mark.parametrize("asked_on", [0, 1])
def test_any_number_of_ranks_goes_on_after_a_signal(
    asked_on: int, tiny: ModuleType, forked: Any, alone: dict[str, Any], tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path)

    def go_on(ranks: Ranks) -> dict[str, Any]:
        run = Run(tiny, ranks)
        assert restored(checkpoints, run.deltas, run.progress, run.hear, ranks)
        assert run.progress.steps == 5
        # the steps of a run begin where its progress is when they are first asked for
        return run.finish()

    assert forked(lambda ranks: stopped(Run(tiny, ranks), checkpoints, 5, asked_on)).answers() == [5, 5]
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000005"]
    assert_near(alone["deltas"], go_on(ALONE)["deltas"])
    assert_near(alone["deltas"], forked(go_on).answers()[1]["deltas"])


def test_a_disk_full_on_the_first_rank_ends_the_other(tiny: ModuleType, forked: Any) -> None:
    def work(ranks: Ranks) -> None:
        for record in Run(tiny, ranks).steps:
            if record.step == 3 and ranks.writes:
                raise StorageError("cannot write", "No space left on device")

    first, second = forked(work).answers()
    assert isinstance(first, StorageError)
    assert isinstance(second, LostRankError)


def test_ranks_measure_what_one_process_measures(
    tiny: ModuleType, forked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "CROWDED", (len(RED) - 0.5) / 144)
    pictures = Pictures(tiny, {"red": RED}, {"red": RED[1:]}, {"red": RED})

    def responses(ranks: Ranks) -> dict[str, Tensor]:
        run = Run(tiny, ranks, pictures, step="greedy", min_tokens=2, batch_size=2, max_steps=5)
        run.finish()
        return {str(block): seen.responses / seen.probes for block, seen in run.progress.observed.by_block.items()}

    alone = responses(ALONE)
    first, second = forked(responses).answers()
    assert alone
    assert_near(alone, first)
    assert_near(first, second)


def test_two_ranks_shrink_the_singular_values_that_one_shrinks(
    forked: Any, small: Path, photographs: Path, tmp_path: Path
) -> None:
    """Whole runs: each rank probes ordinary tokens by itself, but the choice, and how far, must come out the same."""
    settings = RepairSettings(image_size=168, batch_size=2, workers=0)

    def repaired(ranks: Ranks) -> dict[str, Any] | None:
        out, request = tmp_path / str(ranks.size), ModelRequest("dinov2_custom", small)
        result = api.repair(RepairRequest(request, [str(photographs)], settings), out, process=Process(ranks=ranks))
        return None if result is None else result.summary

    first, second = forked(repaired).answers(120)
    alone = repaired(ALONE)
    assert isinstance(first, dict), first
    assert second is None
    assert alone is not None
    assert first["verdict"] == alone["verdict"] == "repaired"
    assert first["steps"] == alone["steps"]
    assert first["best_step"] == alone["best_step"]
    one, two = (load_file(tmp_path / size / "adapter.safetensors") for size in "12")
    assert any(bool(delta.any()) for delta in one.values())
    assert_near(one, two)
    of_one, of_two = ((tmp_path / size / "outliers.json").read_text() for size in "12")
    assert json.loads(of_one)["images"] == json.loads(of_two)["images"]


def test_standard_input_reaches_a_dry_run_and_a_finished_run(
    forked: Any, small: Path, photographs: Path, tmp_path: Path
) -> None:
    """Rank 0 alone calls the first: a broadcast would wait for ranks that never come. All of them call the second."""
    listed = "\n".join(str(path) for path in sorted(photographs.iterdir()))
    settings = RepairSettings(image_size=168, batch_size=2, workers=0, recipe="paper", keep="last", max_steps=1)
    request = RepairRequest(ModelRequest("dinov2_custom", small), ["-"], settings)
    api.repair(request, tmp_path / "run", process=Process(stdin=StringIO(listed)))

    def asked(ranks: Ranks) -> tuple[int, str] | None:
        values = 0
        if ranks.writes:
            process = Process(stdin=StringIO(listed), ranks=ranks)
            values = api.try_repair(request, tmp_path / "other", process).values
        process = Process(stdin=StringIO(listed if ranks.writes else ""), ranks=ranks)
        finished = api.repair(replace(request, resume=True), tmp_path / "run", process=process)
        return None if finished is None else (values, str(finished.folder))

    first, second = forked(asked).answers(120)
    assert first[0] > 0
    assert first[1] == str(tmp_path / "run")
    assert second is None


def settings_of(small: Path, photographs: Path, out: Path) -> list[str]:
    options = "--recipe paper --keep last --image-size 168 --batch-size 2 --max-steps 40 --eval-images 1 --lr 0.02"
    options += " --checkpoint-every 1 --workers 0"
    return ["dinov2_custom", str(photographs), "--weights", str(small), "--out", str(out), *options.split()]


def after_steps(out: Path, steps: int, process: subprocess.Popen[str]) -> None:
    """Wait for so many more lines of the metrics."""
    until = time.monotonic() + 120

    def lines() -> int:
        return len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").is_file() else 0

    while lines() < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def ranks_under(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    found = [child for child in psutil.Process(process.pid).children() if "sinder_cli" in child.cmdline()]
    return {int(child.environ()["RANK"]): child for child in found}


def own_lines(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("sinder: ") and "decomposing" not in line]


@pytest.mark.slow
def test_a_run_that_lost_a_rank_ends_with_one_process(
    torchrun: Torchrun, small: Path, photographs: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    arguments = settings_of(small, photographs, out)

    run = torchrun("repair", *arguments)
    after_steps(out, 3, run)
    began = time.monotonic()
    ranks_under(run)[1].kill()
    shown, errors = run.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert run.returncode != 0
    assert shown == ""
    told = ("sinder: error: a process of this run was lost", "sinder: terminated")  # by whether torchrun was faster
    assert sum(line.startswith(told) for line in errors.splitlines()) == 1, errors
    assert list((out / "checkpoints").glob("step-*"))

    run = torchrun("repair", *arguments, "--resume")
    steps = max(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))
    after_steps(out, steps + 3, run)
    run.send_signal(signal.SIGTERM)
    shown, errors = run.communicate(timeout=60)
    said = own_lines(errors)
    assert run.returncode != 0
    assert shown == ""
    assert said.count("sinder: terminated") == 1
    assert sum("to resume" in line for line in said) == 1
    newest = max(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))
    assert f"sinder: wrote a checkpoint after step {newest}" in said
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, newest + 1)
    ]

    settings = json.loads((out / "config.json").read_text())["settings"]
    request = ModelRequest("dinov2_custom", small)
    for folder, resume in ((out, True), (whole, False)):
        api.repair(
            RepairRequest(request, [str(photographs)], RepairSettings.model_validate(settings), resume=resume), folder
        )
    assert_near(load_file(whole / "adapter.safetensors"), load_file(out / "adapter.safetensors"))


@pytest.mark.slow
def test_a_batch_smaller_than_the_ranks_is_refused_once(torchrun: Torchrun, tmp_path: Path) -> None:
    run = torchrun("repair", "demo_vit", "--out", tmp_path / "run")
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0
    assert own_lines(errors) == [
        "sinder: error: batch size 1 is too small: each of the 2 processes takes its share of every batch;"
        " use --batch-size 2"
    ]
    assert not (tmp_path / "run").exists()
