"""Sketches against full decompositions of all rows, spreads against loops over tokens and pairs of images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sinder_cli.analysis.directions import FOLDED_AT_ONCE, SKETCH_ROWS, ObservedDirection, Sketch
from sinder_cli.analysis.records import Observed
from sinder_cli.defects.spectrum import angle_between, fixed_sign

N = 40


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(rows: int, rank: int, seed: int = 0) -> Tensor:
    """`[rows, N]` with distinct singular values."""
    return drawn(rows, rank, seed=seed) * 2.0 ** -torch.arange(rank) @ drawn(rank, N, seed=seed + 1)


def cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    return dot / math.hypot(*a.tolist()) / math.hypot(*b.tolist())


def around(nu: Tensor, count: int, noise: float, seed: int) -> Tensor:
    """Tokens of various lengths and signs near the line of ν."""
    signs = torch.where(torch.arange(count) % 2 > 0, 1.0, -1.0)[:, None]
    return (20 + 5 * drawn(count, 1, seed=seed)) * signs * nu + noise * drawn(count, N, seed=seed + 1)


def images(counts: list[int], noise: float = 3.0, bend: float = 0.2) -> list[Tensor]:
    """The outlying tokens of some images, each image's around a direction of its own near a shared one."""
    nu = drawn(N, seed=7)
    shifted = [nu / nu.norm() + bend * drawn(N, seed=50 + at) / math.sqrt(N) for at in range(len(counts))]
    return [
        around(each / each.norm(), count, noise, 100 + at)
        for at, (each, count) in enumerate(zip(shifted, counts, strict=True))
    ]


def observed(tokens: list[Tensor], **predicted: Tensor) -> Observed | None:
    found = ObservedDirection()
    for each in tokens:
        found.add(each)
    return found.record(predicted)  # type: ignore[arg-type]


def leading(tokens: Tensor) -> Tensor:
    return torch.linalg.svd(tokens / tokens.norm(dim=1, keepdim=True), full_matrices=False).Vh[0]


@pytest.mark.parametrize("rows", [1, 5, FOLDED_AT_ONCE, FOLDED_AT_ONCE + 1, 5 * FOLDED_AT_ONCE + 3])
@pytest.mark.parametrize("rank", [1, 3, SKETCH_ROWS])
def test_a_sketch_within_its_rank_is_the_svd_of_rows(rows: int, rank: int) -> None:
    matrix = low_rank(rows, rank)
    sketch = Sketch()
    for part in matrix.split(37):
        sketch.fold(part)
    S, Vh = torch.linalg.svd(matrix, full_matrices=False)[1:]
    kept = min(rank, rows)
    assert sketch.rows is not None
    assert len(sketch.rows) <= SKETCH_ROWS
    torch.testing.assert_close(torch.tensor(sketch.energies[:kept], dtype=torch.float64), S[:kept] ** 2)
    assert sketch.energies[kept:] == pytest.approx([0.0] * (len(sketch.energies) - kept), abs=1e-12 * S[0].item() ** 2)
    unit = sketch.rows[:kept] / sketch.rows[:kept].norm(dim=1, keepdim=True)
    torch.testing.assert_close((unit * Vh[:kept]).sum(dim=1).abs(), torch.ones(kept, dtype=torch.float64))


def test_merged_sketches_are_the_sketch_of_all_rows() -> None:
    first, second = low_rank(90, 4, seed=1), low_rank(200, 4, seed=5)
    whole, merged, other = Sketch(), Sketch(), Sketch()
    merged.fold(first)
    other.fold(second)
    assert other.rows is not None
    merged.fold(other.rows)
    whole.fold(torch.cat([first, second]))
    assert merged.energies == pytest.approx(whole.energies)
    assert merged.energies == pytest.approx((torch.linalg.svdvals(torch.cat([first, second]))[:8] ** 2).tolist())


