"""Equation (5) against a loop over tokens in plain Python."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sinder_cli.defects.detection import (
    CERTAIN,
    FLOODED,
    RISE,
    DetectionRule,
    alignment_logits,
    alignments,
    defect_mask,
    defective_now,
    defective_somewhere,
    flooded_images,
    interior,
    norm_ratios,
    outlying,
)
from sinder_cli.defects.settings import DetectionSettings

N = 16


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(spots: list[tuple[int, int]], size: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Patches `[1, h, w, N]` nearly orthogonal to ν but for `spots`, and ν."""
    nu = drawn(N, seed=99)
    nu = nu / nu.norm()
    patches = drawn(1, size, size, N, seed=seed)
    patches = patches - 0.95 * (patches @ nu)[..., None] * nu
    for row, column in spots:
        patches[0, row, column] -= 40 * nu  # the sign does not matter
    return patches, nu


def looped_logits(image: list[list[list[float]]], nu: list[float]) -> list[list[float]]:
    def cosine(x: list[float]) -> float:
        dot = sum(a * b for a, b in zip(x, nu, strict=True))
        return dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in nu))

    return [[-abs(cosine(x)) for x in row] for row in image]


def looped_mask(logits: list[list[float]], threshold: float, margin: int) -> list[list[bool]]:
    flat = [logit for row in logits for logit in row]
    limit = statistics.fmean(flat) - threshold * statistics.stdev(flat)  # stdev divides by n − 1
    height, width = len(logits), len(logits[0])
    return [
        [
            logits[r][c] < limit and margin <= r < height - margin and margin <= c < width - margin
            for c in range(width)
        ]
        for r in range(height)
    ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    seed=st.integers(0, 1000),
    threshold=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    margin=st.sampled_from([1, 2]),
)
def test_the_mask_is_that_of_a_loop_over_tokens(
    height: int, width: int, seed: int, threshold: float, margin: int
) -> None:
    patches, nu = drawn(2, height, width, N, seed=seed), 3 * drawn(N, seed=seed + 1)
    logits = alignment_logits(patches, nu)
    masks = defect_mask(logits, DetectionRule(threshold, margin=margin))
    for image, found, mask in zip(patches, logits, masks, strict=True):
        expected = looped_logits(image.tolist(), nu.tolist())
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)
        assert mask.tolist() == looped_mask(found.tolist(), threshold, margin)


def test_logits_do_not_depend_on_lengths_or_signs() -> None:
    patches, nu = drawn(1, 5, 5, N), drawn(N, seed=1)
    torch.testing.assert_close(alignment_logits(-7 * patches, 0.1 * nu), alignment_logits(patches, nu))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alignments_to_several_directions_are_those_to_each(dtype: torch.dtype) -> None:
    patches, directions = drawn(2, 3, 4, N), torch.arange(1, 6, dtype=dtype)[:, None] * drawn(5, N, seed=1).to(dtype)
    found = alignments(patches, directions)
    assert (found.shape, found.dtype) == ((2, 3, 4, 5), torch.float32)
    for at, nu in enumerate(directions.tolist()):
        expected = -torch.tensor([looped_logits(image, nu) for image in patches.tolist()])
        torch.testing.assert_close(found[..., at], expected, atol=1e-6, rtol=0)


def test_logits_are_float32_whatever_the_tokens_are() -> None:
    patches, nu = drawn(1, 5, 5, N), drawn(N, seed=1)
    assert alignment_logits(patches.bfloat16(), nu).dtype == torch.float32
    assert alignment_logits(torch.zeros(1, 2, 2, N), nu).eq(0).all()


def test_planted_tokens_are_marked_and_no_others() -> None:
    spots = [(3, 4), (6, 6), (9, 2)]
    patches, nu = planted(spots)
    mask = defect_mask(alignment_logits(patches, nu), DetectionRule())
    assert [tuple(spot) for spot in mask[0].nonzero().tolist()] == spots


@pytest.mark.parametrize(("kernel", "border"), [(3, (0, 5)), (3, (11, 5)), (5, (1, 5)), (5, (6, 10))])
def test_a_token_near_the_border_is_never_marked(kernel: int, border: tuple[int, int]) -> None:
    inside = (5, 5)
    patches, nu = planted([border, inside])
    rule = DetectionRule.of(DetectionSettings.model_validate({"kernel": kernel}))
    mask = defect_mask(alignment_logits(patches, nu), rule)
    assert mask[0].nonzero().tolist() == [list(inside)]


def test_the_unbiased_deviation_decides_a_close_case() -> None:
    # one token of n at −1, the others at 0: mean − t·std = −1/n − t/√n (unbiased) or −1/n − t·√(n−1)/n (biased)
    n = 25
    logits = torch.zeros(1, 5, 5)
    logits[0, 2, 2] = -1.0
    unbiased, biased = (1 - 1 / n) * math.sqrt(n), (1 - 1 / n) * n / math.sqrt(n - 1)
    between = (unbiased + biased) / 2
    assert not defect_mask(logits, DetectionRule(between)).any()
    assert defect_mask(logits, DetectionRule(unbiased - 1e-3)).sum() == 1


