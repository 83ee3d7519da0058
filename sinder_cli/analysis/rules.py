"""Three rules that mark patch tokens, how often and where each does, and how far they agree."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, TypeVar, get_args

import torch

from sinder_cli.analysis.records import Marked, Position, Rule

if TYPE_CHECKING:
    from torch import Tensor

Key = TypeVar("Key")

RULES: tuple[Rule, ...] = get_args(Rule)
SHOWN_POSITIONS = 20


class PlaceCounts:
    """How often a rule marks each cell of one grid, and how many tokens fell into that cell.

    Tokens of an image of another grid fall into the cell that has their place relative to the image.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        self.marked = torch.zeros(grid, dtype=torch.int64)
        self.seen = torch.zeros(grid, dtype=torch.int64)

    def add(self, mask: Tensor) -> None:
        """Take in one batch of masks, bool `[B, h, w]`."""
        counts = mask.sum(dim=0).cpu()  # [h, w]
        cells = cell_of(tuple(mask.shape[1:]), tuple(self.marked.shape))
        self.marked.view(-1).index_add_(0, cells, counts.flatten())
        self.seen.view(-1).index_add_(0, cells, torch.full_like(counts, len(mask)).flatten())

    def merge(self, other: PlaceCounts) -> None:
        """Take in the counts of other images, on the same grid."""
        self.marked += other.marked
        self.seen += other.seen

    def shares(self) -> Tensor:
        """Marked ÷ seen, `[H, W]` float64; NaN where no token fell."""
        return self.marked.double() / self.seen

    def most_frequent(self) -> tuple[Position, ...]:
        """The cells marked most often, the most frequent first, equal ones row by row."""
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
    """For each token of `shape`, row by row, the number of the cell of `grid` in which its centre lies."""
    row, column = (  # ⌊(i + ½) · cells / size⌋ in whole numbers
        (2 * torch.arange(size) + 1) * cells // (2 * size) for size, cells in zip(shape, grid, strict=True)
    )
    return (row[:, None] * grid[1] + column).flatten()


class RuleCounts:
    """What each rule marks in one block; a rule that does not apply stays without a count."""

    def __init__(self, grid: tuple[int, int], min_tokens: int) -> None:
        self.grid, self.min_tokens = grid, min_tokens
        self.tokens: dict[Rule, int] = {}
        self.images: dict[Rule, int] = {}
        self.places: dict[Rule, PlaceCounts] = {}
        self.overlap: dict[tuple[Rule, Rule], tuple[int, int]] = {}  # intersection, union

    def add(self, masks: Mapping[Rule, Tensor]) -> None:
        """Take in one batch of masks, bool `[B, h, w]` each."""
        for rule, mask in masks.items():
            per_image = mask.flatten(1).sum(dim=1)
            self.tokens[rule] = self.tokens.get(rule, 0) + int(per_image.sum())
            self.images[rule] = self.images.get(rule, 0) + int((per_image >= self.min_tokens).sum())
            self.places.setdefault(rule, PlaceCounts(self.grid)).add(mask)
        for pair in combinations([rule for rule in RULES if rule in masks], 2):
            self.overlap[pair] = added(self.overlap.get(pair), masks[pair[0]], masks[pair[1]])

    def merge(self, other: RuleCounts) -> None:
        """Take in the counts of other images."""
        for rule, places in other.places.items():
            self.tokens[rule] = self.tokens.get(rule, 0) + other.tokens[rule]
            self.images[rule] = self.images.get(rule, 0) + other.images[rule]
            self.places.setdefault(rule, PlaceCounts(self.grid)).merge(places)
        merge_overlaps(self.overlap, other.overlap)

    def records(self) -> dict[Rule, Marked | None]:
        """One record a rule, None for one that does not apply."""
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
        """Intersection over union for each two rules that apply."""
        return {f"{a}/{b}": ratio(*counts) for (a, b), counts in self.overlap.items()}


def added(before: tuple[int, int] | None, a: Tensor, b: Tensor) -> tuple[int, int]:
    """Intersection and union so far, with two more masks of one shape."""
    intersection, union = before or (0, 0)
    return intersection + int((a & b).sum()), union + int((a | b).sum())


def merge_overlaps(into: dict[Key, tuple[int, int]], other: Mapping[Key, tuple[int, int]]) -> None:
    """Add the intersections and unions of other images."""
    for key, (intersection, union) in other.items():
        before = into.get(key, (0, 0))
        into[key] = before[0] + intersection, before[1] + union


def ratio(intersection: int, union: int) -> float | None:
    """Intersection over union; None where there is nothing."""
    return intersection / union if union else None