def test_beyond_its_rank_a_sketch_bounds_energies_from_below() -> None:
    matrix = 3 * drawn(600, 1) @ drawn(1, N, seed=3) / math.sqrt(N) + drawn(600, N, seed=4) / 2
    sketch = Sketch()
    for row in matrix:
        sketch.fold(row[None])
    S, Vh = torch.linalg.svd(matrix, full_matrices=False)[1:]
    assert len(sketch.energies) == SKETCH_ROWS < N
    assert all(kept <= true * (1 + 1e-9) for kept, true in zip(sketch.energies, (S**2).tolist(), strict=False))
    assert sketch.energies[0] == pytest.approx(S[0].item() ** 2, rel=0.01)
    assert sketch.rows is not None
    assert angle_between(sketch.rows[0], Vh[0]) < 1.0


def test_an_empty_sketch_has_no_energies() -> None:
    assert Sketch().energies == []


def test_the_direction_is_the_leading_singular_vector_of_unit_tokens() -> None:
    tokens = images([3, 9, 70, 1, 25], noise=1.0)
    found = ObservedDirection()
    for each in tokens:
        found.add(each)
    assert found.direction is not None
    assert found.direction.dtype == torch.float32
    assert found.direction.norm().item() == pytest.approx(1)
    assert torch.equal(found.direction, fixed_sign(found.direction))
    assert angle_between(found.direction, leading(torch.cat(tokens))) < 0.1


def test_explained_is_the_mean_squared_cosine_over_tokens() -> None:
    tokens = images([3, 9, 30, 1, 25], noise=0.5)
    summed = observed(tokens)
    assert summed is not None
    everything = torch.cat(tokens)
    nu = leading(everything)
    squares = [cosine(token, nu) ** 2 for token in everything]
    assert (summed.tokens, summed.images) == (68, 5)
    assert summed.explained == pytest.approx(sum(squares) / len(squares), rel=1e-3)


def test_the_spread_within_is_that_of_a_loop_over_tokens() -> None:
    tokens = images([3, 1, 8, 1, 5])
    summed = observed(tokens)
    assert summed is not None
    sines = []
    for each in tokens:
        if len(each) > 1:  # a token alone is its image's direction
            own = leading(each)
            sines += [1 - cosine(token, own) ** 2 for token in each]
    expected = math.degrees(math.asin(math.sqrt(sum(sines) / len(sines))))
    assert summed.spread_within_deg == pytest.approx(expected, rel=1e-6)


def test_the_spread_across_is_that_of_all_pairs_of_images() -> None:
    tokens = images([3, 1, 8, 4, 5, 2])  # no more images than the sketch has rows: exact
    summed = observed(tokens)
    assert summed is not None
    own = [leading(each) for each in tokens]
    sines = [1 - cosine(own[i], own[j]) ** 2 for i in range(len(own)) for j in range(i)]
    expected = math.degrees(math.asin(math.sqrt(sum(sines) / len(sines))))
    assert summed.spread_across_deg == pytest.approx(expected, rel=1e-6)


def test_the_spread_across_many_images_is_near_the_exact_one() -> None:
    tokens = images([4] * 60, noise=0.2, bend=0.3)
    summed = observed(tokens)
    assert summed is not None
    D = torch.stack([leading(each) for each in tokens])
    squares = (D @ D.T) ** 2
    mean = (squares.sum() - 60).item() / (60 * 59)
    expected = math.degrees(math.asin(math.sqrt(1 - mean)))
    assert summed.spread_across_deg == pytest.approx(expected, rel=0.05)


def test_signs_and_lengths_of_tokens_do_not_matter() -> None:
    tokens = images([5, 3, 7])
    flipped = [each * -(3.0 ** (torch.arange(len(each)) % 5))[:, None] for each in tokens]
    one, other = observed(tokens), observed(flipped)
    assert one is not None
    assert other is not None
    for fact in ("tokens", "images", "explained", "spread_within_deg", "spread_across_deg"):
        assert getattr(one, fact) == pytest.approx(getattr(other, fact)), fact


