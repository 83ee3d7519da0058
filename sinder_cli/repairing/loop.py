"""The loop of a repair: batches in seeded order, one step each, until the images are clean or the steps are used up."""

from __future__ import annotations

import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sinder_cli.errors import BadInputError
from sinder_cli.events import Emit, Measured, Warned
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.sources import ImageSource, whole_of
from sinder_cli.memory import out_of_memory_reported
from sinder_cli.repairing.choosing import Batch, require_readable, step_batches
from sinder_cli.repairing.deltas import Deltas
from sinder_cli.repairing.forward import FIRST_ALONE, Interest
from sinder_cli.repairing.greedy import BlockObservation, Observations, polyak_deltas, scale_of
from sinder_cli.repairing.preparing import Prepared
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.repairing.shared import SharedStep, gathered
from sinder_cli.repairing.step import Probes, StepGradient, step_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.repairing.guard import Evaluation

Known = Callable[[str], "Tensor"]  # the name of an image → the tokens that the original marks, bool [blocks, h, w]

NOTHING = StepGradient()
CLEAN_LOOKS, SPOILT_LOOKS, IDLE_LOOKS = 3, 2, 10  # at the guard, in a row, that end a repair
EQUAL_FIDELITY = 0.001  # difference of cosines up to which two states count as equally good
MAX_NONFINITE = 10  # steps in a row with a NaN or infinity before the run ends
ANEW = "start anew with a lower --trust, or --lr, and --force"


class DivergedError(BadInputError):
    """The repair has produced numbers that are not finite; the steps that led to them are not worth keeping."""


@dataclass(frozen=True)
class StepRecord(Measured):
    """One line of `metrics.jsonl`."""

    step: int
    images: int  # seen so far
    defective: int  # images of this step that had a defect
    block: int | None  # the first defective block of the step
    masked_tokens: int
    loss: float | None  # mean over the defective images and their blocks
    moved: str | None  # the target in which a greedy step has shrunk a singular value
    length: float | None  # ‖Δδ‖: relative change of the singular values
    gain: float | None  # of a greedy step: the largest at its first defective block
    clean_fraction: float  # share of recent images without a defect that a step can reduce
    seconds: float  # since the run began, without the pauses between two processes
    skipped: bool = False  # because of a NaN or infinity


@dataclass(frozen=True)
class Best:
    """The best state that the guard has seen: its step, the numbers that it was judged by, and its ε, by target.

    Only ε that are not zero are kept. Each cosine is the highest of all best states with as few outlying tokens. Later
    states are compared with these, so that a series of states, each slightly worse than the last, cannot lead downhill.
    """

    step: int
    outlying: int
    cls: float | None
    good: float
    marked: float | None
    deltas: dict[str, Tensor]

    @classmethod
    def of(cls, look: Evaluation, deltas: dict[str, Tensor], before: Best | None) -> Best:
        """Return the new best state, that of `look`, given the best state before it."""
        if before is None or before.outlying != look.outlying:
            return cls(look.step, look.outlying, look.cls, look.good, look.marked, deltas)
        highest = [
            max((value for value in pair if value is not None), default=None)
            for pair in ((look.cls, before.cls), (look.marked, before.marked))
        ]
        return cls(look.step, look.outlying, highest[0], max(look.good, before.good), highest[1], deltas)

    def is_beaten_by(self, look: Evaluation) -> bool:
        """Return True if a later state has fewer outlying tokens, or as few and no lower fidelity."""
        if look.outlying != self.outlying:
            return look.outlying < self.outlying
        return all(now >= was - EQUAL_FIDELITY for now, was in self._pairs(look))

    def is_bettered_by(self, look: Evaluation) -> bool:
        """Return True if a later state has fewer outlying tokens, or a noticeably higher cosine."""
        fewer = look.outlying < self.outlying
        return fewer or any(now > was + EQUAL_FIDELITY for now, was in self._pairs(look))

    def _pairs(self, look: Evaluation) -> list[tuple[float, float]]:
        pairs = ((look.cls, self.cls), (look.good, self.good), (look.marked, self.marked))
        return [(now, was) for now, was in pairs if now is not None and was is not None]


