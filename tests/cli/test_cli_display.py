"""Progress lines where there is no terminal."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.progress import Progress

from sinder_cli import escaping
from sinder_cli.events import Advanced, Started, Warned
from sinder_cli.repairing.loop import StepRecord
from sinder_cli.report import progress as display


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as a list of one number."""
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def step(number: int) -> StepRecord:
    return StepRecord(
        step=number,
        images=number,
        defective=0,
        block=None,
        masked_tokens=0,
        loss=None,
        moved=None,
        length=None,
        gain=None,
        clean_fraction=0.0,
        seconds=0.0,
    )


def test_the_rate_counts_steps_of_this_process_alone_and_no_time_left_is_made_up(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = display._Lines()
    lines.hear(Started("repairing", 1000, "steps", done=900))
    clock[0] += 10
    lines.hear(step(920))
    assert capsys.readouterr().err.startswith("sinder: repairing: 920/1000 steps, 2/s, no defect")


def test_without_a_run_that_went_before_all_steps_count(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    lines = display._Lines()
    lines.hear(Started("reading", 100, "images"))
    clock[0] += 10
    lines.hear(Advanced("reading", 20))
    assert capsys.readouterr().err == "sinder: reading: 20/100 images, 2/s, 0:40 left\n"


def test_the_bar_of_a_resumed_run_begins_where_it_was() -> None:
    with Progress(console=Console(quiet=True)) as progress:
        bars = display._Bars(progress)
        bars.hear(Started("repairing", 1000, "steps", done=900))
        (task,) = progress.tasks
        assert task.completed == 900
        bars.hear(step(920))
        assert task.completed == 920
        assert sum(sample.completed for sample in task._progress) == 20


def test_a_listener_that_has_gone_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    escaping.say("nobody hears this")


def test_names_in_messages_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    display._Lines().hear(Warned("skipped a\nb\x1b[31m.png: broken"))
    with Progress(console=Console()) as progress:
        display._Bars(progress).hear(Warned("skipped a\nb\x1b[31m.png: broken"))
    captured = capsys.readouterr()
    assert captured.err == "sinder: warning: skipped a\\nb\\x1b[31m.png: broken\n"
    assert captured.out.startswith(captured.err)
