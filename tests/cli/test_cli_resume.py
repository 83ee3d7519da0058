"""A repair that is killed, stopped or torn goes on to the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file
from warm import Ended, Running, Server

from sinder_cli import ModelRequest, api
from sinder_cli.errors import BadInputError
from sinder_cli.images.loading import shuffled
from sinder_cli.repairing.choosing import guarded
from sinder_cli.repairing.deltas import Deltas
from sinder_cli.repairing.loop import DivergedError
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.requests import RepairRequest

STEPS = 12
CHECKPOINTS = ("--checkpoint-every", "2")


def finished(run: Path) -> dict[str, Any]:
    """What a run left that another run of the same settings must leave too."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "model": hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest(),
        "adapter": hashlib.sha256((run / "adapter.safetensors").read_bytes()).hexdigest(),
        "metrics": [{name: value for name, value in line.items() if name != "seconds"} for line in lines],
        "evaluations": (run / "evaluations.jsonl").read_text(),
        "outliers": (run / "outliers.json").read_text(),
        "summary": {name: value for name, value in summary.items() if name != "seconds"},
    }


def temporaries(run: Path) -> list[Path]:
    return [path for path in run.rglob(".*") if path.suffix == ".part"]


def steps_of(run: Path) -> list[int]:
    """The numbers of the checkpoints, the oldest first."""
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def until(condition: Callable[[], bool], running: Running) -> None:
    """Wait for something that a command does."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, running.errors
        time.sleep(0.002)


@pytest.fixture(scope="module")
def repair(small: Path, photos: Path) -> tuple[str, ...]:
    """A command line without --out: some seconds' worth of steps, each with a defect."""
    settings = (
        "--recipe",
        "paper",
        "--keep",
        "last",
        "--max-steps",
        str(STEPS),
        "--stop-clean-fraction",
        "1",
        "--lr",
        "0.2",
        "--eval-images",
        "2",
        "--workers",
        "0",
    )
    return ("repair", "dinov2_custom", "--weights", str(small), "--data", str(photos), *settings)


