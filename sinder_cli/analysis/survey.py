"""One pass over all images: the residual stream of one backbone, or of two side by side, summed up block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sinder_cli.analysis.collectors import BlockCollector, BlockCurves, Collected, PairCollector
from sinder_cli.analysis.components import Basis, Moments
from sinder_cli.analysis.gain import InpaintingCollector, Outliers
from sinder_cli.analysis.records import BlockRecord, Inpainting, PairRecord, Rule
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.analysis.tokens import BlockTokens, Subject, block_by_block, featured, in_basis
from sinder_cli.backbone.contract import Backbone
from sinder_cli.defects.detection import DetectionRule
from sinder_cli.defects.settings import STAGES
from sinder_cli.distributed import ALONE, Ranks
from sinder_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

MOST_GAP = 1e12  # σ₁/σ₂ is told no larger: JSON knows no infinity

Keep = Callable[[Sequence[str], Subject, BlockTokens], None]  # names of a batch, and its tokens after the last block


@dataclass(frozen=True)
class Survey:
    """What one pass found out about one backbone."""

    blocks: tuple[BlockRecord, ...]
    curves: tuple[BlockCurves, ...]
    observed: Tensor  # [blocks, N] float32, rows of unit norm, or of zeros where there was no outlying token
    shares: tuple[dict[Rule, Tensor], ...]  # by block: how often each cell of the grid is marked, [H, W]
    inpainting: Inpainting | None = None  # against the inpainted original


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
    batches: Iterable[tuple[Sequence[str], Tensor]],
    grid: tuple[int, int],
    settings: AnalyzeSettings,
    device: str,
    components: bool = False,
    ranks: Ranks = ALONE,
    keep: Keep | None = None,
) -> Surveys | None:
    """Run named batches `[B, 3, H, W]` of normalized images through one or two backbones of one width and depth.

    `grid` is the one that positions are counted on; `components` asks for the principal components of the last
    block's patch tokens; `keep` gets those tokens, of the inpainted side where there is one, else of the first.
    Memory does not grow with the number of images. Each rank has batches of its own; rank 0 sums up for all, and the
    others get None.
    """
    collected = _collected(subjects, batches, grid, settings, device, components, keep).at_first(ranks)
    if not ranks.writes:
        return None
    parts = zip(subjects, collected.sides, collected.inpainted, strict=True)
    return Surveys(
        tuple(_summed(*each) for each in parts) if collected.images else (),
        tuple(pair.record(block) for block, pair in enumerate(collected.pairs)),
        collected.images,
        collected.moments.basis() if collected.moments is not None else None,
    )


def _collected(
    subjects: Sequence[Subject],
    batches: Iterable[tuple[Sequence[str], Tensor]],
    grid: tuple[int, int],
    settings: AnalyzeSettings,
    device: str,
    components: bool,
    keep: Keep | None,
) -> Collected:
    depth, width = subjects[0].backbone.depth, subjects[0].backbone.width
    rule = DetectionRule.of(settings)
    directions = [subject.directions(device) for subject in subjects]
    collectors = [[BlockCollector(device, grid, rule) for _ in range(depth)] for _ in subjects]
    pairs = [PairCollector(device) for _ in range(depth if len(subjects) == 2 else 0)]
    moments = Moments(width, device) if components else None
    inpainted = [InpaintingCollector(device) if settings.inpaint and each.original else None for each in subjects]
    kept = featured(subjects)
    count = 0
    for names, batch in batches:
        images = batch.to(device)
        count += len(images)
        outliers = [Outliers(settings) for _ in subjects]
        streams = [block_by_block(each, images, nu, settings) for each, nu in zip(subjects, directions, strict=True)]
        for block, sides in enumerate(zip(*streams, strict=True)):
            for side, blocks, seen in zip(sides, collectors, outliers, strict=True):
                blocks[block].add(side)
                seen.add(block, side)
            if pairs:
                pairs[block].add(sides)
            if moments is not None and block == depth - 1:
                for side in sides:
                    moments.add(side.patches[in_basis(side, settings)])
        if keep is not None:
            keep(names, subjects[kept], sides[kept])
        for subject, collector, seen, side in zip(subjects, inpainted, outliers, sides, strict=True):
            if collector is not None:
                collector.add(names, subject, images, seen, side, settings)
    return Collected(count, collectors, pairs, moments, inpainted)


def _summed(subject: Subject, collectors: list[BlockCollector], inpainted: InpaintingCollector | None) -> Survey:
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
        inpainting=inpainted.record(finite=not any(block.nonfinite for block in records)) if inpainted else None,
    )
