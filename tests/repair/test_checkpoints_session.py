"""When the steps of a run are saved, and what a signal does to them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from sinder_cli.errors import BadInputError, StorageError, TryAgainError
from sinder_cli.repairing import session
from sinder_cli.repairing.loop import DivergedError, Progress, StepRecord
from sinder_cli.repairing.session import checkpointed, saved_if_it_fails
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.signals import Ended, Stop


class Steps:
    """Steps that do nothing, of which one may fail before it is done; and what was saved of them."""

    def __init__(self, count: int, every: str = "10min", fails_at: int = 0, error: Exception | None = None) -> None:
        self.count, self.fails_at, self.error = count, fails_at, error
        self.progress = Progress(10)
        self.settings = RepairSettings(checkpoint_every=every)
        self.saved: list[int] = []
        self.told: list[object] = []
        self.closed = False

    def run(self) -> Iterator[StepRecord]:
        try:
            while self.progress.steps < self.count:
                if self.progress.steps + 1 == self.fails_at and self.error:
                    raise self.error
                self.progress.steps += 1
                yield StepRecord(self.progress.steps, 0, 0, None, 0, None, None, None, None, 0.0, 0.0)
        finally:
            self.closed = True

    def save(self) -> None:
        self.saved.append(self.progress.steps)

    def records(self, stop: Stop | None = None) -> Any:
        return checkpointed(self.run(), self.save, self.progress, self.settings, stop or Stop(), self.told.append)


def test_steps_are_saved_every_so_many_and_at_the_end() -> None:
    steps = Steps(7, every="3")
    assert [record.step for record in steps.records()] == list(range(1, 8))
    assert steps.saved == [3, 6, 7]


def test_steps_are_saved_every_so_many_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(9, every="2min")
    monkeypatch.setattr(session.time, "monotonic", lambda: steps.progress.steps * 50.0)
    assert len(list(steps.records())) == 9
    assert steps.saved == [3, 6, 9, 9]


def test_the_count_begins_where_a_run_goes_on() -> None:
    steps = Steps(9, every="3")
    steps.progress.steps = 4
    assert len(list(steps.records())) == 5
    assert steps.saved == [7, 9]


def test_a_run_without_a_step_saves_nothing() -> None:
    steps = Steps(0)
    assert list(steps.records()) == []
    assert steps.saved == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_a_checkpoint(number: signal.Signals) -> None:
    steps, stop = Steps(9), Stop()
    records = steps.records(stop)
    next(records)
    next(records)
    stop.hear(number)
    assert steps.saved == []
    with pytest.raises(Ended) as caught:
        next(records)
    assert caught.value.number == number
    assert steps.saved == [2]
    assert steps.closed
    assert "after step 2" in str(steps.told)


def test_a_signal_during_a_step_waits_for_its_end() -> None:
    stop = Stop()

    class Heard(Steps):
        def run(self) -> Iterator[StepRecord]:
            for record in super().run():
                stop.hear(signal.SIGTERM)
                yield record

    steps = Heard(9)
    records = steps.records(stop)
    assert next(records).step == 1
    with pytest.raises(Ended):
        next(records)
    assert steps.saved == [1]


@pytest.mark.parametrize(("once", "then"), [(False, "; a second signal ends at once"), (True, "")])
def test_the_first_signal_is_answered_before_its_step_is_done(once: bool, then: str) -> None:
    said: list[str] = []
    steps, stop = Steps(9), Stop(once, said.append)
    records = steps.records(stop)
    next(records)
    stop.hear(signal.SIGINT)
    assert said == [f"stopping after this step, with a checkpoint{then}"]
    if once:
        stop.hear(signal.SIGINT)
    assert len(said) == 1
    records.close()


def test_the_second_signal_ends_at_once() -> None:
    steps, stop = Steps(9), Stop()
    records = steps.records(stop)
    next(records)
    stop.hear(signal.SIGINT)
    with pytest.raises(Ended):
        stop.hear(signal.SIGINT)
    records.close()
    assert steps.saved == []
    assert steps.closed


def test_the_last_checkpoint_is_finished_before_a_signal_counts() -> None:
    stop = Stop()

    class Heard(Steps):
        def save(self) -> None:
            stop.hear(signal.SIGTERM)
            super().save()

    steps = Heard(3)
    with pytest.raises(Ended):
        list(steps.records(stop))
    assert steps.saved == [3]


def test_before_and_after_the_steps_a_signal_ends_at_once() -> None:
    stop = Stop()
    with pytest.raises(Ended):
        stop.hear(signal.SIGTERM)
    list(Steps(2).records(stop))
    with pytest.raises(Ended):
        stop.hear(signal.SIGTERM)


def test_steps_that_have_diverged_are_not_saved() -> None:
    steps = Steps(9, every="2", fails_at=4, error=DivergedError("a", "b"))
    with pytest.raises(DivergedError):
        list(steps.records())
    assert steps.saved == [2]


@pytest.mark.parametrize("second", [None, StorageError("full", "too")])
def test_steps_are_saved_where_what_is_done_with_them_fails(second: StorageError | None) -> None:
    saved = []

    def save() -> None:
        saved.append(1)
        if second:
            raise second

    with pytest.raises(ZeroDivisionError), saved_if_it_fails(save):
        raise ZeroDivisionError
    with pytest.raises(Ended), saved_if_it_fails(save):
        raise Ended(signal.SIGINT)  # the second signal: at once
    assert saved == [1]


@pytest.mark.parametrize("error", [BadInputError("a", "b"), TryAgainError("a", "b")])
def test_what_was_reached_before_a_failure_is_saved(error: Exception) -> None:
    steps = Steps(9, fails_at=4, error=error)
    with pytest.raises(type(error)):
        list(steps.records())
    assert steps.saved == [3]


def test_a_bug_saves_nothing_of_a_half_done_step() -> None:
    steps = Steps(9, fails_at=4, error=ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        list(steps.records())
    assert steps.saved == []


def test_a_failure_of_the_first_step_saves_nothing() -> None:
    steps = Steps(9, fails_at=1, error=TryAgainError("a", "b"))
    with pytest.raises(TryAgainError):
        list(steps.records())
    assert steps.saved == []


def test_a_failure_that_a_signal_has_caused_is_the_signals() -> None:
    steps, stop = Steps(9, fails_at=2, error=TryAgainError("a process died", "it was told to end")), Stop()

    class Killed(Steps):
        def run(self) -> Iterator[StepRecord]:
            yield next(iter(super().run()))
            stop.hear(signal.SIGTERM)  # during the second step
            raise TryAgainError("a process died", "it was told to end")

    steps = Killed(9)
    with pytest.raises(Ended):
        list(steps.records(stop))
    assert steps.saved == [1]


def test_a_checkpoint_that_cannot_be_written_is_not_tried_again() -> None:
    class Full(Steps):
        def save(self) -> None:
            super().save()
            raise StorageError("cannot write", "the disk is full")

    steps = Full(9, every="2")
    with pytest.raises(StorageError):
        list(steps.records())
    assert steps.saved == [2]
    assert steps.closed