def test_border_patches_count_in_the_mean_and_the_deviation() -> None:
    logits = torch.zeros(1, 5, 5)
    logits[0, 2, 2] = -1.0
    assert defect_mask(logits, DetectionRule(4.0)).sum() == 1
    logits[0, 0, :] = -1.0
    assert not defect_mask(logits, DetectionRule(4.0)).any()


def test_an_image_has_a_deviation_of_its_own() -> None:
    logits = torch.zeros(2, 5, 5)
    logits[0, 2, 2] = -1.0  # mean − 4·std = −0.84
    logits[1, :, ::2] = -30.0
    assert defect_mask(logits, DetectionRule()).nonzero().tolist() == [[0, 2, 2]]


def test_no_token_of_an_image_of_equal_tokens_is_marked() -> None:
    assert not defect_mask(torch.zeros(1, 5, 5), DetectionRule()).any()


def test_an_image_is_judged_by_itself_whatever_its_batch() -> None:
    first, nu = planted([(3, 4), (6, 6), (9, 2)], seed=1)
    second, _ = planted([(5, 5)], seed=2)
    third = 1000 * drawn(1, 12, 12, N, seed=3)
    logits = alignment_logits(torch.cat([first, second, third]), nu)
    masks = defect_mask(logits, DetectionRule())
    for index, image in enumerate((first, second, third)):
        assert torch.equal(masks[index], defect_mask(alignment_logits(image, nu), DetectionRule())[0])
    assert masks.flatten(1).sum(dim=1).tolist()[:2] == [3, 1]


@pytest.mark.parametrize(("height", "width", "margin"), [(1, 1, 1), (2, 5, 1), (4, 4, 2), (3, 9, 2)])
def test_a_grid_without_an_interior_has_no_marked_token(height: int, width: int, margin: int) -> None:
    assert not interior(torch.zeros(height, width, dtype=torch.bool), margin).any()


def test_the_interior_is_what_the_margin_leaves() -> None:
    inside = interior(torch.zeros(7, 4, 6, dtype=torch.bool), 1)
    assert inside.tolist() == [[0 < r < 3 and 0 < c < 5 for c in range(6)] for r in range(4)]


def test_a_direction_is_trusted_from_the_least_gap_on() -> None:
    rule = DetectionRule.of(DetectionSettings())
    assert [rule.trusts(gap) for gap in (1.0, 1.099, 1.1, 5.0, math.inf)] == [False, False, True, True, True]
    assert DetectionRule.of(DetectionSettings(min_gap=0)).trusts(1.0)


def test_the_defaults_are_those_of_the_paper() -> None:
    paper = DetectionRule(threshold=4.0, min_tokens=3, min_gap=1.1, margin=1)
    assert DetectionRule.of(DetectionSettings()) == DetectionRule() == paper
    assert DetectionRule.of(DetectionSettings(kernel=5)).margin == 2


