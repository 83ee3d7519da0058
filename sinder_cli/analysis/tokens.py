"""The tokens of one block of one backbone, split by kind, and the masks of the rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import torch

from sinder_cli.analysis.records import Marked, Position, Rule
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.backbone.contract import Backbone
from sinder_cli.defects.detection import DetectionRule, alignments, block_evidence, norm_ratios, outlying
from sinder_cli.defects.inpainting import inpainted, outlying_factor
from sinder_cli.defects.prediction import Prediction
from sinder_cli.defects.settings import STAGES
from sinder_cli.defects.tokens import in_precision, patch_grid, stream_from_embedding

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Subject:
    """A backbone ready to run, with the prediction from its weights; `original` is False for an inpainted one."""

    backbone: Backbone
    module: Any
    prediction: Prediction
    original: bool = True

    def directions(self, device: str | torch.device) -> Tensor:
        """Return the predicted directions of all stages, `[blocks, 4, N]`."""
        return torch.stack([self.prediction.directions(stage) for stage in STAGES], dim=1).to(device)

    def running(self, settings: AnalyzeSettings) -> Backbone:
        """Return the backbone in the precision of the settings."""
        return in_precision(self.backbone, settings.dtype, settings.tf32)

    def inpainted(self, settings: AnalyzeSettings) -> Subject:
        """Return the subject with the same module, but with outlying tokens replaced where they appear."""
        backbone = inpainted(self.backbone, settings.norm_factor)
        return replace(self, backbone=replace(backbone, name=f"{backbone.name}, inpainted"), original=False)


def featured(subjects: Sequence[Subject]) -> int:
    """Return the index of the subject whose features are written: the inpainted one, or else the first."""
    return next((at for at, subject in enumerate(subjects) if not subject.original), 0)


@dataclass(frozen=True)
class BlockTokens:
    """One block's tokens of one batch, in float32, and the masks of the rules."""

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

    @property
    def stream(self) -> Tensor:
        """All tokens in the order of the residual stream, `[B, prefix + h·w, N]`."""
        cls = [] if self.cls is None else [self.cls[:, None]]
        return torch.cat([*cls, self.registers, self.patches.flatten(1, 2)], dim=1)


def block_by_block(subject: Subject, images: Tensor, nu: Tensor, settings: AnalyzeSettings) -> Iterator[BlockTokens]:
    """Run normalized images `[B, 3, H, W]` and yield the tokens after each block; `nu` is `[blocks, 4, N]`."""
    running = subject.running(settings)
    stream = stream_from_embedding(running, subject.module, images)
    start = norm_ratios(patch_grid(running, next(stream), images).float().norm(dim=-1))
    for block, tokens in enumerate(stream):
        yield block_tokens(subject, tokens, images, block, nu[block], start, settings)


def block_tokens(
    subject: Subject,
    tokens: Tensor,
    images: Tensor,
    block: int,
    nu: Tensor,
    start: Tensor,
    settings: AnalyzeSettings,
) -> BlockTokens:
    """Split the tokens after one block `[B, T, N]` by kind, and mark them by each rule that applies.

    `nu` `[4, N]` holds the block's predicted directions, `start` `[B, h, w]` the ratios of norms at the embedding.
    """
    backbone, rule = subject.backbone, DetectionRule.of(settings)
    tokens = tokens.float()
    patches = patch_grid(backbone, tokens, images)
    cosines = alignments(patches, nu)
    gap = subject.prediction.gaps()[block]
    evidence = block_evidence(patches, -cosines[..., STAGES.index("cumulative")], gap, rule)
    factor = outlying_factor(settings.norm_factor)
    masks: dict[Rule, Tensor] = {"outlying": outlying(evidence.ratios, start, factor)}
    if rule.trusts(gap):
        masks["equation_5"] = evidence.predicted
    if settings.norm_threshold is not None:
        masks["above_threshold"] = evidence.norms > settings.norm_threshold
    registers = tokens[:, int(backbone.has_cls) : backbone.prefix_tokens]
    cls = tokens[:, 0] if backbone.has_cls else None
    return BlockTokens(patches, evidence.norms, cls, registers, cosines, masks)


def in_basis(side: BlockTokens, settings: AnalyzeSettings) -> Tensor:
    """Return which patch tokens the principal components use, bool `[B, h, w]`: all, or those that no rule marks."""
    if not settings.exclude_masked:
        return torch.ones_like(side.masks["outlying"])
    return ~torch.stack(list(side.masks.values())).any(dim=0)


Key = TypeVar("Key")

RULES: tuple[Rule, ...] = get_args(Rule)
SHOWN_POSITIONS = 20


