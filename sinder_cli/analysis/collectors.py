"""Statistics that are collected batch by batch in fixed memory; those of several processes can be added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from torch.nn.functional import cosine_similarity

from sinder_cli.analysis.directions import Moments, ObservedDirection
from sinder_cli.analysis.gain import InpaintingCollector
from sinder_cli.analysis.histogram import ANGLE_SCALE, COSINE_SCALE, NORM_SCALE, Curve, Histogram
from sinder_cli.analysis.records import BlockRecord, PairRecord, Rule
from sinder_cli.analysis.tokens import RULES, BlockTokens, RuleCounts, added, merge_overlaps, ratio
from sinder_cli.defects.detection import DetectionRule
from sinder_cli.defects.settings import STAGES, Stage
from sinder_cli.distributed import Ranks

if TYPE_CHECKING:
    from torch import Tensor

VIOLIN_POINTS = 60


@dataclass(frozen=True)
class BlockCurves:
    """Outlines for violin plots of one block."""

    norms: Curve | None
    angles: dict[Stage, Curve | None]


class BlockCollector:
    """Streamed statistics of one block of one backbone."""

    def __init__(self, device: str, grid: tuple[int, int], rule: DetectionRule) -> None:
        self.rule = rule
        self.patch_norms, self.cls_norms, self.register_norms = (Histogram(NORM_SCALE, device) for _ in range(3))
        self.angles = {stage: Histogram(ANGLE_SCALE, device) for stage in STAGES}
        self.counts = RuleCounts(grid, rule.min_tokens)
        self.observed = ObservedDirection()

    def add(self, tokens: BlockTokens) -> None:
        """Add the tokens of one batch."""
        self.patch_norms.add(tokens.norms)
        if tokens.cls is not None:
            self.cls_norms.add(tokens.cls.norm(dim=-1))
        self.register_norms.add(tokens.registers.norm(dim=-1))
        for stage, degrees in zip(STAGES, tokens.degrees.unbind(dim=-1), strict=True):
            self.angles[stage].add(degrees)
        self.counts.add(tokens.masks)
        seen = tokens.masks.get("above_threshold", tokens.masks["outlying"])
        if seen.any():
            for patches, marked in zip(tokens.patches, seen, strict=True):
                self.observed.add(patches[marked])

    def merge(self, other: BlockCollector) -> None:
        """Add the statistics of other images."""
        for mine, theirs in zip(self._histograms, other._histograms, strict=True):
            mine.merge(theirs)
        self.counts.merge(other.counts)
        self.observed.merge(other.observed)

    def to_cpu(self) -> BlockCollector:
        """Return a copy on the CPU, which can be sent to another process."""
        moved = BlockCollector("cpu", self.counts.grid, self.rule)
        moved.merge(self)
        return moved

    @property
    def _histograms(self) -> list[Histogram]:
        return [self.patch_norms, self.cls_norms, self.register_norms, *self.angles.values()]

    def record(self, block: int, predicted: Tensor, gaps: dict[Stage, float]) -> BlockRecord:
        """Return the record of the block; `predicted` `[4, N]` are its predicted directions."""
        return BlockRecord(
            block=block,
            patch_norm=self.patch_norms.distribution(),
            cls_norm=self.cls_norms.distribution(),
            register_norm=self.register_norms.distribution(),
            nonfinite=int(self.patch_norms.nonfinite),
            gap=gaps,
            determined=self.rule.trusts(gaps["cumulative"]),
            angle_deg={stage: histogram.distribution() for stage, histogram in self.angles.items()},
            marked=self.counts.records(),
            agreement=self.counts.agreement(),
            observed=self.observed.record(dict(zip(STAGES, predicted, strict=True))),
        )

    def curves(self) -> BlockCurves:
        """Return the outlines of its distributions."""
        angles = {stage: histogram.curve(VIOLIN_POINTS) for stage, histogram in self.angles.items()}
        return BlockCurves(self.patch_norms.curve(VIOLIN_POINTS, logarithmic=True), angles)


class PairCollector:
    """Streamed agreement of the same block of two backbones."""

    def __init__(self, device: str) -> None:
        self.patches, self.cls = Histogram(COSINE_SCALE, device), Histogram(COSINE_SCALE, device)
        self.overlap: dict[Rule, tuple[int, int]] = {}

    def add(self, sides: Sequence[BlockTokens]) -> None:
        """Add both sides' tokens of one batch."""
        a, b = sides
        self.patches.add(cosine_similarity(a.patches, b.patches, dim=-1))
        if a.cls is not None and b.cls is not None:
            self.cls.add(cosine_similarity(a.cls, b.cls, dim=-1))
        for rule in RULES:
            if rule in a.masks and rule in b.masks:
                self.overlap[rule] = added(self.overlap.get(rule), a.masks[rule], b.masks[rule])

    def merge(self, other: PairCollector) -> None:
        """Add the agreement on other images."""
        self.patches.merge(other.patches)
        self.cls.merge(other.cls)
        merge_overlaps(self.overlap, other.overlap)

    def to_cpu(self) -> PairCollector:
        """Return a copy on the CPU, which can be sent to another process."""
        moved = PairCollector("cpu")
        moved.merge(self)
        return moved

    def record(self, block: int) -> PairRecord:
        """Return the record of the pair of blocks."""
        agreement = {rule: ratio(*counts) for rule, counts in self.overlap.items()}
        return PairRecord(
            block=block,
            patch_cosine=self.patches.distribution(),
            cls_cosine=self.cls.distribution(),
            agreement=agreement,
        )


class Mergeable(Protocol):
    """Statistics that can be sent to another process and added there."""

    def merge(self: Part, other: Part) -> None: ...

    def to_cpu(self: Part) -> Part: ...


Part = TypeVar("Part", bound=Mergeable)


@dataclass
class Collected:
    """Everything that one pass over images collects."""

    images: int
    sides: list[list[BlockCollector]]  # by backbone and block
    pairs: list[PairCollector]  # by block, of two backbones
    moments: Moments | None  # of the last block's patch tokens of all sides
    inpainted: list[InpaintingCollector | None]  # by backbone

    def at_first(self, ranks: Ranks) -> Collected:
        """Return what all ranks have collected, on rank 0; elsewhere this rank's own.

        Only one block at a time is in memory.
        """
        if ranks.size == 1:
            return self
        return Collected(
            images=sum(ranks.gather(self.images)),
            sides=[[_merged(block, ranks) for block in blocks] for blocks in self.sides],
            pairs=[_merged(pair, ranks) for pair in self.pairs],
            moments=None if self.moments is None else _merged(self.moments, ranks),
            inpainted=[None if each is None else _merged(each, ranks) for each in self.inpainted],
        )


def _merged(mine: Part, ranks: Ranks) -> Part:
    first, *others = ranks.gather(mine.to_cpu()) or [mine]
    for other in others:
        first.merge(other)
    return first