@dataclass
class Progress:
    """The state of the loop: it decides when to stop, and together with the deltas it is all that resuming needs."""

    window: int
    recent: deque[bool] = field(init=False)
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    proven: int = 0  # the last step whose deltas are known to give finite losses and gradients
    unreadable: dict[str, str] = field(default_factory=dict)
    observed: Observations = field(default_factory=Observations)
    best: Best | None = None  # the best state that the guard has seen
    last_move: int = 0  # the last step that changed a delta
    last_look: int = 0  # the last step after which the guard was looked at
    clean_looks: int = 0  # in a row, without an outlying token
    spoilt_looks: int = 0  # in a row, in which good tokens were spoilt
    idle_looks: int = 0  # in a row, without a new best state
    stopped: str = ""  # why the guard has ended the repair; empty if it has not

    def __post_init__(self) -> None:
        self.recent = deque(maxlen=self.window)

    @property
    def clean_fraction(self) -> float:
        """Share of clean images among the last `window`; images not seen yet count as defective."""
        return sum(self.recent) / self.window

    def finished(self, settings: RepairSettings) -> bool:
        """Return True if no step is left to do."""
        return (
            bool(self.stopped)
            or self.steps >= settings.max_steps
            or self.clean_fraction >= settings.stop_clean_fraction
        )

    def judge(self, look: Evaluation, values: dict[str, Tensor], stops: bool = True) -> None:
        """Take an evaluation of the guard into account; keep the state, whose ε are `values`, if it is the best.

        If `stops`, end the repair after enough looks in a row that are spoilt, clean, or without a new best state.
        """
        self.last_look = look.step
        self.clean_looks = self.clean_looks + 1 if look.outlying == 0 else 0
        self.spoilt_looks = self.spoilt_looks + 1 if look.spoilt else 0
        better = look.best and (self.best is None or self.best.is_bettered_by(look))
        self.idle_looks = 0 if better else self.idle_looks + 1
        if look.best:
            self.best = Best.of(look, values, self.best)
        if not stops:
            return
        if self.spoilt_looks >= SPOILT_LOOKS:
            self.stopped = "fidelity"
        elif self.clean_looks >= CLEAN_LOOKS:
            self.stopped = "clean"
        elif self.idle_looks >= IDLE_LOOKS:
            self.stopped = "no_improvement"

    def count(self, images: int, defective: int, finite: bool) -> None:
        """Count one more step on `images` images, `defective` of which have a defect that a step can reduce."""
        if finite:
            self.proven = self.steps  # this step has tried the deltas of the step before
        self.steps += 1
        self.images += images
        self.recent.extend([False] * defective + [True] * (images - defective))
        self.nonfinite += not finite
        self.nonfinite_in_a_row = 0 if finite else self.nonfinite_in_a_row + 1


@dataclass(frozen=True)
class Move:
    """The result of a step: new deltas and new observations."""

    deltas: dict[str, Tensor]  # the new ε of the targets that change; sgd changes them by itself
    observed: dict[int, BlockObservation]
    moved: str | None = None
    gain: float | None = None
    helpless: int = 0  # images with a defect that no step can reduce
    length: float | None = None  # ‖Δδ‖
    finite: bool = True  # False if loss or gradient is not: nothing changes then


def repair_steps(
    prepared: Prepared, source: ImageSource, progress: Progress, known: Known | None = None
) -> Generator[StepRecord, None, None]:
    """Repair the module in place and yield a record per step, from `progress` on until it is finished.

    `source` holds the images to train on. `known` gives the tokens that the original marks in an image, by its name.
    Between two records, and after a `SinderError`, deltas and progress are those of a complete step.
    Raises `BadInputError` when too many images cannot be decoded, `DivergedError` after ten steps in a row without a
    finite gradient, and `TryAgainError` when memory runs out or a decoding process dies.
    """
    start, deltas, emit, ranks = prepared.start, prepared.deltas, prepared.emit, prepared.ranks
    settings, preprocess = start.settings, start.preprocess
    began = time.monotonic() - progress.seconds
    batches = step_batches(source, preprocess, settings, progress.steps, progress.unreadable, emit, ranks)
    while not progress.finished(settings):
        with out_of_memory_reported(*size_of_step(preprocess, settings)):
            batch = next(batches)
            # none where no image of the batch could be decoded
            local = _local(prepared, batch, progress, known) if len(batch.pixels) else NOTHING
            step = gathered(local, len(batch.pixels), progress.unreadable, deltas, settings.window, ranks, emit)
            require_readable(whole_of(source), progress.unreadable, settings.strict)
            move = _move(step.gradient, deltas, progress, len(source), settings)
            _make(move, step.gradient, deltas, progress, settings)
        yield _record(step, move, progress, settings, began, emit)
        if progress.nonfinite_in_a_row >= MAX_NONFINITE:
            why = f"{progress.nonfinite_in_a_row} steps in a row had no finite gradient"
            raise DivergedError("the repair has diverged", why, ANEW)


def _local(prepared: Prepared, batch: Batch, progress: Progress, known: Known | None) -> StepGradient:
    """Compute the gradient of this rank's part of a batch."""
    directions, deltas, settings = prepared.directions, prepared.deltas, prepared.start.settings
    device = directions.nu.device
    probes = None
    if settings.step == "greedy":
        seeds = [zlib.crc32(f"{settings.seed} {progress.steps} {place}".encode()) for place in batch.places]
        probes = Probes(seeds, {block: seen.probes for block, seen in progress.observed.by_block.items()})
    marks = None if known is None else torch.stack([known(name) for name in batch.names]).to(device)
    pixels = batch.pixels.to(device)

    def interest(block: int, excess: float) -> Interest:
        if settings.step != "greedy":
            return FIRST_ALONE
        blocks = range(max(0, block - settings.window + 1), block + 1)
        targets = deltas.of_window(block, settings.window) if deltas.by_block.keys() >= set(blocks) else None
        return progress.observed.interest(block, excess, targets, settings)

    return step_gradient(deltas, directions, pixels, settings, marks, probes, interest)


