"""One pass over all images: the residual stream of one backbone, or of two side by side, summed up block by block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cosine_similarity

from sinder_cli.analysis.components import Basis, Moments
from sinder_cli.analysis.directions import ObservedDirection
from sinder_cli.analysis.histogram import ANGLE_SCALE, COSINE_SCALE, NORM_SCALE, Curve, Histogram
from sinder_cli.analysis.records import BlockRecord, PairRecord, Rule
from sinder_cli.analysis.rules import RULES, RuleCounts, added, ratio
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.backbone.describe import Backbone
from sinder_cli.defects.detection import DetectionRule, alignments, defect_mask
from sinder_cli.defects.prediction import Prediction
from sinder_cli.defects.rules import STAGES, Stage
from sinder_cli.defects.tokens import in_precision, outlier_mask, patch_grid, residual_stream
from sinder_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

VIOLIN_POINTS = 60
MOST_GAP = 1e12  # σ₁/σ₂ is told no larger: JSON knows no infinity


@dataclass(frozen=True)
class Subject:
    """A backbone ready to be run, with what its weights predict."""

    backbone: Backbone
    module: Any
    prediction: Prediction

    def directions(self, device: str | torch.device) -> Tensor:
        """The predicted directions of all stages, `[blocks, 4, N]`."""
        return torch.stack([self.prediction.directions(stage) for stage in STAGES], dim=1).to(device)


@dataclass(frozen=True)
class BlockCurves:
    """Outlines for violin plots of one block."""

    norms: Curve | None
    angles: dict[Stage, Curve | None]


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


class BlockCollector:
    """Streamed statistics of one block of one backbone."""

    def __init__(self, device: str, grid: tuple[int, int], rule: DetectionRule) -> None:
        self.rule = rule
        self.patch_norms, self.cls_norms, self.register_norms = (Histogram(NORM_SCALE, device) for _ in range(3))
        self.angles = {stage: Histogram(ANGLE_SCALE, device) for stage in STAGES}
        self.counts = RuleCounts(grid, rule.min_tokens)
        self.observed = ObservedDirection()

    def add(self, tokens: BlockTokens) -> None:
        """The tokens of one batch."""
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

    def record(self, block: int, predicted: Tensor, gaps: dict[Stage, float]) -> BlockRecord:
        """Sum up; `predicted` `[4, N]`."""
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
        """The outlines of its distributions."""
        angles = {stage: histogram.curve(VIOLIN_POINTS) for stage, histogram in self.angles.items()}
        return BlockCurves(self.patch_norms.curve(VIOLIN_POINTS, logarithmic=True), angles)


class PairCollector:
    """Streamed agreement of the same block of two backbones."""

    def __init__(self, device: str) -> None:
        self.patches, self.cls = Histogram(COSINE_SCALE, device), Histogram(COSINE_SCALE, device)
        self.overlap: dict[Rule, tuple[int, int]] = {}

    def add(self, sides: Sequence[BlockTokens]) -> None:
        """Both sides' tokens of one batch."""
        a, b = sides
        self.patches.add(cosine_similarity(a.patches, b.patches, dim=-1))
        if a.cls is not None and b.cls is not None:
            self.cls.add(cosine_similarity(a.cls, b.cls, dim=-1))
        for rule in RULES:
            if rule in a.masks and rule in b.masks:
                self.overlap[rule] = added(self.overlap.get(rule), a.masks[rule], b.masks[rule])

    def record(self, block: int) -> PairRecord:
        """Sum up."""
        agreement = {rule: ratio(*counts) for rule, counts in self.overlap.items()}
        return PairRecord(
            block=block,
            patch_cosine=self.patches.distribution(),
            cls_cosine=self.cls.distribution(),
            agreement=agreement,
        )


@dataclass(frozen=True)
class BlockTokens:
    """One block's tokens of one batch, in float32, and what the rules mark among them."""

    patches: Tensor  # [B, h, w, N]
    norms: Tensor  # [B, h, w]: of patches
    cls: Tensor | None  # [B, N]
    registers: Tensor  # [B, R, N]
    cosines: Tensor  # [B, h, w, 4]: |cos| to the predicted direction of each stage
    masks: dict[Rule, Tensor]  # bool [B, h, w]

    @property
    def degrees(self) -> Tensor:
        """The angles `[B, h, w, 4]` of `cosines`."""
        return torch.rad2deg(torch.acos(self.cosines.clamp_max(1.0)))


def block_tokens(
    subject: Subject, tokens: Tensor, images: Tensor, block: int, nu: Tensor, settings: AnalyzeSettings
) -> BlockTokens:
    """Take apart the tokens after one block `[B, T, N]`; `nu` `[4, N]` holds its predicted directions."""
    backbone, rule = subject.backbone, DetectionRule.of(settings)
    tokens = tokens.float()
    patches = patch_grid(backbone, tokens, images)
    cosines = alignments(patches, nu)
    norms = patches.norm(dim=-1)
    masks: dict[Rule, Tensor] = {"outlying": outlier_mask(norms)}
    if rule.trusts(subject.prediction.gaps()[block]):
        masks["equation_5"] = defect_mask(-cosines[..., STAGES.index("cumulative")], rule)
    if settings.norm_threshold is not None:
        masks["above_threshold"] = norms > settings.norm_threshold
    registers = tokens[:, int(backbone.has_cls) : backbone.prefix_tokens]
    return BlockTokens(patches, norms, tokens[:, 0] if backbone.has_cls else None, registers, cosines, masks)


@torch.no_grad()
def survey(
    subjects: Sequence[Subject],
    batches: Iterable[Tensor],
    grid: tuple[int, int],
    settings: AnalyzeSettings,
    device: str,
    components: bool = False,
) -> Surveys:
    """Run batches `[B, 3, H, W]` of normalized images through one or two backbones of one width and depth.

    `grid` is the one that positions are counted on; `components` asks for the principal components of the last
    block's patch tokens. Memory does not grow with the number of images.
    """
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
    return Surveys(
        tuple(_summed(*each) for each in zip(subjects, collectors, strict=True)) if count else (),
        tuple(pair.record(block) for block, pair in enumerate(pairs)),
        count,
        moments.basis() if moments is not None else None,
    )


def in_basis(side: BlockTokens, settings: AnalyzeSettings) -> Tensor:
    """Which patch tokens principal components are taken from, bool `[B, h, w]`: all, or those that no rule marks."""
    if not settings.exclude_masked:
        return torch.ones_like(side.masks["outlying"])
    return ~torch.stack(list(side.masks.values())).any(dim=0)


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