@pytest.fixture(scope="module")
def uninterrupted(warm: Server, repair: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    ended = warm.run(*repair, "--out", "run", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def stopped_once(warm: Server, repair: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was asked to stop, which nobody may change."""
    folder = tmp_path_factory.mktemp("stopped")
    running = warm.start(*repair, "--out", "run", cwd=folder)
    until(lambda: (folder / "run" / "metrics.jsonl").exists(), running)
    running.send(signal.SIGTERM)
    assert running.wait().returncode == -signal.SIGTERM
    return folder / "run"


@pytest.fixture
def stopped(warm: Server, repair: tuple[str, ...], tmp_path: Path) -> Path:
    """A run that was killed after its sixth step, with checkpoints of the second, fourth and sixth."""
    run = tmp_path / "run"
    running = warm.start(*repair, *CHECKPOINTS, "--out", "run", cwd=tmp_path)
    until(lambda: (run / "checkpoints" / "step-000006").exists(), running)
    running.send(signal.SIGKILL)
    assert running.wait().returncode == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    return run


@pytest.fixture
def resume(warm: Server, repair: tuple[str, ...], tmp_path: Path) -> Callable[..., Ended]:
    """Go on with the run in `tmp_path`, with more options."""
    return lambda *more: warm.run(*repair, *CHECKPOINTS, "--out", "run", "--resume", *more, cwd=tmp_path)


@pytest.fixture(scope="module")
def default_repair(small: Path, photos: Path) -> tuple[str, ...]:
    """The same as users call it: the default recipe, which draws pictures beside the few photos."""
    return ("repair", "dinov2_custom", "--weights", str(small), "--data", str(photos), "--workers", "0")


@pytest.fixture(scope="module")
def default_uninterrupted(
    warm: Server, default_repair: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run of the default recipe that nobody disturbed."""
    folder = tmp_path_factory.mktemp("default")
    ended = warm.run(*default_repair, "--out", "run", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert (summary["recipe"], summary["verdict"]) == ("sinder", "repaired")
    assert summary["best_step"] < summary["steps"]
    return folder / "run"


@pytest.mark.parametrize("after", [3, 5, 10, 11])
def test_a_default_run_killed_after_some_steps_ends_the_same(
    after: int, warm: Server, default_repair: tuple[str, ...], default_uninterrupted: Path, tmp_path: Path
) -> None:
    """Killed between two looks at the guard, at a look, at that which finds the best state, and after it."""
    run = tmp_path / "run"
    running = warm.start(*default_repair, "--checkpoint-every", "1", "--out", "run", cwd=tmp_path)
    until(lambda: (run / "checkpoints" / f"step-{after:06d}").exists(), running)
    running.send(signal.SIGKILL)
    assert running.wait().returncode == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    ended = warm.run("repair", "run", "--resume", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "sinder: resuming after step " in ended.stderr
    assert finished(run) == finished(default_uninterrupted)
    assert temporaries(run) == []


@pytest.mark.parametrize("checkpoints", ["1", "100"], ids=["after a step", "before a checkpoint"])
def test_a_run_over_a_relative_folder_goes_on_from_elsewhere(
    checkpoints: str, warm: Server, small: Path, photos: Path, default_uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / "few")
    (tmp_path / "elsewhere").mkdir()
    call = ("repair", "dinov2_custom", "--weights", str(small), "--data", "few", "--workers", "0", "--out", "run")
    running = warm.start(*call, "--checkpoint-every", checkpoints, cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    awaited = tmp_path / "run" / "checkpoints" / "step-000003" if checkpoints == "1" else metrics
    until(awaited.exists, running)
    running.send(signal.SIGKILL)
    running.wait()
    ended = warm.run("repair", "../run", "--resume", cwd=tmp_path / "elsewhere")
    assert ended.returncode == 0, ended.stderr
    ours, theirs = finished(tmp_path / "run"), finished(default_uninterrupted)
    for found in (ours, theirs):  # names and places differ, and nothing else
        images = json.loads(found.pop("outliers"))["images"]
        found["outliers"] = [{key: value for key, value in image.items() if key != "name"} for image in images]
        del found["summary"]["data"]
    assert ours == theirs


@pytest.mark.slow
def test_a_default_run_killed_at_random_moments_ends_the_same(
    warm: Server, default_repair: tuple[str, ...], default_uninterrupted: Path, tmp_path: Path
) -> None:
    drawn, killed = random.Random(1), 0
    while not (tmp_path / "run" / "README.md").exists():
        running = warm.start(*default_repair, "--checkpoint-every", "1", "--out", "run", "--resume", cwd=tmp_path)
        if killed < 8:
            time.sleep(drawn.uniform(0.5, 6))
            running.send(signal.SIGKILL)
        ended = running.wait()
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
        killed += ended.returncode != 0
    assert killed > 0
    assert finished(tmp_path / "run") == finished(default_uninterrupted)
    assert temporaries(tmp_path / "run") == []


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_the_same(
    warm: Server, repair: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    drawn = random.Random(0)
    killed, seconds, runs = 0, 1.0, 0
    while killed < 20:
        runs += 1
        run = tmp_path / f"run{runs}"
        ended = None
        while ended is None or ended.returncode != 0:
            began = time.monotonic()
            running = warm.start(*repair, *CHECKPOINTS, "--out", run, "--resume", cwd=tmp_path)
            if killed < 20:
                time.sleep(drawn.uniform(0, seconds))
                running.send(signal.SIGKILL)
            ended = running.wait()
            assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
            killed += ended.returncode != 0
        seconds = time.monotonic() - began
        assert finished(run) == finished(uninterrupted)
        assert temporaries(run) == []


def test_a_finished_run_without_improvement_gives_the_same_answer_again(
    warm: Server, repair: tuple[str, ...], tmp_path: Path
) -> None:
    few = (*repair, "--max-steps", "1", "--out", "run")
    for more in ((), ("--resume",)):
        ended = warm.run(*few, *more, cwd=tmp_path)
        assert ended.returncode == 1, ended.stderr
        assert json.loads(ended.stdout)["verdict"] == "not improved"


WRITTEN = (
    "images.jsonl",
    "config.json",
    "outliers.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "model.safetensors",
    "adapter.safetensors",
    "summary.json",
    "README.md",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_a_run_killed_before_writing_a_file_ends_the_same(
    name: str, warm: Server, repair: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    change = f"open run/{name}" if name in ("metrics.jsonl", "evaluations.jsonl") else f"os.rename run/.{name}.part"
    killed = warm.run(*repair, "--out", "run", cwd=tmp_path, kill_before=change)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / name).exists()
    how = ("repair", "run") if name != "config.json" else (*repair, "--out", "run")
    ended = warm.run(*how, "--resume", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert finished(tmp_path / "run") == finished(uninterrupted)
    assert temporaries(tmp_path / "run") == []
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in uninterrupted.iterdir()}


def test_settings_without_effect_on_the_result_may_change(
    stopped: Path, resume: Callable[..., Ended], uninterrupted: Path
) -> None:
    ended = resume("--workers", "2", "--checkpoint-every", "7min", "--strict", "--device", "cpu", "--format", "json")
    assert ended.returncode == 0, ended.stderr
    assert "resuming after step 6" in ended.stderr
    assert finished(stopped) == finished(uninterrupted)


OTHER = {
    "--lr 0.01": "setting lr was 0.2 and is 0.01",
    "--batch-size 2": "setting batch_size was 1 and is 2",
    "--seed 3": "setting seed was 0 and is 3",
    "--dtype bfloat16": "setting dtype was float32 and is bfloat16",
    "--image-size 154": "setting image_size was 168 and is 154",
    "--max-steps 40": "setting max_steps was 12 and is 40",
    "--attention eager": "attention was sdpa and is eager",
    "--heads 4": "heads was None and is 4",
    "--data {more}": "there were 6 images and now there are 7, {more} is new",
    "--weights {changed}": "fingerprint of the weights was ",
}


@pytest.mark.parametrize("options", OTHER)
def test_a_run_is_not_resumed_under_other_settings_or_data(
    options: str, stopped_once: Path, small: Path, photos: Path, warm: Server, repair: tuple[str, ...], tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in stopped_once.rglob("*")}
    if "changed" in options:
        tensors = load_file(small)
        tensors["blocks.1.mlp.fc2.weight"][0, 0] += 1e-3
        save_file(tensors, tmp_path / "changed.safetensors")
    shutil.copy(photos / "chelsea.png", tmp_path / "more.png")
    more = options.format(more=tmp_path / "more.png", changed=tmp_path / "changed.safetensors").split()
    ended = warm.run(*repair, "--out", stopped_once, "--resume", *more, cwd=tmp_path)
    assert ended.returncode == 78, ended.stderr
    last = ended.stderr.splitlines()[-1]
    why = OTHER[options].format(more=tmp_path / "more.png")
    assert last.startswith(f"sinder: error: cannot resume {stopped_once}: {why}")
    assert {path: path.stat().st_mtime_ns for path in stopped_once.rglob("*")} == before


def test_a_run_is_not_resumed_after_an_image_has_changed(
    stopped_once: Path, photos: Path, warm: Server, repair: tuple[str, ...], tmp_path: Path
) -> None:
    changed = photos / "rocket.png"
    whole = changed.read_bytes()
    changed.write_bytes(whole + b"more")
    try:
        ended = warm.run(*repair, "--out", stopped_once, "--resume", cwd=tmp_path)
    finally:
        changed.write_bytes(whole)
    assert ended.returncode == 78
    assert f"image {changed} had {len(whole)} bytes and has {len(whole) + 4}" in ended.stderr


@pytest.mark.parametrize(
    ("config", "code", "word"),
    [
        ('{"model": "dinov2_custom", "settings": {', 65, "cannot read"),
        ("[]", 65, "cannot read"),
        ('{"model": "m", "weights": {}, "images": {}, "settings": {"lr": 1}, "versions": {}}', 78, "another version"),
        ('{"model_type": "dinov2"}', 65, "is it a run directory?"),
    ],
    ids=["torn", "no object", "another version", "a model's"],
)
def test_a_folder_with_a_foreign_config_is_not_resumed(
    config: str, code: int, word: str, warm: Server, repair: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config)
    ended = warm.run(*repair, "--out", "run", "--resume", cwd=tmp_path)
    assert ended.returncode == code, ended.stderr
    assert word in ended.stderr.splitlines()[-1]
    assert (tmp_path / "run" / "config.json").read_text() == config


def test_a_run_with_a_torn_checkpoint_ends_the_same(
    stopped: Path, resume: Callable[..., Ended], uninterrupted: Path
) -> None:
    newest = stopped / "checkpoints" / f"step-{steps_of(stopped)[-1]:06d}"
    state = newest / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    ended = resume()
    assert ended.returncode == 0, ended.stderr
    assert f"sinder: warning: run/checkpoints/{newest.name} is damaged" in ended.stderr
    assert finished(stopped) == finished(uninterrupted)


def test_where_every_checkpoint_is_torn_the_run_is_not_resumed(stopped: Path, resume: Callable[..., Ended]) -> None:
    for manifest in stopped.rglob("manifest.json"):
        manifest.unlink()
    ended = resume()
    assert ended.returncode == 65
    assert "no checkpoint is intact" in ended.stderr.splitlines()[-1]


def test_a_finished_run_is_not_resumed_again(
    uninterrupted: Path, warm: Server, repair: tuple[str, ...], tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    again = warm.run(*repair, "--out", uninterrupted, "--resume", "--format", "table", cwd=tmp_path)
    assert (again.returncode, again.stdout.splitlines()[0]) == (
        0,
        f"{uninterrupted}: finished already, nothing to resume",
    )
    assert "run directory: " in again.stdout
    document = json.loads(warm.run(*repair, "--out", uninterrupted, "--resume", cwd=tmp_path).stdout)
    assert document["steps"] == STEPS
    other = warm.run(*repair, "--out", uninterrupted, "--resume", "--lr", "0.01", cwd=tmp_path)
    assert other.returncode == 78
    assert "setting lr was 0.2 and is 0.01" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


def test_a_finished_run_goes_on_when_more_steps_are_asked_for(
    uninterrupted: Path, warm: Server, repair: tuple[str, ...], tmp_path: Path
) -> None:
    """To the same bytes as a run that had so many steps from the beginning."""
    first = warm.run(*repair, "--max-steps", "5", "--out", "run", cwd=tmp_path)
    assert json.loads(first.stdout)["steps"] == 5
    fewer = warm.run("repair", "run", "--resume", "--max-steps", "3", cwd=tmp_path)
    assert fewer.returncode == 78
    assert "setting max_steps was 5 and is 3" in fewer.stderr
    on = warm.run("repair", "run", "--resume", "--max-steps", str(STEPS), cwd=tmp_path)
    assert on.returncode == 0, on.stderr
    assert f"sinder: run goes on to step {STEPS}" in on.stderr
    assert "resuming after step 5" in on.stderr
    assert finished(tmp_path / "run") == finished(uninterrupted)


def test_a_run_that_ended_for_another_reason_is_not_made_longer(warm: Server, tmp_path: Path) -> None:
    few = ("--eval-images", "2", "--scan-images", "4", "--stop-images", "4")
    ended = warm.run("repair", "demo_vit", *few, "--out", "run", cwd=tmp_path)
    document = json.loads(ended.stdout)
    assert document["stopped_by"] != "max_steps"
    before = (tmp_path / "run" / "summary.json").read_bytes()
    longer = warm.run("repair", "run", "--resume", "--max-steps", "100000", cwd=tmp_path)
    assert longer.returncode == 78
    assert f"it ended before its last step ({document['stopped_by']})" in longer.stderr
    assert (tmp_path / "run" / "summary.json").read_bytes() == before


def test_resume_without_a_run_starts_one_and_says_so(warm: Server, repair: tuple[str, ...], tmp_path: Path) -> None:
    ended = warm.run(*repair, "--max-steps", "2", "--out", "run", "--resume", cwd=tmp_path)
    assert ended.returncode == 1, ended.stderr
    assert json.loads(ended.stdout)["verdict"] == "not improved"
    assert "sinder: no run in run yet: starting one\n" in ended.stderr


def test_a_run_directory_is_enough_to_go_on_from_anywhere(
    stopped: Path, uninterrupted: Path, warm: Server, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for changes in (("--lr", "0.01"), ("--data", str(stopped)), ("--seed", "1")):
        refused = warm.run("repair", "../run", "--resume", *changes, cwd=tmp_path / "elsewhere")
        assert refused.returncode in (66, 78), refused.stderr
    ended = warm.run("repair", "../run", "--resume", "--workers", "1", "--strict", cwd=tmp_path / "elsewhere")
    assert ended.returncode == 0, ended.stderr
    assert "resuming after step 6" in ended.stderr
    assert finished(stopped) == finished(uninterrupted)
    again = warm.run("repair", "run", "--resume", "--format", "table", cwd=tmp_path)
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, "run: finished already, nothing to resume")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} >= {"run", "elsewhere"}
    assert not (tmp_path / "sinder-runs").exists()


def test_an_unfinished_run_is_told_to_be_no_model_yet(stopped: Path, warm: Server) -> None:
    ended = warm.run("predict-defects", "run", cwd=stopped.parent)
    assert ended.returncode == 66
    assert ended.stderr.splitlines()[-1].endswith("its run did not finish; `sinder repair run --resume` continues it")


def test_a_run_over_images_from_standard_input_resumes_without_them(
    sinder: Callable[..., Any], repair: tuple[str, ...], photos: Path, warm: Server, uninterrupted: Path, tmp_path: Path
) -> None:
    options = [option for option in repair if option not in ("--data", str(photos))]
    listed = "".join(f"{path}\n" for path in sorted(photos.iterdir()))
    short = sinder(*options, "--data", "-", "--out", tmp_path / "run", stdin=listed)
    assert short.returncode == 0, short.stderr
    run = tmp_path / "run"
    for name in ("summary.json", "model.safetensors"):
        (run / name).unlink()
    ended = warm.run("repair", run, "--resume", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert finished(run)["model"] == finished(uninterrupted)["model"]
    assert finished(run)["summary"]["data"] == finished(uninterrupted)["summary"]["data"] | {"places": ["-"]}
    assert finished(uninterrupted)["summary"]["data"]["places"] == [str(photos)]
    assert finished(uninterrupted)["summary"]["settings"]["max_steps"] == STEPS


def test_a_finished_run_without_its_report_gets_it_again(uninterrupted: Path, warm: Server, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "report.html").unlink()
    ended = warm.run("repair", "run", "--resume", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (run / "report.html").is_file()
    assert finished(run) == finished(uninterrupted)


def test_only_force_replaces_a_run_and_only_its_own_files(
    stopped: Path, warm: Server, repair: tuple[str, ...], tmp_path: Path
) -> None:
    (stopped / "notes.txt").write_text("mine")
    few = (*repair, "--max-steps", "1", "--out", "run")
    refused = warm.run(*few, cwd=tmp_path)
    assert refused.returncode == 73
    assert "a run that did not finish; --resume continues it, --force starts anew" in refused.stderr
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) >= 6
    useless = warm.run(*few, "--force", "--weights", tmp_path / "none.pth", cwd=tmp_path)
    assert useless.returncode == 66
    assert steps_of(stopped)
    forced = warm.run(*few, "--force", cwd=tmp_path)
    assert forced.returncode == 1, forced.stderr
    assert json.loads(forced.stdout)["verdict"] == "not improved"
    assert steps_of(stopped) == [1]
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) == 1
    assert (stopped / "notes.txt").read_text() == "mine"
    again = warm.run(*few, cwd=tmp_path)
    assert again.returncode == 73
    assert "it holds a finished run; --force starts anew" in again.stderr


@pytest.mark.parametrize("config", [None, '{"model_type": "dinov2"}', '{"model": "dinov2", "settings": {}}'])
def test_force_touches_no_folder_that_is_no_run(
    config: str | None, warm: Server, repair: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    (folder / "checkpoints" / "step-000001").mkdir(parents=True)
    (folder / "model.safetensors").write_text("dear")
    if config:
        (folder / "config.json").write_text(config)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    ended = warm.run(*repair, "--out", folder, "--force", cwd=tmp_path)
    assert ended.returncode in (65, 73), ended.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_force_does_not_remove_the_weights_to_be_repaired(
    uninterrupted: Path, warm: Server, repair: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    for model in ((run,), ("dinov2_custom", "--weights", run / "model.safetensors")):
        ended = warm.run("repair", *model, *repair[4:], "--out", run, "--force", cwd=tmp_path)
        assert ended.returncode == 2
        assert "it holds the weights that are to be repaired" in ended.stderr
    assert finished(run) == finished(uninterrupted)


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "hung up")]
)
def test_a_signal_finishes_and_saves_the_step(
    number: signal.Signals, said: str, warm: Server, repair: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "its run"
    running = warm.start(*repair, "--out", "its run", cwd=tmp_path)
    until(lambda: (run / "metrics.jsonl").exists(), running)
    running.send(number)
    ended = running.wait()
    assert ended.returncode == -number
    assert ended.stdout == ""
    *_, answer, wrote, how, last = ended.stderr.splitlines()
    assert answer == "sinder: stopping after this step, with a checkpoint; a second signal ends at once"
    (step,) = steps_of(run)
    assert wrote == f"sinder: wrote a checkpoint after step {step}"
    assert how.startswith("sinder: to resume, run: ")
    assert last == f"sinder: {said}"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == step
    assert temporaries(run) == []
    again = shlex.split(how.removeprefix("sinder: to resume, run: "))
    resumed = warm.run(*again[1:], cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert finished(run) == finished(uninterrupted)


@pytest.mark.slow
def test_the_command_that_resumes_is_the_one_that_was_called(
    repair: tuple[str, ...], environment: dict[str, str], uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "a 'run'"
    command = [sys.executable, "-m", "sinder_cli", *repair, "--out", run.name, "--force"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        while not (run / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    pasted = errors.splitlines()[-2].removeprefix("sinder: to resume, run: ")
    again = subprocess.run(pasted, shell=True, env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert again.returncode == 0, again.stderr
    assert finished(run) == finished(uninterrupted)


def test_a_second_signal_ends_at_once_with_a_good_checkpoint(
    warm: Server, repair: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    running = warm.start(*repair, *CHECKPOINTS, "--out", "run", cwd=tmp_path)
    until(lambda: (run / "checkpoints" / "step-000002").exists(), running)
    running.send(signal.SIGTERM)
    running.send(signal.SIGINT)
    ended = running.wait()
    assert ended.returncode in (-signal.SIGINT, -signal.SIGTERM)  # both may come between two instructions
    assert "Traceback" not in ended.stderr
    assert "to resume, run: " in ended.stderr
    assert temporaries(run) == []
    resumed = warm.run(*repair, "--out", "run", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "damaged" not in resumed.stderr
    assert finished(run) == finished(uninterrupted)


def test_a_signal_before_the_first_step_leaves_no_folder(warm: Server, repair: tuple[str, ...], tmp_path: Path) -> None:
    running = warm.start(*repair, "--out", "runs/run", cwd=tmp_path)
    until(lambda: (tmp_path / "runs" / "run").exists(), running)
    running.send(signal.SIGTERM)
    ended = running.wait()
    assert ended.returncode == -signal.SIGTERM
    assert ended.stderr.splitlines()[-1] == "sinder: terminated"
    assert "to resume" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_the_model_is_written_loses_no_step(
    warm: Server, repair: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    running = warm.start(*repair, "--out", "run", cwd=tmp_path)
    until(lambda: steps_of(run) == [STEPS], running)
    running.send(signal.SIGINT)
    ended = running.wait()
    assert ended.returncode == -signal.SIGINT
    assert not (run / "README.md").exists()
    assert temporaries(run) == []
    resumed = warm.run(*repair, "--out", "run", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "decomposing" not in resumed.stderr
    assert finished(run) == finished(uninterrupted)


def test_the_second_run_on_one_folder_is_sent_away(
    warm: Server, sinder: Callable[..., Any], repair: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    endless = ("--max-steps", "4000", "--lr", "1e-9")  # no image is ever clean
    running = warm.start(*repair, *endless, "--out", run, cwd=tmp_path)
    until(lambda: (run / "metrics.jsonl").exists(), running)
    for more in ("--resume", "--force"):
        second = sinder(*repair, "--out", run, more)
        assert second.returncode == 75, second.stderr
        assert "another process is repairing into it" in second.stderr
    running.send(signal.SIGTERM)
    assert running.wait().returncode == -signal.SIGTERM
    assert len(steps_of(run)) == 1


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_pipe_does_not_lose_the_run(
    stream: str, repair: tuple[str, ...], environment: dict[str, str], uninterrupted: Path, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | {stream: writer}
    command = [sys.executable, "-m", "sinder_cli", *repair, "--out", "run"]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, check=False, timeout=120, **streams)
    os.close(writer)
    assert ended.returncode == (-signal.SIGPIPE if stream == "stdout" else 0)
    assert finished(tmp_path / "run") == finished(uninterrupted)
    assert (tmp_path / "run" / "README.md").exists()


def test_a_full_disk_after_a_checkpoint_leaves_nothing_temporary(
    stopped: Path,
    repair: tuple[str, ...],
    resume: Callable[..., Ended],
    environment: dict[str, str],
    uninterrupted: Path,
) -> None:
    before = steps_of(stopped)
    limited = subprocess.run(
        [sys.executable, "-m", "sinder_cli", *repair, *CHECKPOINTS, "--out", stopped, "--resume"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)),
    )
    assert limited.returncode == 74, limited.stderr
    assert "cannot write" in limited.stderr.splitlines()[-1]
    assert steps_of(stopped) == before
    assert temporaries(stopped) == []
    assert resume().returncode == 0
    assert finished(stopped) == finished(uninterrupted)


def unshared() -> tuple[str, ...]:
    """What starts a command where it may mount; empty where nothing does."""
    ways = ("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount")
    mounting = ("sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0"', "/tmp")
    for way in ways if shutil.which("unshare") else ():
        if subprocess.run([*way, *mounting], capture_output=True, check=False).returncode == 0:
            return way
    return ()


def pages(folder: Path) -> int:
    """The bytes that the files of a folder take on a tmpfs."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("full_at", ["checkpoint", "model"])
def test_a_run_goes_on_after_a_really_full_small_disk(
    full_at: str, repair: tuple[str, ...], environment: dict[str, str], uninterrupted: Path, tmp_path: Path
) -> None:
    """A tmpfs on which a third checkpoint has no room beside two, or the model none; it is enlarged for the resume."""
    way = unshared()
    if not way:
        pytest.skip("nothing may be mounted here")
    sinder = shlex.join([sys.executable, "-m", "sinder_cli", *repair, *CHECKPOINTS, "--out", "disk/run"])
    script = f"""
    mount -t tmpfs -o size=$1 tmpfs disk || exit 99
    {sinder} 2> first; echo $? > code
    ls -A disk/run disk/run/checkpoints disk/run/checkpoints/* > left
    mount -o remount,size=64m disk
    {sinder} --resume 2> second || exit 98
    cp -r disk/run copied
    """
    (tmp_path / "disk").mkdir()
    (step,) = (uninterrupted / "checkpoints").glob("step-*")
    size = pages(uninterrupted / "checkpoints" / "bases") + 2 * pages(step) + (16 << 10)  # config, images, metrics
    size += 2 * pages(step) if full_at == "model" else 0
    ended = subprocess.run(
        [*way, "sh", "-c", script, "sh", str(size)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, (ended.stderr, (tmp_path / "first").read_text(), (tmp_path / "second").read_text())
    assert (tmp_path / "code").read_text() == "74\n"
    said = (tmp_path / "first").read_text().splitlines()[-1]
    assert "No space left on device; free space there" in said
    assert ("model.safetensors" in said) == (full_at == "model")
    left = (tmp_path / "left").read_text()
    assert "step-0000" in left
    assert "manifest.json" in left
    assert ".part" not in left
    assert "sinder: resuming after step" in (tmp_path / "second").read_text()
    assert finished(tmp_path / "copied") == finished(uninterrupted)


def test_a_delta_that_is_not_finite_makes_no_model(
    small: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sinder_cli.repairing import preparing
    from sinder_cli.repairing.guard import Guard, Snapshot

    deltas: list[Any] = []
    really = Guard.look

    def spoil(guard: Guard) -> Snapshot:
        snapshot = really(guard)
        for target in (target for state in deltas for target in state.touched):
            target.delta[0] = float("nan")
            target.write()
        return snapshot

    class Kept(Deltas):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            deltas.append(self)

    monkeypatch.setattr(Guard, "look", spoil)
    monkeypatch.setattr(preparing, "Deltas", Kept)
    settings = RepairSettings(recipe="paper", keep="last", max_steps=1, eval_images=1, workers=0)
    with pytest.raises(BadInputError, match="not finite") as caught:
        api.repair(RepairRequest(ModelRequest("dinov2_custom", small), [str(photos)], settings), tmp_path / "run")
    assert caught.value.exit_code == 65
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "images.jsonl",
        "outliers.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "checkpoints",
    }


@pytest.fixture
def own(repair: tuple[str, ...], photos: Path, tmp_path: Path) -> tuple[str, ...]:
    """A longer run over photos of its own."""
    shutil.copytree(photos, tmp_path / "photos")
    return (*repair[:4], "--data", "photos", *repair[6:], "--max-steps", "36", "--out", "run")


def trained(photos: Path) -> list[Path]:
    """The photos that are not on the guard of two; all of them have the defect."""
    paths = sorted(photos.iterdir())
    held = guarded([(2,)] * len(paths), 2)
    return [path for index, path in enumerate(paths) if index not in held]


@pytest.mark.parametrize("damage", [Path.unlink, Path.touch, lambda path: path.write_bytes(b"rotten")])
def test_one_image_in_a_hundred_damaged_midway_is_skipped(
    damage: Callable[[Path], None], warm: Server, own: tuple[str, ...], tmp_path: Path
) -> None:
    for number in range(94):
        os.link(tmp_path / "photos" / "rocket.png", tmp_path / "photos" / f"z{number}.png")
    seen_late = trained(tmp_path / "photos")[next(islice(shuffled(98, 0), 30, None))]
    whole = seen_late.read_bytes()
    seen_late.unlink()
    seen_late.write_bytes(whole)
    running = warm.start(*own, cwd=tmp_path)
    until(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), running)
    damage(seen_late)
    ended = running.wait()
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count(f"sinder: warning: skipped photos/{seen_late.name}: the file has changed since") == 1
    assert json.loads(ended.stdout)["skipped_images"] == 1


def test_strict_saves_and_ends_a_run_that_loses_an_image(warm: Server, own: tuple[str, ...], tmp_path: Path) -> None:
    running = warm.start(*own, "--strict", cwd=tmp_path)
    until(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), running)
    gone = trained(tmp_path / "photos")[-1]
    gone.unlink()
    ended = running.wait()
    assert ended.returncode == 65, ended.stderr
    assert f"1 of 6 cannot be read, among them photos/{gone.name}" in ended.stderr.splitlines()[-1]
    assert len(steps_of(tmp_path / "run")) == 1


def test_strict_refuses_an_image_that_is_broken_from_the_beginning(
    warm: Server, own: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "photos" / "coffee.png").write_bytes(b"rotten")
    ended = warm.run(*own, "--strict", "--eval-images", "6", cwd=tmp_path)
    assert ended.returncode == 65, ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_resumes_once_its_images_are_back(warm: Server, own: tuple[str, ...], tmp_path: Path) -> None:
    running = warm.start(*own, cwd=tmp_path)
    until(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), running)
    (tmp_path / "photos").rename(tmp_path / "away")
    ended = running.wait()
    assert ended.returncode == 65, ended.stderr
    assert "1 of 6 cannot be read" in ended.stderr.splitlines()[-1]
    assert len(steps_of(tmp_path / "run")) == 1
    (tmp_path / "away").rename(tmp_path / "photos")
    resumed = warm.run(*own, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_images"] == 0


def test_a_group_of_processes_told_to_end_saves_its_run(
    repair: tuple[str, ...],
    environment: dict[str, str],
    uninterrupted: Path,
    warm: Server,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "sinder_cli", *repair, "--workers", "2", "--out", run]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        while not (run / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, errors
    assert len(steps_of(run)) == 1
    resumed = warm.run(*repair, "--out", run, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert finished(run) == finished(uninterrupted)


def test_a_run_goes_on_after_memory_has_run_out(
    stopped: Path,
    repair: tuple[str, ...],
    resume: Callable[..., Ended],
    environment: dict[str, str],
    uninterrupted: Path,
) -> None:
    """The process limits its address space during a step, to what it has and little more; it decodes in another."""
    program = """
import resource, sys
import torch
from sinder_cli.cli.main import main
from sinder_cli.repairing import loop

def limited(*arguments):
    has = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + (1 << 20), resource.RLIM_INFINITY))
    try:
        kept = []
        while True:
            kept.append(torch.empty(1 << 22))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

loop.step_gradient = limited
main(sys.argv[1:])
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, *repair, "--workers", "1", "--out", stopped, "--resume"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 75, ended.stderr
    said = "sinder: error: out of memory: at 168 × 168 pixels, batch size 1 and a window of 10 blocks; --resume when"
    assert ended.stderr.splitlines()[-1].startswith(said)
    assert resume().returncode == 0
    assert finished(stopped) == finished(uninterrupted)


def test_a_run_goes_on_after_a_decoding_process_has_died(
    warm: Server, repair: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    running = warm.start(*repair, "--workers", "1", "--out", "run", cwd=tmp_path)
    until(lambda: (run / "metrics.jsonl").exists(), running)
    for process in psutil.Process(running.pid).children():
        process.kill()
    ended = running.wait()
    assert ended.returncode == 75, ended.stderr
    assert "a process that decodes images died" in ended.stderr.splitlines()[-1]
    assert len(steps_of(run)) == 1
    resumed = warm.run(*repair, "--out", "run", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert finished(run) == finished(uninterrupted)


def test_looks_at_the_guard_are_the_same_after_a_kill(warm: Server, repair: tuple[str, ...], tmp_path: Path) -> None:
    looking = (*repair, "--eval-every", "3", *CHECKPOINTS)
    assert warm.run(*looking, "--out", "whole", cwd=tmp_path).returncode == 0
    running = warm.start(*looking, "--out", "killed", cwd=tmp_path)
    until(lambda: (tmp_path / "killed" / "checkpoints" / "step-000006").exists(), running)
    running.send(signal.SIGKILL)
    running.wait()
    assert warm.run(*looking, "--resume", "--out", "killed", cwd=tmp_path).returncode == 0
    whole, killed = ((tmp_path / name / "evaluations.jsonl").read_text() for name in ("whole", "killed"))
    assert killed == whole
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [3, 6, 9, 12]
    assert finished(tmp_path / "killed") == finished(tmp_path / "whole")


def test_a_dry_run_tells_its_training_and_leaves_nothing(warm: Server, repair: tuple[str, ...], tmp_path: Path) -> None:
    ended = warm.run(*repair, "--dry-run", "--out", "run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["model"] == "dinov2_custom"
    assert told["weights"] == 4 * len(told["blocks"])
    assert told["max_steps"] == STEPS
    assert told["first"]["defective"] == 1
    assert told["all_bytes"] >= told["step_bytes"] > 2**27
    assert list(tmp_path.iterdir()) == []
    table = warm.run(*repair, "--dry-run", "--out", "run", "--format", "table", cwd=tmp_path)
    assert "Nothing was written." in table.stdout
    assert max(map(len, table.stdout.splitlines())) <= 80


def test_a_dry_run_touches_no_run_that_is_there(warm: Server, stopped: Path, repair: tuple[str, ...]) -> None:
    def state() -> list[tuple[str, int]]:
        files = (path for path in stopped.rglob("*") if path.is_file() and ".part" not in str(path))
        return sorted((str(path), path.stat().st_mtime_ns) for path in files)

    before = state()
    assert warm.run(*repair, "--dry-run", "--out", str(stopped), cwd=stopped.parent).returncode == 73
    assert warm.run(*repair, "--dry-run", "--force", "--out", str(stopped), cwd=stopped.parent).returncode == 0
    ended = warm.run(*repair, "--dry-run", "--resume", "--out", str(stopped), cwd=stopped.parent)
    assert ended.returncode == 2
    assert "cannot combine --resume with --dry-run" in ended.stderr
    assert state() == before


def test_a_run_that_diverges_keeps_the_last_good_state(small: Path, photos: Path, tmp_path: Path) -> None:
    given = {
        "recipe": "paper",
        "keep": "last",
        "max_steps": 40,
        "stop_clean_fraction": 1.0,
        "eval_images": 2,
        "workers": 0,
    }
    settings = RepairSettings.model_validate(given | {"checkpoint_every": "1"})
    too_fast = settings.model_copy(update={"lr": 1e38})  # more than a user may ask for
    with pytest.raises(DivergedError, match="; start anew with a lower --trust, or --lr, and --force"):
        api.repair(RepairRequest(ModelRequest("dinov2_custom", small), [str(photos)], too_fast), tmp_path / "run")
    assert not {"model.safetensors", "summary.json"} & {path.name for path in (tmp_path / "run").iterdir()}
    assert steps_of(tmp_path / "run") == []  # nothing but the beginning was good