def _move(gradient: StepGradient, deltas: Deltas, progress: Progress, images: int, settings: RepairSettings) -> Move:
    """Compute the move of a step from its gradient; for sgd, which has a velocity, see `Deltas.descend`."""
    if not gradient.finite:
        return Move({}, {}, finite=False)
    if settings.step == "sgd" or not gradient.parts:
        return Move({}, {})
    if settings.step == "polyak":
        gradients = gradient.gradients
        targets = [target for target in deltas.touched if target.name in gradients]
        loss = sum(gradient.losses) / len(gradient.losses)
        changed = polyak_deltas(targets, gradients, loss, settings.trust)
        return Move(changed, {}, length=_length(deltas, changed))
    return _greedy_move(gradient, deltas, progress, images, settings)


def _greedy_move(
    gradient: StepGradient, deltas: Deltas, progress: Progress, images: int, settings: RepairSettings
) -> Move:
    """Compute the move of a greedy step: at most one shrinkage for each of its defective blocks."""
    changed: dict[str, Tensor] = {}
    observed: dict[int, BlockObservation] = {}
    moved, best, helpless = None, None, 0
    for part in gradient.parts:
        targets = deltas.of_window(part.block, settings.window)
        seen, shrinkage, gain = progress.observed.step(part, targets, images, settings)
        observed[part.block] = seen
        best = gain if best is None else best
        if shrinkage is not None and shrinkage.target.name not in changed:
            changed[shrinkage.target.name] = shrinkage.delta()
            moved = moved or shrinkage.target.name
        elif gain < settings.min_gain and seen.is_enough(images):
            helpless += part.leaving
    return Move(changed, observed, moved, best, helpless, _length(deltas, changed))


def _make(move: Move, gradient: StepGradient, deltas: Deltas, progress: Progress, settings: RepairSettings) -> None:
    """Make the move of a step; without a finite gradient nothing changes."""
    if not move.finite:
        return
    if settings.step == "sgd":
        deltas.descend(gradient.gradients, settings.lr, settings.momentum)
    else:
        deltas.put(move.deltas)
    progress.observed.by_block.update(move.observed)


def _record(
    step: SharedStep, move: Move, progress: Progress, settings: RepairSettings, began: float, emit: Emit
) -> StepRecord:
    """Count a step that has been made, and return its line; warn of one that is skipped."""
    gradient, defective = step.gradient, step.gradient.defective
    losses = [*gradient.losses, *(loss for _, loss in gradient.idle)]
    helpless = move.helpless + defective - sum(part.leaving for part in gradient.parts)
    if move.deltas or (settings.step == "sgd" and defective and move.finite):
        progress.last_move = progress.steps + 1
    progress.count(step.images, defective - helpless, move.finite)
    progress.seconds = time.monotonic() - began
    if not move.finite:
        emit(Warned(f"step {progress.steps} skipped: its loss or gradient is not finite"))
    return StepRecord(
        step=progress.steps,
        images=progress.images,
        defective=defective,
        block=gradient.first_block,
        masked_tokens=gradient.masked_tokens,
        loss=sum(losses) / len(losses) if losses and move.finite else None,
        moved=move.moved,
        length=move.length,
        gain=move.gain,
        clean_fraction=progress.clean_fraction,
        seconds=round(progress.seconds, 3),
        skipped=not move.finite,
    )


def _length(deltas: Deltas, changed: Mapping[str, Tensor]) -> float | None:
    """Compute ‖Δδ‖ of a move to these ε, by target; None if none changes."""
    if not changed:
        return None
    squares = 0.0
    for target in deltas.touched:
        if target.name in changed:
            change = (changed[target.name] - target.delta) / scale_of(target).clamp_min(1e-12)
            squares += float(change.square().sum())
    return math.sqrt(squares)


def clean_window(images: int, settings: RepairSettings) -> int:
    """Return the number of images for the share of clean ones: at most `stop_images`, and at most one pass.

    If all images are visited, at most two passes. `images` is the number of images in a pass.
    """
    passes = 2 if settings.visit == "all" else 1
    return max(1, min(settings.stop_images, passes * images))


def size_of_step(preprocess: Preprocessing, settings: RepairSettings) -> tuple[str, str]:
    """Return two parts of a message: what the memory of a step depends on, and what to do if it is too much."""
    size = preprocess.size
    why = f"at {size} × {size} pixels, batch size {settings.batch_size} and a window of {settings.window} blocks"
    return why, "--resume when more is free, or start anew with a lower --image-size, --batch-size or --window"