class PlaceCounts:
    """Counts for each cell of one grid: how many tokens fell into it, and how many of them a rule marks.

    A token of an image with another grid falls into the cell at its place relative to the image.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        self.marked = torch.zeros(grid, dtype=torch.int64)
        self.seen = torch.zeros(grid, dtype=torch.int64)

    def add(self, mask: Tensor) -> None:
        """Add one batch of masks, bool `[B, h, w]`."""
        counts = mask.sum(dim=0).cpu()  # [h, w]
        cells = cell_of(tuple(mask.shape[1:]), tuple(self.marked.shape))
        self.marked.view(-1).index_add_(0, cells, counts.flatten())
        self.seen.view(-1).index_add_(0, cells, torch.full_like(counts, len(mask)).flatten())

    def merge(self, other: PlaceCounts) -> None:
        """Add the counts of other images, on the same grid."""
        self.marked += other.marked
        self.seen += other.seen

    def shares(self) -> Tensor:
        """Return marked ÷ seen, `[H, W]` float64; NaN where there was no token."""
        return self.marked.double() / self.seen

    def most_frequent(self) -> tuple[Position, ...]:
        """Return the cells marked most often, the most frequent first, equal ones row by row."""
        shares = self.shares().nan_to_num()
        order = torch.argsort(shares.flatten(), descending=True, stable=True)[:SHOWN_POSITIONS].tolist()
        columns = shares.shape[1]
        found = [(at // columns, at % columns) for at in order]
        return tuple(
            Position(row=row, column=column, share=shares[row, column].item())
            for row, column in found
            if shares[row, column] > 0
        )


def cell_of(shape: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """Return, for each token of `shape` row by row, the number of the cell of `grid` that contains its centre."""
    row, column = (  # ⌊(i + ½) · cells / size⌋ in whole numbers
        (2 * torch.arange(size) + 1) * cells // (2 * size) for size, cells in zip(shape, grid, strict=True)
    )
    return (row[:, None] * grid[1] + column).flatten()


class RuleCounts:
    """Counts of the tokens that each rule marks in one block; a rule that does not apply has no count."""

    def __init__(self, grid: tuple[int, int], min_tokens: int) -> None:
        self.grid, self.min_tokens = grid, min_tokens
        self.tokens: dict[Rule, int] = {}
        self.images: dict[Rule, int] = {}
        self.places: dict[Rule, PlaceCounts] = {}
        self.overlap: dict[tuple[Rule, Rule], tuple[int, int]] = {}  # intersection, union

    def add(self, masks: Mapping[Rule, Tensor]) -> None:
        """Add one batch of masks, bool `[B, h, w]` each."""
        for rule, mask in masks.items():
            per_image = mask.flatten(1).sum(dim=1)
            self.tokens[rule] = self.tokens.get(rule, 0) + int(per_image.sum())
            self.images[rule] = self.images.get(rule, 0) + int((per_image >= self.min_tokens).sum())
            self.places.setdefault(rule, PlaceCounts(self.grid)).add(mask)
        for pair in combinations([rule for rule in RULES if rule in masks], 2):
            self.overlap[pair] = added(self.overlap.get(pair), masks[pair[0]], masks[pair[1]])

    def merge(self, other: RuleCounts) -> None:
        """Add the counts of other images."""
        for rule, places in other.places.items():
            self.tokens[rule] = self.tokens.get(rule, 0) + other.tokens[rule]
            self.images[rule] = self.images.get(rule, 0) + other.images[rule]
            self.places.setdefault(rule, PlaceCounts(self.grid)).merge(places)
        merge_overlaps(self.overlap, other.overlap)

    def records(self) -> dict[Rule, Marked | None]:
        """Return one record per rule, None for a rule that does not apply."""
        return {rule: self._record(rule) for rule in RULES}

    def _record(self, rule: Rule) -> Marked | None:
        if rule not in self.tokens:
            return None
        place = self.places[rule]
        total = int(place.seen.sum())
        return Marked(
            tokens=self.tokens[rule],
            share=self.tokens[rule] / total,
            images=self.images[rule],
            positions=place.most_frequent(),
        )

    def agreement(self) -> dict[str, float | None]:
        """Return the intersection over union for every two rules that apply."""
        return {f"{a}/{b}": ratio(*counts) for (a, b), counts in self.overlap.items()}


def added(before: tuple[int, int] | None, a: Tensor, b: Tensor) -> tuple[int, int]:
    """Return intersection and union so far, with those of two more masks of one shape added."""
    intersection, union = before or (0, 0)
    return intersection + int((a & b).sum()), union + int((a | b).sum())


def merge_overlaps(into: dict[Key, tuple[int, int]], other: Mapping[Key, tuple[int, int]]) -> None:
    """Add the intersections and unions of other images."""
    for key, (intersection, union) in other.items():
        before = into.get(key, (0, 0))
        into[key] = before[0] + intersection, before[1] + union


def ratio(intersection: int, union: int) -> float | None:
    """Return intersection over union; None if the union is empty."""
    return intersection / union if union else None