def test_the_order_of_images_does_not_matter_up_to_rounding() -> None:
    tokens = images([5, 3, 7, 2], noise=1.0, bend=0.0)
    one, other = observed(tokens), observed(tokens[::-1])
    assert one is not None
    assert other is not None
    assert one.spread_across_deg == pytest.approx(other.spread_across_deg)
    assert one.spread_within_deg == pytest.approx(other.spread_within_deg)
    assert one.explained == pytest.approx(other.explained, rel=1e-3)


def test_tokens_that_are_not_finite_or_nothing_are_left_out() -> None:
    tokens = images([4, 6])
    spoilt = [
        torch.cat([each, torch.full((1, N), bad), torch.zeros(1, N)])
        for each, bad in zip(tokens, (math.nan, math.inf), strict=True)
    ]
    spoilt.append(torch.full((2, N), math.nan))
    assert observed(spoilt) == observed(tokens)


def test_without_a_token_there_is_no_direction() -> None:
    found = ObservedDirection()
    found.add(torch.zeros(0, N))
    assert found.direction is None
    assert found.record({}) is None


def test_one_token_spreads_nowhere() -> None:
    summed = observed([drawn(1, N)])
    assert summed is not None
    assert (summed.tokens, summed.images) == (1, 1)
    assert summed.explained == pytest.approx(1)
    assert summed.spread_within_deg is None
    assert summed.spread_across_deg is None


def test_one_image_spreads_within_and_not_across() -> None:
    summed = observed(images([5]))
    assert summed is not None
    assert summed.spread_within_deg is not None
    assert summed.spread_across_deg is None


def test_images_of_one_token_each_spread_across_and_not_within() -> None:
    summed = observed(images([1, 1, 1]))
    assert summed is not None
    assert summed.spread_within_deg is None
    assert summed.spread_across_deg is not None


def test_equal_tokens_spread_by_nothing_and_orthogonal_by_right_angles() -> None:
    a, b = torch.eye(N)[:2]
    same = observed([torch.stack([a, -2 * a]), torch.stack([3 * a, a])])
    apart = observed([a[None], b[None]])
    assert same is not None
    assert apart is not None
    assert same.spread_within_deg == pytest.approx(0, abs=1e-5)
    assert same.spread_across_deg == pytest.approx(0, abs=1e-5)
    assert same.explained == pytest.approx(1)
    assert apart.spread_across_deg == pytest.approx(90)
    assert apart.explained == pytest.approx(0.5)


def test_the_angle_to_each_predicted_direction_is_reported() -> None:
    tokens = images([5, 6], noise=0.0, bend=0.0)
    nu = leading(torch.cat(tokens))
    other = drawn(N, seed=11)
    other -= (other @ nu) * nu
    half = nu + other / other.norm()
    summed = observed(tokens, cumulative=-nu, block=other, mlp=half)
    assert summed is not None
    assert summed.angle_to_predicted_deg == pytest.approx({"cumulative": 0.0, "block": 90.0, "mlp": 45.0}, abs=1e-4)


def test_merged_observations_are_those_of_all_images() -> None:
    generator = torch.Generator().manual_seed(0)
    nu = torch.randn(24, generator=generator)
    images = [nu + 0.2 * torch.randn(count, 24, generator=generator) for count in (3, 1, 5, 2)]
    whole, first, second = (ObservedDirection() for _ in range(3))
    for at, tokens in enumerate(images):
        whole.add(tokens)
        (first if at % 2 else second).add(tokens)
    first.merge(second)
    first.merge(ObservedDirection())
    predicted = {"cumulative": nu / nu.norm()}
    found, expected = first.record(predicted), whole.record(predicted)
    assert found is not None
    assert expected is not None
    assert (found.tokens, found.images) == (expected.tokens, expected.images) == (11, 4)
    assert found.spread_within_deg == pytest.approx(expected.spread_within_deg, abs=1e-3)
    assert found.spread_across_deg == pytest.approx(expected.spread_across_deg, abs=1e-3)
    assert found.angle_to_predicted_deg == pytest.approx(expected.angle_to_predicted_deg, abs=1e-3)
