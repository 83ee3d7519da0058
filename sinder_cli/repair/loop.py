"""The loop of a repair: batches in seeded order, one step each, until the images are clean or the steps are used up."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sinder_cli.backbone.describe import Backbone
from sinder_cli.errors import BadInputError
from sinder_cli.events import Emit, Warned, silent
from sinder_cli.images.loading import LoadedImage, load_in_order, readable, require_some, shuffled
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.processes import worker_count
from sinder_cli.images.sources import ImageSource
from sinder_cli.repair.deltas import Deltas
from sinder_cli.repair.settings import RepairSettings
from sinder_cli.repair.step import Directions, step_gradient

DENSITY_IMAGES = 1000  # the share of clean images is taken over so many, or over two passes if those are fewer
MAX_NONFINITE = 10  # steps in a row with a NaN or infinity before the run ends


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
    seconds: float  # since the run began
    skipped: bool = False  # for a NaN or infinity


@dataclass
class Progress:
    """What the loop has seen: it decides when to stop."""

    window: int
    recent: deque[bool] = field(init=False)
    steps: int = 0
    images: int = 0
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recent = deque(maxlen=self.window)

    @property
    def density(self) -> float:
        """Clean images among the last `window`; images not seen yet count as defective."""
        return sum(self.recent) / self.window


def repair_steps(
    backbone: Backbone,
    directions: Directions,
    deltas: Deltas,
    source: ImageSource,
    preprocess: Preprocessing,
    settings: RepairSettings,
    progress: Progress,
    emit: Emit = silent,
) -> Iterator[StepRecord]:
    """Repair `deltas.module` in place, yielding a record a step; ends at `max_steps` or at the stop density.

    Raises `BadInputError` when no image can be decoded, or after ten steps in a row without a finite gradient.
    """
    began = time.monotonic()
    device = directions.nu.device
    batches = _batches(source, preprocess, settings, progress, emit)
    for step in range(1, settings.max_steps + 1):
        images = next(batches).to(device)
        gradient = step_gradient(backbone, deltas.module, directions, deltas, images, settings)
        finite = gradient.finite
        if finite:
            deltas.descend(gradient.gradients, settings.lr, settings.momentum)
        _count_nonfinite(progress, finite, step, emit)
        defective = len(gradient.losses)
        progress.steps = step
        progress.images += len(images)
        progress.recent.extend([False] * defective + [True] * (len(images) - defective))
        yield StepRecord(
            step=step,
            images=progress.images,
            defective=defective,
            block=gradient.first_block,
            masked_tokens=gradient.masked_tokens,
            loss=sum(gradient.losses) / defective if defective and finite else None,
            density=progress.density,
            seconds=round(time.monotonic() - began, 3),
            skipped=not finite,
        )
        if progress.density >= settings.stop_density:
            return


def density_window(images: int) -> int:
    """Over how many images the share of clean ones is taken: 1000, or two passes over fewer than 500."""
    return min(DENSITY_IMAGES, 2 * images)


def _count_nonfinite(progress: Progress, finite: bool, step: int, emit: Emit) -> None:
    progress.nonfinite += not finite
    progress.nonfinite_in_a_row = 0 if finite else progress.nonfinite_in_a_row + 1
    if not finite:
        emit(Warned(f"step {step} skipped: its loss or gradient is not finite"))
    if progress.nonfinite_in_a_row >= MAX_NONFINITE:
        raise BadInputError(
            "the repair has diverged", f"{MAX_NONFINITE} steps in a row had no finite gradient", "lower --lr"
        )


def _batches(
    source: ImageSource, preprocess: Preprocessing, settings: RepairSettings, progress: Progress, emit: Emit
) -> Iterator[Tensor]:
    """Endless batches `[B, 3, H, W]` of readable images; an unreadable one is named once and passed over.

    Raises `BadInputError` once every image of the source has turned out to be unreadable.
    """
    batch: list[Tensor] = []
    order = shuffled(len(source), settings.seed)
    loaded = load_in_order(source, preprocess, order, worker_count(settings.workers))
    for _, pixels in readable(_until_all_failed(loaded, source, progress), progress.unreadable, emit):
        batch.append(pixels)
        if len(batch) == settings.batch_size:
            yield torch.stack(batch)
            batch = []


def _until_all_failed(loaded: Iterator[LoadedImage], source: ImageSource, progress: Progress) -> Iterator[LoadedImage]:
    for image in loaded:
        require_some(len(source) - len(progress.unreadable), len(progress.unreadable))
        yield image
