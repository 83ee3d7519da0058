"""The loop of a repair: batches in seeded order, one step each, until the images are clean or the steps are used up."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field

from sinder_cli.backbone.describe import Backbone
from sinder_cli.errors import BadInputError
from sinder_cli.events import Emit, Warned, silent
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.sources import ImageSource
from sinder_cli.memory import told_when_it_runs_out
from sinder_cli.ranks import ALONE, Ranks
from sinder_cli.repair.batches import require_readable, step_batches
from sinder_cli.repair.deltas import Deltas
from sinder_cli.repair.forward import Directions
from sinder_cli.repair.settings import RepairSettings
from sinder_cli.repair.shared import gathered
from sinder_cli.repair.step import StepGradient, step_gradient

DENSITY_IMAGES = 1000  # the share of clean images is taken over so many, or over two passes if those are fewer
NOTHING = StepGradient((), {}, None, 0)
MAX_NONFINITE = 10  # steps in a row with a NaN or infinity before the run ends
ANEW = "start anew with a lower --lr and --force"


class DivergedError(BadInputError):
    """The repair has come to numbers that are not finite; what led there is not worth keeping."""


@dataclass(frozen=True)
class StepRecord:
    """One line of `metrics.jsonl`."""

    step: int
    images: int  # seen so far
    defective: int  # images of this step that had a defect
    block: int | None  # the first defective block of the step
    masked_tokens: int
    loss: float | None  # mean over the defective images
    density: float  # share of recent images without a defect
    seconds: float  # since the run began, pauses between two processes left out
    skipped: bool = False  # for a NaN or infinity


@dataclass
class Progress:
    """What the loop has seen: it decides when to stop, and with the deltas it is all that a run goes on from."""

    window: int
    recent: deque[bool] = field(init=False)
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    proven: int = 0  # the last step of whose deltas it is known that they give finite losses and gradients
    unreadable: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recent = deque(maxlen=self.window)

    @property
    def density(self) -> float:
        """Clean images among the last `window`; images not seen yet count as defective."""
        return sum(self.recent) / self.window

    def finished(self, settings: RepairSettings) -> bool:
        """Whether no step is left to do."""
        return self.steps >= settings.max_steps or self.density >= settings.stop_density

    def count(self, images: int, defective: int, finite: bool) -> None:
        """One more step, on so many images."""
        if finite:
            self.proven = self.steps  # it is the deltas of the step before that this one has tried
        self.steps += 1
        self.images += images
        self.recent.extend([False] * defective + [True] * (images - defective))
        self.nonfinite += not finite
        self.nonfinite_in_a_row = 0 if finite else self.nonfinite_in_a_row + 1


def repair_steps(
    backbone: Backbone,
    directions: Directions,
    deltas: Deltas,
    source: ImageSource,
    preprocess: Preprocessing,
    settings: RepairSettings,
    progress: Progress,
    emit: Emit = silent,
    ranks: Ranks = ALONE,
) -> Generator[StepRecord, None, None]:
    """Repair `deltas.module` in place, yielding a record a step; goes on from `progress` until it is finished.

    Between two records, and after a `SinderError`, deltas and progress are those of a whole step.
    Raises `BadInputError` when too many images cannot be decoded, `DivergedError` after ten steps in a row without a
    finite gradient, and `TryAgainError` when memory runs out or a process that decodes dies.
    """
    began = time.monotonic() - progress.seconds
    batches = step_batches(source, preprocess, settings, progress.steps, progress.unreadable, emit, ranks)
    while not progress.finished(settings):
        with told_when_it_runs_out(*size_of_step(preprocess, settings)):
            images = next(batches)
            local = NOTHING
            if len(images):  # none where no image of the batch could be decoded
                on_device = images.to(directions.nu.device)
                local = step_gradient(backbone, deltas.module, directions, deltas, on_device, settings)
            step = gathered(local, len(images), progress.unreadable, deltas, ranks, emit)
            require_readable(source, progress.unreadable, settings.strict)
            finite = step.gradient.finite
            if finite:
                deltas.descend(step.gradient.gradients, settings.lr, settings.momentum)
        defective = len(step.gradient.losses)
        progress.count(step.images, defective, finite)
        progress.seconds = time.monotonic() - began
        if not finite:
            emit(Warned(f"step {progress.steps} skipped: its loss or gradient is not finite"))
        yield StepRecord(
            step=progress.steps,
            images=progress.images,
            defective=defective,
            block=step.gradient.first_block,
            masked_tokens=step.gradient.masked_tokens,
            loss=sum(step.gradient.losses) / defective if defective and finite else None,
            density=progress.density,
            seconds=round(progress.seconds, 3),
            skipped=not finite,
        )
        if progress.nonfinite_in_a_row >= MAX_NONFINITE:
            why = f"{progress.nonfinite_in_a_row} steps in a row had no finite gradient"
            raise DivergedError("the repair has diverged", why, ANEW)


def density_window(images: int) -> int:
    """Over how many images the share of clean ones is taken: 1000, or two passes over fewer than 500."""
    return min(DENSITY_IMAGES, 2 * images)


def size_of_step(preprocess: Preprocessing, settings: RepairSettings) -> tuple[str, str]:
    """What a step's memory grows with, and what to do where it is too much."""
    size = preprocess.size
    why = f"at {size} × {size} pixels, batch size {settings.batch_size} and a window of {settings.window} blocks"
    return why, "--resume when more is free, or start anew with a lower --image-size, --batch-size or --window"