def looped_ratios(norms: list[list[float]]) -> list[list[float]]:
    middle = sorted(norm for row in norms for norm in row if not math.isnan(norm))
    return [[norm / middle[(len(middle) - 1) // 2] for norm in row] for row in norms]  # the lower one of two


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 6), width=st.integers(1, 6), seed=st.integers(0, 1000))
def test_ratios_are_norms_over_the_median_of_their_own_image(height: int, width: int, seed: int) -> None:
    norms = drawn(3, height, width, seed=seed).abs() + 0.1
    expected = torch.tensor([looped_ratios(image) for image in norms.tolist()])
    torch.testing.assert_close(norm_ratios(norms), expected)


def test_a_token_that_is_not_finite_hides_no_other() -> None:
    norms = torch.ones(1, 3, 3)
    norms[0, 0, 0], norms[0, 1, 1] = math.nan, 5.0
    ratios = norm_ratios(norms)
    assert ratios[0, 1, 1] == 5
    assert outlying(ratios, torch.ones(1, 3, 3), 3.0).nonzero().tolist() == [[0, 1, 1]]


@pytest.mark.parametrize(
    ("start", "ratio", "out"),
    [(1.0, 3.0, False), (1.0, 3.01, True), (2.5, 3.5, False), (2.5, 3.76, True), (4.0, 6.0, False), (4.0, 6.1, True)],
)
def test_a_token_is_outlying_if_it_rose_above_the_factor(start: float, ratio: float, out: bool) -> None:
    found = outlying(torch.full((2, 1, 1, 1), ratio), torch.full((1, 1, 1), start), 3.0)
    assert found.flatten().tolist() == [out, out]
    assert out is (ratio > 3.0 and ratio > RISE * start)


RATIOS = (1.0, 6.0, 6.1)  # ordinary, outlying, and so far out that there is no doubt
MARKED = {  # by the ratio, and whether equation (5) predicts the token
    "weights": {(6.0, True), (6.1, True)},
    "norm": {(6.0, False), (6.0, True), (6.1, False), (6.1, True)},
    "auto": {(6.0, True), (6.1, False), (6.1, True)},
}


@pytest.mark.parametrize("mark", MARKED)
def test_tokens_are_marked_by_weights_by_norm_or_by_both(mark: str) -> None:
    assert RATIOS[1] == 3.0 * CERTAIN < RATIOS[2]
    pairs = [(ratio, predicted) for ratio in RATIOS for predicted in (False, True)]
    ratios = torch.tensor([ratio for ratio, _ in pairs]).view(1, 2, 3)
    predicted = torch.tensor([seen for _, seen in pairs]).view(1, 2, 3)
    rule = DetectionRule.of(DetectionSettings.model_validate({"mark": mark}))
    found = defective_now(ratios, torch.ones(1, 2, 3), predicted, rule).flatten().tolist()
    assert {pair for pair, marked in zip(pairs, found, strict=True) if marked} == MARKED[mark]
    contrast = torch.full((1, 2, 3), 5.0)  # what stands out at the embedding already is marked by nothing
    assert not defective_now(ratios, contrast, predicted, rule).any()


@pytest.mark.parametrize("mark", MARKED)
def test_without_a_norm_factor_equation_5_alone_marks(mark: str) -> None:
    predicted = drawn(4, 2, 5, 5) > 1
    ratios = 10 * drawn(4, 2, 5, 5, seed=1).abs()
    rule = DetectionRule(norm_factor=0, mark=mark)  # type: ignore[arg-type]
    assert torch.equal(defective_now(ratios[0], torch.ones(2, 5, 5), predicted[0], rule), predicted[0])
    assert torch.equal(defective_somewhere(ratios, torch.ones(2, 5, 5), predicted, rule), predicted)


@pytest.mark.parametrize(
    ("ratios", "marked"),
    [
        ([1.0, 3.5, 1.0, 1.0], []),  # for a moment
        ([1.0, 3.5, 3.5, 1.0], [1, 2]),
        ([3.5, 3.5, 1.0, 3.5], [0, 1]),
        ([1.0, 1.0, 3.5, 3.5], [2, 3]),
        ([1.0, 6.1, 1.0, 1.0], [1]),
        ([1.0, 3.5, 6.1, 3.5], [1, 2, 3]),
        ([3.5, 1.0, 3.5, 1.0], []),  # in no two that follow each other
    ],
)
def test_auto_marks_tokens_that_stay_outlying_in_a_neighbouring_block(ratios: list[float], marked: list[int]) -> None:
    nothing = torch.zeros(4, 1, 1, 1, dtype=torch.bool)
    blocks = torch.tensor(ratios).view(4, 1, 1, 1)
    found = defective_somewhere(blocks, torch.ones(1, 1, 1), nothing, DetectionRule())
    assert found.flatten().nonzero()[:, 0].tolist() == marked
    by_norm = defective_somewhere(blocks, torch.ones(1, 1, 1), nothing, DetectionRule(mark="norm"))
    assert by_norm.flatten().tolist() == [ratio > 3 for ratio in ratios]
    assert not defective_somewhere(blocks, torch.ones(1, 1, 1), nothing, DetectionRule(mark="weights")).any()


def test_no_image_makes_a_token_of_another_stay() -> None:
    ratios = torch.ones(2, 2, 3, 3)
    ratios[0, 0, 1, 1] = ratios[1, 1, 1, 1] = ratios[1, 0, 1, 2] = 3.5
    nothing = torch.zeros(2, 2, 3, 3, dtype=torch.bool)
    assert not defective_somewhere(ratios, torch.ones(2, 3, 3), nothing, DetectionRule()).any()


@pytest.mark.parametrize("factor", [0.5, 1.3, FLOODED * 0.99])
def test_an_image_of_far_higher_median_norm_is_flooded(factor: float) -> None:
    usual = torch.tensor([1.0, 5.0, 3.0])
    medians = {at: usual * (1 + 0.01 * at) for at in range(9)}
    assert flooded_images(medians | {20: usual * factor}) == set()
    assert flooded_images(medians | {20: usual * torch.tensor([1.0, 2 * FLOODED, 1.0])}) == {20}
    assert flooded_images({}) == flooded_images({0: usual, 1: usual * 9, 2: usual, 3: usual}) == set()  # too few


@pytest.mark.parametrize(
    ("rule", "doubtful", "determined"),
    [
        (DetectionRule(), True, True),
        (DetectionRule(mark="norm"), True, True),
        (DetectionRule(mark="weights"), False, True),
        (DetectionRule(norm_factor=0), False, True),
    ],
)
def test_a_block_can_be_marked_by_norm_or_along_a_determined_direction(
    rule: DetectionRule, doubtful: bool, determined: bool
) -> None:
    assert (rule.can_mark(1.0), rule.can_mark(2.0)) == (doubtful, determined)
    assert rule.marks_by_norm is doubtful
