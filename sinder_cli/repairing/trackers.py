"""Logging of repair steps to experiment trackers, which are extras: TensorBoard, or Weights & Biases."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sinder_cli.errors import UnavailableError
from sinder_cli.events import Emit, Event, Warned
from sinder_cli.files import write_text
from sinder_cli.repairing.settings import LogName, RepairSettings

if TYPE_CHECKING:
    from sinder_cli.repairing.guard import Evaluation
    from sinder_cli.repairing.loop import StepRecord


STEP = (
    "loss",
    "clean_fraction",
    "masked_tokens",
    "block",
    "length",
    "gain",
)  # values logged for a step, if it has them
GUARD = ("outlying", "defective_share", "cls", "good", "good_p01", "marked")  # and for an evaluation of the guard
FLUSH_SECONDS = 10


class Log(Protocol):
    """Destination of the values of steps."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the values of one step."""

    def close(self) -> None:
        """Write the values that are still buffered."""


@contextmanager
def logged(settings: RepairSettings, folder: Path, emit: Emit, writes: bool = True) -> Iterator[Emit]:
    """Yield a listener that passes all events on to `emit`, and writes repair steps to the logs named in the settings.

    A log is opened at the first step, when the run directory exists; the log of a resumed run is continued. If a log
    fails, one warning names it and it gets no further steps; the repair continues. Of several processes, only the one
    with `writes` opens logs. Raises `UnavailableError` if the library of a log is missing.
    """
    names = dict.fromkeys(settings.log) if writes else ()
    steps = _Steps({name: _opener(name, folder, settings) for name in names}, emit)

    def hear(event: Event) -> None:
        emit(event)
        steps.hear(event)

    try:
        yield hear
    finally:
        steps.close()


@dataclass
class _Steps:
    openers: dict[LogName, Callable[[int], Log]]
    emit: Emit
    logs: dict[LogName, Log] = field(default_factory=dict)

    def hear(self, event: Event) -> None:
        from sinder_cli.repairing.guard import Evaluation
        from sinder_cli.repairing.loop import StepRecord

        if not isinstance(event, StepRecord | Evaluation):
            return
        for name in list(self.openers):
            with self._let_go_if_it_fails(name):
                self.logs[name] = self.openers.pop(name)(event.step)
        for name, log in list(self.logs.items()):
            with self._let_go_if_it_fails(name):
                log.write(event.step, logged_values(event))

    def close(self) -> None:
        for name, log in list(self.logs.items()):
            with self._let_go_if_it_fails(name):
                log.close()

    @contextmanager
    def _let_go_if_it_fails(self, name: LogName) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # from the tracker's own code, or its server
            self.logs.pop(name, None)
            why = f"{type(error).__name__}: {error}"
            self.emit(Warned(f"logging to {name} has failed and stops ({why}); metrics.jsonl has every step"))


def logged_values(event: StepRecord | Evaluation) -> dict[str, float]:
    """Return the values to log for a step or an evaluation of the guard; a clean step has no loss and no block."""
    from sinder_cli.repairing.loop import StepRecord

    group, names = ("repair", STEP) if isinstance(event, StepRecord) else ("guard", GUARD)
    values = {f"{group}/{name}": getattr(event, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _opener(name: LogName, folder: Path, settings: RepairSettings) -> Callable[[int], Log]:
    """Return a function from the first step to an open log. Raises `UnavailableError` if the library is missing."""
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            return lambda step: _TensorBoard(SummaryWriter, folder / "tensorboard", step)
        import wandb

        return lambda step: _Wandb(wandb, folder, step, settings)
    except ImportError as error:
        remedy = f"pip install 'sinder-cli[{name}]', or leave --log {name} out"
        raise UnavailableError(f"cannot log to {name}", str(error), remedy) from error


class _TensorBoard:
    """Event files in a folder; a run from step 1 removes old files, and repeated steps replace earlier ones."""

    def __init__(self, writer: Any, folder: Path, step: int) -> None:
        if step == 1:
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
        self.writer = writer(str(folder), purge_step=step, flush_secs=FLUSH_SECONDS)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """A run of Weights & Biases; its files, and its id from us, are in `wandb/` in the run directory."""

    def __init__(self, wandb: Any, folder: Path, step: int, settings: RepairSettings) -> None:
        identity = folder / "wandb" / "sinder-id"
        if step == 1 or not identity.is_file():
            identity.parent.mkdir(exist_ok=True)
            write_text(identity, uuid.uuid4().hex)
        self.run = wandb.init(
            project="sinder",
            name=folder.name,
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=settings.model_dump(mode="json"),
            settings=wandb.Settings(console="off"),  # wandb must not capture standard output
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()
