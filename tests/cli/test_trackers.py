"""`--log`: the steps of a repair in an experiment tracker as well."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sinder_cli.errors import UnavailableError
from sinder_cli.events import Noted, Warned
from sinder_cli.repairing.guard import Evaluation
from sinder_cli.repairing.loop import StepRecord
from sinder_cli.repairing.settings import WITHOUT_EFFECT, RepairSettings
from sinder_cli.repairing.trackers import logged, logged_values


def record(step: int, loss: float | None = 0.5) -> StepRecord:
    block = None if loss is None else 4
    return StepRecord(
        step=step,
        images=step,
        defective=1,
        block=block,
        masked_tokens=3,
        loss=loss,
        moved=None,
        length=None,
        gain=None,
        clean_fraction=0.25,
        seconds=1.0,
    )


def write(folder: Path, name: str, *steps: StepRecord | Evaluation) -> list[object]:
    """Log these steps as one process would, and return what the display heard."""
    heard: list[object] = []
    with logged(RepairSettings.model_validate({"log": [name]}), folder, heard.append) as emit:
        for event in (Noted("first"), *steps):
            emit(event)
    return heard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder: (step, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder))
    shown.Reload()
    return {name: [(each.step, each.value) for each in shown.Scalars(name)] for name in shown.Tags()["scalars"]}


class Wandb(SimpleNamespace):
    """What of wandb is used, in memory."""

    def __init__(self) -> None:
        super().__init__(runs=[], Settings=lambda **given: given)

    def init(self, **given: Any) -> Any:
        run = SimpleNamespace(given=given, lines=[], finished=False)
        run.log = lambda values, step: run.lines.append((step, values))
        run.finish = lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_clean_step_has_no_loss_and_no_block() -> None:
    clean_fraction = {"repair/clean_fraction": 0.25, "repair/masked_tokens": 3}
    assert logged_values(record(3)) == {"repair/loss": 0.5, "repair/block": 4} | clean_fraction
    assert logged_values(record(3, loss=None)) == clean_fraction


def test_looks_at_the_guard_are_logged_in_their_own_group(tmp_path: Path) -> None:
    look = Evaluation(2, 12, 0.5, cls=0.75, good=0.875, good_p01=0.5, marked=0.25, holds=True, spoilt=False, best=True)
    write(tmp_path, "tensorboard", record(1), record(2), look)
    shown = scalars(tmp_path / "tensorboard")
    assert shown["guard/outlying"] == [(2, 12)]
    assert shown["guard/cls"] == [(2, 0.75)]
    assert "guard/cls" not in logged_values(replace(look, cls=None))


def test_without_a_log_events_pass_and_nothing_is_written(tmp_path: Path) -> None:
    heard: list[object] = []
    with logged(RepairSettings(), tmp_path, heard.append) as emit:
        emit(record(1))
    assert heard == [record(1)]
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_the_steps_under_their_numbers(tmp_path: Path) -> None:
    heard = write(tmp_path, "tensorboard", record(1), record(2, loss=None), record(3, loss=0.25))
    assert len(heard) == 4
    shown = scalars(tmp_path / "tensorboard")
    assert shown["repair/loss"] == [(1, 0.5), (3, 0.25)]
    assert shown["repair/block"] == [(1, 4.0), (3, 4.0)]
    assert shown["repair/clean_fraction"] == [(1, 0.25), (2, 0.25), (3, 0.25)]
    assert shown["repair/masked_tokens"] == [(1, 3.0), (2, 3.0), (3, 3.0)]


def test_a_resumed_run_counts_repeated_steps_once_in_its_log(tmp_path: Path) -> None:
    write(tmp_path, "tensorboard", record(1), record(2), record(3, loss=9.0))
    write(tmp_path, "tensorboard", record(3), record(4))
    assert scalars(tmp_path / "tensorboard")["repair/loss"] == [(step, 0.5) for step in (1, 2, 3, 4)]


def test_a_run_begun_anew_leaves_nothing_of_the_old_log(tmp_path: Path) -> None:
    write(tmp_path, "tensorboard", record(1, loss=9.0), record(2, loss=9.0))
    write(tmp_path, "tensorboard", record(1))
    assert scalars(tmp_path / "tensorboard")["repair/loss"] == [(1, 0.5)]


def test_wandb_gets_the_steps_and_the_settings(tmp_path: Path, wandb: Wandb) -> None:
    write(tmp_path, "wandb", record(1), record(2, loss=None))
    (run,) = wandb.runs
    assert run.lines[0] == (1, logged_values(record(1)))
    assert run.lines[1] == (2, {"repair/clean_fraction": 0.25, "repair/masked_tokens": 3})
    assert run.finished
    assert run.given["config"]["lr"] == 0.005
    assert run.given["dir"] == str(tmp_path)
    assert run.given["settings"] == {"console": "off"}


def test_wandb_goes_on_only_with_a_resumed_run(tmp_path: Path, wandb: Wandb) -> None:
    for first in (1, 2, 1):
        write(tmp_path, "wandb", record(first))
    begun, resumed, anew = (run.given["id"] for run in wandb.runs)
    assert begun == resumed != anew
    assert all(run.given["resume"] == "allow" for run in wandb.runs)


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_log_without_its_library_is_refused_before_any_step(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnavailableError, match=f"cannot log to {name}") as caught:
        write(tmp_path, name)
    assert caught.value.exit_code == 69
    assert f"pip install 'sinder-cli[{name}]'" in str(caught.value)


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_failing_log_is_told_once_and_ends_no_repair(fails: str, tmp_path: Path, wandb: Wandb) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ConnectionError("the server is gone")

    begin = wandb.init

    def init(**given: Any) -> Any:
        run = begin(**given)
        setattr(run, fails, failing)
        return run

    wandb.init = failing if fails == "init" else init
    heard = write(tmp_path, "wandb", record(1), record(2), record(3))
    warned = [event.text for event in heard if isinstance(event, Warned)]
    said = "logging to wandb has failed and stops (ConnectionError: the server is gone)"
    assert [text.startswith(said) for text in warned] == [True]
    assert [event for event in heard if isinstance(event, StepRecord)] == [record(1), record(2), record(3)]


def test_only_the_process_that_writes_logs(tmp_path: Path, wandb: Wandb) -> None:
    with logged(RepairSettings(log=("wandb",)), tmp_path, lambda _: None, writes=False) as emit:
        emit(record(1))
    assert wandb.runs == []


def test_a_log_is_without_effect_on_results() -> None:
    assert "log" in WITHOUT_EFFECT


@pytest.mark.slow
def test_a_repair_logs_to_tensorboard_in_its_run_directory(sinder: Any, tmp_path: Path) -> None:
    options = ("--max-steps", "2", "--eval-images", "1", "--log", "tensorboard", "--out", tmp_path / "run")
    run = sinder("repair", "demo_vit", *options)
    assert run.returncode == 1, run.stderr  # after two steps: not improved
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shown = scalars(tmp_path / "run" / "tensorboard")["repair/loss"]
    assert [value for _, value in shown] == pytest.approx(losses)
