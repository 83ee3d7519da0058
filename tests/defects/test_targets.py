"""Averages of unmarked neighbours against a loop over tokens in plain Python, and when a token has settled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sinder_cli.defects.detection import (
    LEANING,
    SETTLED_QUANTILE,
    leaning,
    neighbour_averages,
    neighbour_distances,
    unsettled,
)

WEIGHTS = {(i, j): 2.0 if i == 0 or j == 0 else 1.0 for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def average_of(spot: tuple[int, int], tokens: dict[tuple[int, int], Tensor]) -> Tensor | None:
    """The weighted average of the neighbours of a spot that are among `tokens`."""
    near = [(weight, (spot[0] + i, spot[1] + j)) for (i, j), weight in WEIGHTS.items()]
    there = [(weight, tokens[place]) for weight, place in near if place in tokens]
    if not there:
        return None
    return sum((weight * token for weight, token in there), torch.zeros(())) / sum(weight for weight, _ in there)


def looped_averages(patches: Tensor, marked: Tensor) -> Tensor:
    """Token by token: unmarked neighbours alone, and for those without one, ring by ring from outside."""
    height, width, _ = patches.shape
    spots = [(r, c) for r in range(height) for c in range(width)]
    unmarked = {spot: patches[spot] for spot in spots if not marked[spot]}
    found = {spot: average_of(spot, unmarked) for spot in unmarked}
    if not unmarked:
        return patches
    known = dict(unmarked)
    while len(known) < len(spots):
        ring = {spot: average_of(spot, known) for spot in spots if spot not in known}
        reached = {spot: average for spot, average in ring.items() if average is not None}
        known |= reached
        found |= reached
    averages = [patches[spot] if (average := found[spot]) is None else average for spot in spots]
    return torch.stack(averages).unflatten(0, (height, width))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
)
def test_the_averages_are_those_of_a_loop_over_tokens(height: int, width: int, seed: int, share: float) -> None:
    patches = drawn(height, width, 4, seed=seed)
    marked = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < share
    found = neighbour_averages(patches, marked)
    torch.testing.assert_close(found, looped_averages(patches, marked), atol=1e-5, rtol=1e-5)
    expected = (patches - looped_averages(patches, marked)).norm(dim=-1)
    torch.testing.assert_close(neighbour_distances(patches, marked), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spot", [(0, 0), (0, 3), (5, 6), (2, 0), (3, 3)])
def test_a_marked_border_token_takes_from_the_neighbours_there_are(spot: tuple[int, int]) -> None:
    patches = drawn(6, 7, 4)
    marked = torch.zeros(6, 7, dtype=torch.bool)
    marked[spot] = True
    expected = average_of(spot, {(r, c): patches[r, c] for r in range(6) for c in range(7) if (r, c) != spot})
    torch.testing.assert_close(neighbour_averages(patches, marked)[spot], expected)


def test_a_marked_token_counts_in_no_average() -> None:
    patches = drawn(6, 6, 4)
    marked = torch.zeros(6, 6, dtype=torch.bool)
    marked[2:4, 2:4] = True
    other = torch.where(marked[..., None], 1e4 * patches, patches)
    assert torch.equal(neighbour_averages(patches, marked), neighbour_averages(other, marked))


def test_averages_of_half_precision_tokens_are_those_in_float32() -> None:
    patches = drawn(6, 6, 4).bfloat16()
    marked = torch.zeros(6, 6, dtype=torch.bool)
    marked[2:5, 2:5] = True
    averages = neighbour_averages(patches, marked)
    assert averages.dtype == torch.float32
    torch.testing.assert_close(averages, looped_averages(patches.float(), marked))


def test_a_cluster_is_filled_inwards() -> None:
    patches = drawn(7, 7, 4)
    marked = torch.zeros(7, 7, dtype=torch.bool)
    marked[1:6, 1:6] = True
    averages = neighbour_averages(patches, marked)
    ring = {(r, c): averages[r, c] for r in range(2, 5) for c in range(2, 5) if (r, c) != (3, 3)}
    torch.testing.assert_close(averages[3, 3], average_of((3, 3), ring))  # by way of two rings
    torch.testing.assert_close(averages, looped_averages(patches, marked))


def test_where_every_token_is_marked_each_is_its_own_average() -> None:
    patches = drawn(3, 4, 5).bfloat16()
    everywhere = torch.ones(3, 4, dtype=torch.bool)
    assert torch.equal(neighbour_averages(patches, everywhere), patches.float())
    assert neighbour_distances(patches, everywhere).eq(0).all()


def test_a_token_without_unmarked_neighbours_is_its_own_average() -> None:
    patches = drawn(5, 5, 4)
    marked = torch.ones(5, 5, dtype=torch.bool)
    marked[2, 2] = False
    assert torch.equal(neighbour_averages(patches, marked)[2, 2], patches[2, 2])
    torch.testing.assert_close(neighbour_averages(patches, marked), patches[2, 2].expand(5, 5, 4))


def test_a_token_has_settled_as_near_as_most_unmarked_ones() -> None:
    patches = drawn(10, 10, 6)
    marked = torch.zeros(10, 10, dtype=torch.bool)
    marked[2, 2] = marked[5, 5] = marked[8, 1] = True
    averages = neighbour_averages(patches, marked)
    usual = sorted((patches - averages).norm(dim=-1)[~marked].tolist())
    limit = usual[round(SETTLED_QUANTILE * len(usual)) - 1]
    step = torch.nn.functional.normalize(drawn(6, seed=1), dim=0)
    patches[2, 2] = averages[2, 2] + 0.99 * limit * step
    patches[5, 5] = averages[5, 5] + 1.01 * limit * step
    patches[8, 1] = averages[8, 1]
    assert unsettled(patches, marked).nonzero().tolist() == [[5, 5]]


def test_a_single_unmarked_token_says_what_has_settled() -> None:
    patches = torch.zeros(3, 3, 4)
    patches[2, 2] = 5.0
    marked = torch.ones(3, 3, dtype=torch.bool)
    marked[0, 0] = False  # it has no unmarked neighbour: its distance is 0
    assert unsettled(patches, marked).nonzero().tolist() == [[2, 2]]


def test_half_precision_tokens_settle_and_lean_as_in_float32() -> None:
    for seed in range(20):
        patches = drawn(8, 8, 6, seed=seed).bfloat16()
        marked = drawn(8, 8, seed=seed + 100) > 1.5
        for function in (unsettled, leaning):
            assert torch.equal(function(patches, marked), function(patches.float(), marked))


def test_only_marked_tokens_are_unsettled() -> None:
    patches = drawn(5, 5, 4)
    patches[1, 1] = 100.0
    assert not unsettled(patches, torch.zeros(5, 5, dtype=torch.bool)).any()
    assert unsettled(patches, torch.ones(5, 5, dtype=torch.bool)).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), share=st.sampled_from([0.05, 0.3, 0.9]))
def test_a_token_leans_far_along_the_way_of_marked_ones(seed: int, share: float) -> None:
    patches = drawn(6, 7, 5, seed=seed)
    marked = drawn(6, 7, seed=seed + 1) > torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - share))
    found = leaning(patches, marked)
    spots = [(r, c) for r in range(6) for c in range(7)]
    off = [patches[spot] - looped_averages(patches, marked)[spot] for spot in spots if marked[spot]]
    if not off or len(off) == len(spots):
        assert not found.any()
        return
    way = torch.stack(off).mean(dim=0)
    along = {spot: float(patches[spot] @ way) for spot in spots if not marked[spot]}

    def median(values: list[float]) -> float:
        return sorted(values)[(len(values) - 1) // 2]

    middle = median(list(along.values()))
    limit = LEANING * median([abs(value - middle) for value in along.values()])
    for spot in spots:
        assert bool(found[spot]) == (not marked[spot] and abs(along[spot] - middle) > limit)


def test_what_a_soft_trigger_moves_leans_on_either_side() -> None:
    patches, nu = drawn(9, 9, 32), torch.nn.functional.one_hot(torch.tensor(3), 32).float()
    patches[4, 4] += 60 * nu
    patches[1, 1:6] += 12 * nu  # trips it a little, a whole surface
    patches[7, 1:6] -= 12 * nu  # the dip of a GELU
    marked = torch.zeros(9, 9, dtype=torch.bool)
    marked[4, 4] = True
    found = leaning(patches, marked)
    assert found[1, 1:6].all()
    assert found[7, 1:6].all()
    assert found.sum() < 10 + 0.2 * 81
    assert not found[4, 4]
