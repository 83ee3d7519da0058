"""How often and where rules mark tokens, and how far they agree, against loops over tokens."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sinder_cli.analysis.records import Rule
from sinder_cli.analysis.tokens import RULES, SHOWN_POSITIONS, PlaceCounts, RuleCounts, added, cell_of, ratio

GRID = (6, 6)


def masks(*shape: int, share: float = 0.3, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def looped_cells(shape: tuple[int, int], grid: tuple[int, int]) -> list[int]:
    def cell(at: int, size: int, cells: int) -> int:
        return math.floor(Fraction(2 * at + 1, 2 * size) * cells)

    return [
        cell(row, shape[0], grid[0]) * grid[1] + cell(column, shape[1], grid[1])
        for row in range(shape[0])
        for column in range(shape[1])
    ]


@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (37, 37), (20, 31)])
def test_on_its_own_grid_every_token_has_its_own_cell(shape: tuple[int, int]) -> None:
    assert torch.equal(cell_of(shape, shape), torch.arange(shape[0] * shape[1]))


@settings(max_examples=60, deadline=None)
@given(*[st.integers(1, 60)] * 4)
def test_on_another_grid_a_token_takes_its_centre_cell(h: int, w: int, rows: int, columns: int) -> None:
    assert cell_of((h, w), (rows, columns)).tolist() == looped_cells((h, w), (rows, columns))


def test_shares_are_those_of_a_loop_over_tokens() -> None:
    places = PlaceCounts(GRID)
    marked, seen = [0] * 36, [0] * 36
    for seed, shape in enumerate([(3, 6, 6), (2, 9, 6), (1, 4, 13)]):
        batch = masks(*shape, seed=seed)
        places.add(batch)
        cells = looped_cells((shape[1], shape[2]), GRID)
        for image in batch:
            for cell, hit in zip(cells, image.flatten().tolist(), strict=True):
                seen[cell] += 1
                marked[cell] += hit
    assert places.seen.flatten().tolist() == seen
    assert places.marked.flatten().tolist() == marked
    expected = [m / s if s else math.nan for m, s in zip(marked, seen, strict=True)]
    assert places.shares().flatten().tolist() == pytest.approx(expected, nan_ok=True)


def test_a_cell_without_a_token_has_no_share() -> None:
    places = PlaceCounts((8, 8))
    places.add(torch.ones(1, 2, 2, dtype=torch.bool))
    assert places.shares().isnan().sum() == 60
    assert [(p.row, p.column, p.share) for p in places.most_frequent()] == [
        (2, 2, 1.0), (2, 6, 1.0), (6, 2, 1.0), (6, 6, 1.0)
    ]  # fmt: skip


def test_the_most_frequent_places_come_first() -> None:
    places = PlaceCounts(GRID)
    batch = torch.zeros(4, *GRID, dtype=torch.bool)
    batch[:, 5, 5] = True
    batch[:2, 3, 1] = batch[2:, 0, 4] = batch[:2, 3, 0] = True
    places.add(batch)
    found = [(p.row, p.column, p.share) for p in places.most_frequent()]
    assert found == [(5, 5, 1.0), (0, 4, 0.5), (3, 0, 0.5), (3, 1, 0.5)]


def test_no_more_than_twenty_places_are_reported() -> None:
    places = PlaceCounts(GRID)
    places.add(torch.ones(1, *GRID, dtype=torch.bool))
    assert [p.row * 6 + p.column for p in places.most_frequent()] == list(range(SHOWN_POSITIONS))


def test_counts_and_overlaps_are_those_of_a_loop_over_tokens() -> None:
    counts = RuleCounts(GRID, min_tokens=14)
    tokens, images, total = dict.fromkeys(RULES, 0), dict.fromkeys(RULES, 0), 0
    both = {
        pair: [0, 0]
        for pair in (("equation_5", "outlying"), ("equation_5", "above_threshold"), ("outlying", "above_threshold"))
    }
    for seed, shape in enumerate([(3, 6, 6), (2, 9, 6)]):
        batch: dict[Rule, Tensor] = {rule: masks(*shape, seed=10 * seed + at) for at, rule in enumerate(RULES)}
        counts.add(batch)
        total += shape[0] * shape[1] * shape[2]
        for rule in RULES:
            for image in batch[rule].tolist():
                found = sum(map(sum, image))
                tokens[rule] += found
                images[rule] += found >= 14
        for a, b in both:
            for x, y in zip(batch[a].flatten().tolist(), batch[b].flatten().tolist(), strict=True):
                both[a, b][0] += x and y
                both[a, b][1] += x or y
    for rule, record in counts.records().items():
        assert record is not None
        assert (record.tokens, record.images) == (tokens[rule], images[rule])
        assert record.share == pytest.approx(tokens[rule] / total)
        assert 0 < record.images < 5
    assert counts.agreement() == {f"{a}/{b}": pytest.approx(i / u) for (a, b), (i, u) in both.items()}


def test_a_rule_that_does_not_apply_has_no_record() -> None:
    counts = RuleCounts(GRID, min_tokens=3)
    counts.add({"outlying": masks(2, 6, 6)})
    records = counts.records()
    assert list(records) == list(RULES)
    assert [rule for rule, record in records.items() if record] == ["outlying"]
    assert counts.agreement() == {}


def test_a_rule_that_marks_nothing_agrees_with_nothing() -> None:
    counts = RuleCounts(GRID, min_tokens=3)
    nothing = torch.zeros(2, 6, 6, dtype=torch.bool)
    counts.add({"equation_5": nothing, "outlying": nothing})
    assert counts.agreement() == {"equation_5/outlying": None}
    record = counts.records()["outlying"]
    assert record is not None
    assert (record.tokens, record.share, record.images, record.positions) == (0, 0.0, 0, ())


def test_equal_masks_agree_wholly_and_disjoint_ones_not_at_all() -> None:
    some = masks(2, 6, 6)
    assert ratio(*added(None, some, some)) == 1
    assert ratio(*added(None, some, ~some)) == 0
    assert ratio(*added(added(None, some, some), some, ~some)) == pytest.approx(
        int(some.sum()) / (72 + int(some.sum()))
    )
    assert ratio(0, 0) is None


def test_merged_counts_are_those_of_all_images() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [{rule: torch.rand(2, 4, 6, generator=generator) > 0.7 for rule in RULES[:2]} for _ in range(3)]
    whole, first, second = (RuleCounts((4, 6), 3) for _ in range(3))
    for at, masks in enumerate(batches):
        whole.add(masks)
        (first if at == 1 else second).add(masks)
    first.merge(second)
    first.merge(RuleCounts((4, 6), 3))
    assert first.records() == whole.records()
    assert first.agreement() == whole.agreement()
