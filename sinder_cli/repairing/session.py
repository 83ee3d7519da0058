"""Steps that are not lost: checkpoints when they are due, when the run is asked to stop, and when it ends."""

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
    """Pass the steps on and `save` what `progress` stands for; the first signal waits for its step and for that.

    A signal to one rank stops all of them after the same step. Raises `Ended` then, and whatever ends the steps, with
    what they reached saved as well, unless they have diverged.
    """
    due = Due(settings, progress)
    asked = 0
    with stop.deferred():
        with closing(steps):
            while True:
                try:
                    asked = max(ranks.all_gather(stop.asked or 0))
                    record = None if asked else next(steps, None)
                except SinderError as error:  # between two steps: what was reached is whole
                    if stop.asked is not None:  # a signal to the whole group ends the processes that decode, too
                        break
                    if progress.steps and not isinstance(error, DivergedError):
                        save()
                    raise
                if record is None:
                    break
                yield record
                if due.now(progress):
                    save()
        if progress.steps:
            save()
    if asked := asked or stop.asked or 0:
        if progress.steps:
            emit(Noted(f"wrote a checkpoint after step {progress.steps}"))
        raise Ended(asked)


@contextmanager
def saved_if_it_fails(save: Callable[[], None]) -> Iterator[None]:
    """What is done between two steps, such as telling of them: where that fails, the steps are not lost."""
    try:
        yield
    except Exception:
        with suppress(SinderError):  # what went wrong first is told
            save()
        raise


def restored(checkpoints: Checkpoints, deltas: Deltas, progress: Progress, emit: Emit, ranks: Ranks = ALONE) -> bool:
    """Go on from the newest whole checkpoint, if there is one; rank 0 finds it, and the others read the same.

    Raises `ConflictError` where the others see none, or another.
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
    """Whether the next checkpoint is due, by steps or by minutes since the last."""

    def __init__(self, settings: RepairSettings, progress: Progress) -> None:
        self.number, self.unit = settings.checkpoint_unit
        self._begin(progress)

    def now(self, progress: Progress) -> bool:
        """Whether it is due; if so, the count starts anew."""
        passed = progress.steps - self.step if self.unit == "steps" else (time.monotonic() - self.time) / 60
        if passed < self.number:
            return False
        self._begin(progress)
        return True

    def _begin(self, progress: Progress) -> None:
        self.step, self.time = progress.steps, time.monotonic()
