"""Checkpoints, so that no steps are lost: when one is due, when the run is asked to stop, and when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress

from sinder_cli.distributed import ALONE, Ranks
from sinder_cli.errors import ConflictError, SinderError
from sinder_cli.events import Emit, Noted
from sinder_cli.repairing.checkpoints import Checkpoints
from sinder_cli.repairing.deltas import Deltas
from sinder_cli.repairing.loop import DivergedError, Progress, StepRecord
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.signals import Ended, Stop


def checkpointed(
    steps: Generator[StepRecord, None, None],
    save: Callable[[], None],
    progress: Progress,
    settings: RepairSettings,
    stop: Stop,
    emit: Emit,
    ranks: Ranks = ALONE,
) -> Generator[StepRecord, None, None]:
    """Yield the steps and call `save` when a checkpoint is due; a first signal waits for its step and its checkpoint.

    A signal to one rank stops all of them after the same step. Raises `Ended` then. A `SinderError` of the steps is
    raised again; what they had reached is saved before, unless they have diverged.
    """
    with stop.deferred():
        asked = yield from _steps_with_saves(steps, save, progress, settings, stop, ranks)
        if progress.steps:
            save()
    if asked := asked or stop.asked or 0:
        if progress.steps:
            emit(Noted(f"wrote a checkpoint after step {progress.steps}"))
        raise Ended(asked)


def _steps_with_saves(
    steps: Generator[StepRecord, None, None],
    save: Callable[[], None],
    progress: Progress,
    settings: RepairSettings,
    stop: Stop,
    ranks: Ranks,
) -> Generator[StepRecord, None, int]:
    """Yield the steps until they end or a rank gets a signal, which is returned, else 0; save when it is due."""
    due = Due(settings, progress)
    with closing(steps):
        while True:
            try:
                asked = max(ranks.all_gather(stop.asked or 0))
                record = None if asked else next(steps, None)
            except SinderError as error:  # between two steps: the state is complete
                if stop.asked is not None:  # a signal to the process group ends the decoding processes, too
                    return stop.asked
                if progress.steps and not isinstance(error, DivergedError):
                    save()
                raise
            if record is None:
                return asked
            yield record
            if due.now(progress):
                save()


@contextmanager
def saved_if_it_fails(save: Callable[[], None]) -> Iterator[None]:
    """Call `save` if work between two steps, such as reporting them, fails, so that the steps are not lost."""
    try:
        yield
    except Exception:
        with suppress(SinderError):  # the first error is the one to report
            save()
        raise


def restored(checkpoints: Checkpoints, deltas: Deltas, progress: Progress, emit: Emit, ranks: Ranks = ALONE) -> bool:
    """Restore the newest intact checkpoint; return True if there is one. Rank 0 finds it, the others read the same.

    Raises `ConflictError` if the other ranks find none, or another one.
    """
    found = ranks.from_rank0(lambda: checkpoints.restore(deltas, progress, emit))
    if found and not ranks.writes:
        checkpoints.restore(deltas, progress, emit)
    if len(set(ranks.all_gather(progress.steps))) > 1:
        what = f"cannot resume {checkpoints.folder.parent}"
        raise ConflictError(what, "not all processes see the same checkpoint", "keep it on a disk that they share")
    deltas.agreed.update(deltas.by_block)
    return found


class Due:
    """The schedule of checkpoints, by steps or by minutes since the last one."""

    def __init__(self, settings: RepairSettings, progress: Progress) -> None:
        self.number, self.unit = settings.checkpoint_unit
        self._begin(progress)

    def now(self, progress: Progress) -> bool:
        """Return True if a checkpoint is due; if so, restart the count."""
        passed = progress.steps - self.step if self.unit == "steps" else (time.monotonic() - self.time) / 60
        if passed < self.number:
            return False
        self._begin(progress)
        return True

    def _begin(self, progress: Progress) -> None:
        self.step, self.time = progress.steps, time.monotonic()
