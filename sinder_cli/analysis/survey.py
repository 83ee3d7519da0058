"""One pass over all images: the residual stream of one backbone, or of two side by side, summed up block by block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sinder_cli.analysis.collectors import BlockCollector, BlockCurves, Collected, PairCollector
from sinder_cli.analysis.components import Basis, Moments
from sinder_cli.analysis.records import BlockRecord, PairRecord, Rule
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.analysis.tokens import Subject, block_tokens, in_basis
from sinder_cli.backbone.describe import Backbone
from sinder_cli.defects.detection import DetectionRule
from sinder_cli.defects.rules import STAGES
from sinder_cli.defects.tokens import in_precision, residual_stream
from sinder_cli.errors import UsageError
from sinder_cli.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from torch import Tensor

MOST_GAP = 1e12  # σ₁/σ₂ is told no larger: JSON knows no infinity


@dataclass(frozen=True)
class Survey:
    """What one pass found out about one backbone."""

    blocks: tuple[BlockRecord, ...]
    curves: tuple[BlockCurves, ...]
    observed: Tensor  # [blocks, N] float32, rows of unit norm, or of zeros where there was no outlying token
    shares: tuple[dict[Rule, Tensor], ...]  # by block: how often each cell of the grid is marked, [H, W]


@dataclass(frozen=True)
class Surveys:
    """One survey a backbone; for two also what they have in common."""

    sides: tuple[Survey, ...]
    pairs: tuple[PairRecord, ...]
    images: int
    basis: Basis | None  # of the last block's patch tokens of all sides


def require_comparable(backbones: Sequence[Backbone]) -> None:
    """Refuse backbones whose tokens cannot be held against each other. Raises `UsageError` naming what differs."""
    first = backbones[0]
    for other in backbones[1:]:
        facts = {
            "width": (first.width, other.width),
            "depth": (first.depth, other.depth),
            "patch size": (first.patch_size, other.patch_size),
            "normalization": ((first.mean, first.std), (other.mean, other.std)),
        }
        for name, (one, two) in facts.items():
            if one != two:
                why = f"their {name} differs, {one} and {two}"
                raise UsageError(f"cannot compare {first.name} with {other.name}", why, "name one of the same shape")


@torch.no_grad()
def survey(
    subjects: Sequence[Subject],
    batches: Iterable[Tensor],
    grid: tuple[int, int],
    settings: AnalyzeSettings,
    device: str,
    components: bool = False,
    ranks: Ranks = ALONE,
) -> Surveys | None:
    """Run batches `[B, 3, H, W]` of normalized images through one or two backbones of one width and depth.

    `grid` is the one that positions are counted on; `components` asks for the principal components of the last
    block's patch tokens. Memory does not grow with the number of images. Each rank has batches of its own; rank 0 sums
    up for all, and the others get None.
    """
    collected = _collected(subjects, batches, grid, settings, device, components).at_first(ranks)
    if not ranks.writes:
        return None
    return Surveys(
        tuple(_summed(*each) for each in zip(subjects, collected.sides, strict=True)) if collected.images else (),
        tuple(pair.record(block) for block, pair in enumerate(collected.pairs)),
        collected.images,
        collected.moments.basis() if collected.moments is not None else None,
    )


def _collected(
    subjects: Sequence[Subject],
    batches: Iterable[Tensor],
    grid: tuple[int, int],
    settings: AnalyzeSettings,
    device: str,
    components: bool,
) -> Collected:
    depth, width = subjects[0].backbone.depth, subjects[0].backbone.width
    rule = DetectionRule.of(settings)
    running = [in_precision(subject.backbone, settings.dtype) for subject in subjects]
    directions = [subject.directions(device) for subject in subjects]
    collectors = [[BlockCollector(device, grid, rule) for _ in range(depth)] for _ in subjects]
    pairs = [PairCollector(device) for _ in range(depth if len(subjects) == 2 else 0)]
    moments = Moments(width, device) if components else None
    count = 0
    for batch in batches:
        images = batch.to(device)
        count += len(images)
        streams = [residual_stream(each, s.module, images) for each, s in zip(running, subjects, strict=True)]
        for block, step in enumerate(zip(*streams, strict=True)):
            sides = [
                block_tokens(subject, tokens, images, block, nu[block], settings)
                for subject, tokens, nu in zip(subjects, step, directions, strict=True)
            ]
            for side, blocks in zip(sides, collectors, strict=True):
                blocks[block].add(side)
            if pairs:
                pairs[block].add(sides)
            if moments is not None and block == depth - 1:
                for side in sides:
                    moments.add(side.patches[in_basis(side, settings)])
    return Collected(count, collectors, pairs, moments)


def _summed(subject: Subject, collectors: list[BlockCollector]) -> Survey:
    nu = subject.directions("cpu")
    gaps = {stage: [min(gap, MOST_GAP) for gap in subject.prediction.gaps(stage)] for stage in STAGES}
    records = tuple(
        collector.record(block, nu[block], {stage: gaps[stage][block] for stage in STAGES})
        for block, collector in enumerate(collectors)
    )
    none = torch.zeros(subject.backbone.width)
    found = [collector.observed.direction for collector in collectors]
    return Survey(
        blocks=records,
        curves=tuple(collector.curves() for collector in collectors),
        observed=torch.stack([none if direction is None else direction for direction in found]),
        shares=tuple(
            {rule: places.shares() for rule, places in collector.counts.places.items()} for collector in collectors
        ),
    )
