"""The dry run of a repair: what it would train, and the cost of a step, measured by steps that change nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sinder_cli.backbone.contract import WeightRef, trained_references
from sinder_cli.backbone.weights import rows_of
from sinder_cli.distributed import ALONE
from sinder_cli.events import Emit, Noted, silent
from sinder_cli.memory import out_of_memory_reported, peak_memory
from sinder_cli.repairing.choosing import guard_sizes, step_batches
from sinder_cli.repairing.deltas import SingularBasis, blank_basis
from sinder_cli.repairing.forward import Directions
from sinder_cli.repairing.loop import size_of_step
from sinder_cli.repairing.preparing import Prepared, Start, prepare
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.repairing.step import Probes, StepGradient, step_gradient

if TYPE_CHECKING:
    from torch import Tensor


FLOAT_BYTES = 4
MARKING = 0.5  # standard deviations; a threshold so low that some token of every image is marked


@dataclass(frozen=True)
class DryStep:
    """One step that changed nothing."""

    seconds: float
    defective: int  # images
    block: int | None  # the first defective one


@dataclass(frozen=True)
class DryRun:
    """The plan and cost of a repair. Bytes are memory of the CUDA device, or else resident memory of this process."""

    model: str
    device: str
    training_images: int
    evaluation_images: int
    blocks: tuple[int, ...]  # blocks that a step may change
    weights: int  # trained weights in these blocks
    values: int  # singular values of these weights
    max_steps: int
    first: DryStep  # on the first batch, as it is
    longest: DryStep  # on the same batch, with tokens marked in the last block that can be defective
    step_bytes: int  # at the peak of the longest step, with the bases of its window
    all_bytes: int  # once all these blocks have been touched
    recipe: str = "sinder"


def dry_run(start: Start, emit: Emit) -> DryRun:
    """Prepare a repair and measure its first step and the longest possible step. No delta is changed.

    Bases are placeholders of the right size, since decomposing a weight takes longer than a step.
    """
    with out_of_memory_reported(*size_of_step(start.preprocess, start.settings)):
        return _measured(prepare(start, emit, ALONE, decompose=_nothing_decomposed), emit)


def _measured(repair: Prepared, emit: Emit) -> DryRun:
    start = repair.start
    repair.deltas.emit = silent  # it would report decompositions, which are skipped here
    directions, settings = repair.directions, start.settings
    judged = [block for block, gap in enumerate(directions.gaps) if start.rule.can_mark(gap)]
    blocks = _reachable(judged, settings.window)
    images = _first_images(repair, emit)
    emit(Noted("taking two steps that change nothing"))
    _step(repair, images, directions, settings)  # warms up
    first = _step(repair, images, directions, settings)
    longest = _step(repair, images, *_marked_late(directions, judged, settings))
    peak = peak_memory(start.device)
    references = {block: list(trained_references(start.backbone.layers.blocks[block]).values()) for block in blocks}
    untouched = [ref for block, refs in references.items() if block not in repair.deltas.by_block for ref in refs]
    shapes = _shapes(repair, [ref for refs in references.values() for ref in refs])
    later = 0 if _waits_elsewhere(repair) else sum(map(_held_floats, _shapes(repair, untouched))) * FLOAT_BYTES
    looked_at = min(len(start.source), settings.scan_images)
    given = min(start.given, looked_at)
    held = sum(guard_sizes(given, looked_at - given, settings.eval_images))
    return DryRun(
        model=start.backbone.name,
        device=start.device,
        training_images=(len(start.source) if settings.visit == "all" else looked_at) - held,
        evaluation_images=held,
        blocks=blocks,
        weights=len(shapes),
        values=sum(map(min, shapes)),
        max_steps=settings.max_steps,
        first=first,
        longest=longest,
        step_bytes=peak,
        all_bytes=peak + later,
        recipe=settings.recipe,
    )


def _nothing_decomposed(weight: Tensor) -> SingularBasis:
    basis = blank_basis(weight)
    return SingularBasis(basis.U.zero_(), basis.S.fill_(1.0), basis.Vt.zero_())


def _reachable(judged: Sequence[int], window: int) -> tuple[int, ...]:
    """Return the blocks of all windows that may end at one of the judged blocks."""
    return tuple(sorted({block for last in judged for block in range(max(0, last - window + 1), last + 1)}))


def _first_images(repair: Prepared, emit: Emit) -> Tensor:
    """Return the first batch `[B, 3, H, W]` with at least one image that can be decoded, on the device."""
    start = repair.start
    batches = step_batches(start.source, start.preprocess, start.settings, 0, {}, emit)
    return next(batch.pixels for batch in batches if len(batch.pixels)).to(start.device)


def _marked_late(
    directions: Directions, judged: Sequence[int], settings: RepairSettings
) -> tuple[Directions, RepairSettings]:
    """Return directions and settings that make the last of the judged blocks defective, and none before it."""
    last = max(judged, default=-1)
    gaps = [math.inf if block == last else -math.inf for block in range(len(directions.gaps))]
    update = {"mask_threshold": MARKING, "min_tokens": 1, "norm_factor": 0.0, "mark": "weights"}
    marking = settings.model_copy(update=update)
    return replace(directions, gaps=gaps), marking


def _step(repair: Prepared, images: Tensor, directions: Directions, settings: RepairSettings) -> DryStep:
    later = dict.fromkeys(
        range(repair.start.backbone.depth), 1
    )  # taken before, as in most steps, which draw fewer probes
    probes = Probes(range(len(images)), later) if settings.step == "greedy" else None
    seconds, gradient = _timed(
        repair.start.device,
        lambda: step_gradient(repair.deltas, directions, images, settings, None, probes),
    )
    return DryStep(round(seconds, 3), len(gradient.losses), gradient.first_block)


def _timed(device: str, step: Callable[[], StepGradient]) -> tuple[float, StepGradient]:
    began = time.monotonic()
    gradient = step()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.monotonic() - began, gradient


def _waits_elsewhere(repair: Prepared) -> bool:
    """Return True if bases are kept in another memory than the one that is measured."""
    return repair.start.settings.offload and repair.start.device.startswith("cuda")


def _shapes(repair: Prepared, refs: Sequence[WeightRef]) -> list[tuple[int, int]]:
    weights = (rows_of(repair.module.get_parameter(ref.name), ref) for ref in refs)
    return [(weight.shape[0], weight.shape[1]) for weight in weights]


def _held_floats(shape: tuple[int, int]) -> int:
    """Return how many numbers are kept for a weight between steps: those of W₀, U and Vt."""
    rank = min(shape)
    return shape[0] * shape[1] + rank * (shape[0] + shape[1])
