"""From numbers to an answer: each kind of verdict, its limits, and its words."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinder_cli.analysis.records import BlockRecord, Distribution, Marked, Observed, Rule, Verdict
from sinder_cli.analysis.verdict import CLEAR_GAP, CLEAR_TOKENS, PREDICTED_DEGREES, judge
from sinder_cli.defects.settings import MIN_GAP, STAGES

PATCHES = 10_000


def marked(tokens: int | None) -> Marked | None:
    return None if tokens is None else Marked(tokens=tokens, share=tokens / PATCHES, images=1, positions=())


def block(
    number: int,
    outlying: int = 0,
    gap: float = 1.0,
    angle: float | None = None,
    equation_5: int | None = None,
    above_threshold: int | None = None,
) -> BlockRecord:
    """One block; equation (5) applies where the direction is determined."""
    determined = gap >= MIN_GAP
    found: dict[Rule, Marked | None] = {
        "equation_5": marked(equation_5 if equation_5 is not None or not determined else 0),
        "outlying": marked(outlying),
        "above_threshold": marked(above_threshold),
    }
    angles = dict.fromkeys(STAGES, 80.0)
    observed = None
    if angle is not None:
        observed = Observed(
            tokens=max(outlying, 1), images=1, explained=0.9, spread_within_deg=None, spread_across_deg=None,
            angle_to_predicted_deg=angles | {"cumulative": angle},
        )  # fmt: skip
    one = Distribution(count=PATCHES, mean=1, min=1, p01=1, median=1, p99=1, max=1)
    return BlockRecord(
        block=number,
        patch_norm=one,
        cls_norm=None,
        register_norm=None,
        nonfinite=0,
        gap=dict.fromkeys(STAGES, 1.0) | {"cumulative": gap},
        determined=determined,
        angle_deg=dict.fromkeys(STAGES),
        marked=found,
        agreement={},
        observed=observed,
    )


def test_outlying_tokens_along_a_determined_direction_are_defects() -> None:
    verdict = judge([block(0), block(1, 50, 1.4, 12.0), block(2, 300, 3.1, 4.0), block(3, 20, 2.0, 9.0)], 3)
    assert verdict.kind == "defects"
    assert verdict.first_block == 1
    assert (verdict.tokens, verdict.gap, verdict.angle_to_predicted_deg) == (300, 3.1, 4.0)
    assert verdict.sentence == (
        "defects from block 1: 300 tokens (3 %) at block 2 have a norm above 3 × their image's median. "
        "Their direction is the one that the weights predict, 4.0° off at block 2."
    )
    assert verdict.confidence == (
        "Little doubt: σ₁/σ₂ is 3.1 at block 2, the direction was seen on 300 tokens there, and it lies within"
        " 30° of the predicted one in 3 of 3 blocks."
    )


def test_the_first_block_is_the_first_that_shows_outliers() -> None:
    verdict = judge([block(0), block(1, 5, 1.0, 80.0), block(2, 5, 1.5, 10.0)], 3)
    assert (verdict.kind, verdict.first_block) == ("defects", 1)


def test_strays_in_an_early_block_do_not_move_the_beginning() -> None:
    later = [block(number, 300, 3.0, 5.0) for number in (3, 4, 5)]
    assert judge([block(0), block(1, 3, 1.0, 80.0), block(2), *later], 3).first_block == 3


def test_a_few_strays_among_very_many_tokens_show_nothing() -> None:
    stray = block(0, 3, 2.0, 80.0)
    few = Marked(tokens=3, share=3 / 13_700_000, images=0, positions=())
    assert judge([stray], 3).fails
    assert not judge([stray.model_copy(update={"marked": stray.marked | {"outlying": few}})], 3).fails


def test_a_direction_that_is_near_in_few_blocks_leaves_doubt() -> None:
    verdict = judge([block(0, 300, 3.0, 29.0), *(block(number, 300, 3.0, 85.0) for number in range(1, 6))], 3)
    assert verdict.kind == "defects"
    assert verdict.confidence.startswith(
        "Some doubt, since in most blocks the observed direction is further from the predicted one: "
    )
    assert "in 1 of 6 blocks" in verdict.confidence


def test_tokens_that_are_not_finite_come_before_all_else() -> None:
    broken = [each.model_copy(update={"nonfinite": 7 * each.block}) for each in (block(1, 300, 3.0, 5.0), block(2))]
    verdict = judge([block(0, 300, 3.0, 5.0), *broken], 3)
    assert (verdict.kind, verdict.first_block, verdict.tokens) == ("broken", 1, 14)
    assert verdict.fails
    assert verdict.sentence == "tokens that are not finite from block 1: 14 patch tokens are NaN or infinite."


@pytest.mark.parametrize(
    ("tokens", "gap", "word"),
    [
        (CLEAR_TOKENS, CLEAR_GAP, "Little doubt"),
        (CLEAR_TOKENS - 1, CLEAR_GAP, "Some doubt"),
        (CLEAR_TOKENS, CLEAR_GAP - 0.01, "Some doubt"),
    ],
)
def test_few_tokens_or_a_small_gap_leave_some_doubt(tokens: int, gap: float, word: str) -> None:
    verdict = judge([block(0, tokens, gap, 5.0)], 3)
    assert verdict.kind == "defects"
    assert verdict.confidence.startswith(word)


@pytest.mark.parametrize(
    ("angle", "kind"),
    [(0.0, "defects"), (PREDICTED_DEGREES, "defects"), (30.001, "unpredicted"), (90.0, "unpredicted")],
)
def test_thirty_degrees_part_the_predicted_from_the_unpredicted(angle: float, kind: str) -> None:
    assert judge([block(0, 50, 2.0, angle)], 3).kind == kind


@pytest.mark.parametrize(("gap", "kind"), [(MIN_GAP, "defects"), (MIN_GAP - 0.001, "unpredicted")])
def test_a_direction_that_is_not_determined_predicts_nothing_however_near(gap: float, kind: str) -> None:
    assert judge([block(0, 50, gap, 0.0)], 3).kind == kind


def test_outlying_tokens_off_the_predicted_direction_are_told_as_such() -> None:
    verdict = judge([block(0), block(1, 60, 1.5, 70.0), block(2, 80, 1.3, 41.6)], 3)
    assert (verdict.kind, verdict.first_block, verdict.tokens) == ("unpredicted", 1, 80)
    assert (verdict.gap, verdict.angle_to_predicted_deg) == (1.3, 41.6)
    assert verdict.sentence == (
        "outlying tokens from block 1, not predicted by the weights: "
        "80 tokens (0.8 %) at block 2 have a norm above 3 × their image's median."
    )
    assert "at the nearest, block 2, it lies 42° from the predicted one" in verdict.confidence


def test_outlying_tokens_where_no_direction_is_determined_are_unpredicted() -> None:
    verdict = judge([block(0, 60, 1.05, 10.0), block(1, 80, 1.02, 20.0)], 3)
    assert (verdict.kind, verdict.first_block) == ("unpredicted", 0)
    assert "σ₁/σ₂ of the predicted one is at most 1.05 there, so that the weights determine none" in verdict.confidence


def test_a_determined_block_goes_before_an_accidentally_nearer_one() -> None:
    verdict = judge([block(0, 60, 1.0, 5.0), block(1, 60, 1.5, 50.0)], 3)
    assert verdict.kind == "unpredicted"
    assert verdict.angle_to_predicted_deg == 50.0


def test_outliers_without_an_observed_direction_are_unpredicted() -> None:
    assert judge([block(0, 60, 1.5, None)], 3).kind == "unpredicted"


def test_one_or_two_tokens_that_equation_5_marks_are_chance_however_few_count() -> None:
    assert judge([block(0, 0, 2.0, None, equation_5=2)], 1).kind == "none"
    assert judge([block(0, 0, 2.0, None, equation_5=3)], 1).kind == "aligned"


def test_tokens_of_ordinary_norm_along_the_direction_are_aligned() -> None:
    verdict = judge([block(0), block(1, 2, 1.5, 1.0, equation_5=8), block(2, 0, 2.5, equation_5=40)], 3)
    assert (verdict.kind, verdict.first_block, verdict.tokens, verdict.gap) == ("aligned", 1, 40, 2.5)
    assert verdict.angle_to_predicted_deg is None
    assert verdict.sentence == (
        "no outlying norms, but tokens along the predicted direction from block 1: "
        "40 tokens (0.4 %) at block 2 are marked by equation (5)."
    )


def test_nothing_is_no_defect() -> None:
    verdict = judge([block(0), block(1, 2, 1.04, 3.0)], 3)
    assert (verdict.kind, verdict.first_block, verdict.tokens) == ("none", None, 0)
    assert verdict.sentence == "no defects: in no block do 3 tokens or more have a norm above 3 × their image's median."
    assert verdict.confidence == (
        "10,000 patch tokens per block were seen; the predicted direction is determined in no block (σ₁/σ₂ up to 1.04)."
    )
    assert "is determined in some block" in judge([block(0, gap=1.7)], 3).confidence


def test_without_an_outlying_token_the_model_is_healthy() -> None:
    verdict = judge([block(0), block(1), block(2, gap=1.5)], 3)
    assert verdict.kind == "none"
    assert verdict.sentence == (
        "healthy: no token is outlying in any block, none has a norm above 3 × its image's median."
    )
    for at in range(3):  # not even in the middle
        assert "healthy" not in judge([block(number, int(number == at)) for number in range(3)], 3).sentence


def test_strays_are_no_defects_and_not_called_healthy() -> None:
    few = Marked(tokens=5, share=5 / 13_700_000, images=0, positions=())
    stray = block(1)
    verdict = judge([block(0), stray.model_copy(update={"marked": stray.marked | {"outlying": few}})], 3)
    assert verdict.sentence.startswith(
        "no defects: tokens that have a norm above 3 × their image's median are too few to count"
    )


def test_outliers_of_a_middle_block_are_seen_despite_clean_ones() -> None:
    verdict = judge([block(0), block(1, 90, 1.0, 70.0), block(2), block(3)], 3)
    assert (verdict.kind, verdict.first_block, verdict.tokens) == ("unpredicted", 1, 90)


def test_the_words_name_the_factor_in_force() -> None:
    assert "a norm above 4.5 × their image's median" in judge([block(0, 50, 2.0, 5.0)], 3, 4.5).sentence
    assert judge([block(0)], 3, 4.5).sentence.endswith("above 4.5 × its image's median.")


@pytest.mark.parametrize("min_tokens", [1, 3, 10])
def test_so_many_tokens_show_and_one_less_does_not(min_tokens: int) -> None:
    assert judge([block(0, min_tokens, 2.0, 5.0)], min_tokens).kind == "defects"
    assert judge([block(0, min_tokens - 1, 2.0, 5.0)], min_tokens).kind == "none"
    assert judge([block(0, 0, 2.0, None, equation_5=max(min_tokens, 3))], min_tokens).kind == "aligned"
    assert judge([block(0, 0, 2.0, None, equation_5=min_tokens - 1)], min_tokens).kind == "none"


def test_a_norm_threshold_takes_the_place_of_three_medians() -> None:
    shown = [block(0, 50, 2.0, 5.0, above_threshold=0), block(1, 0, 2.0, 7.0, above_threshold=9)]
    verdict = judge(shown, 3)
    assert (verdict.kind, verdict.first_block, verdict.tokens) == ("defects", 1, 9)
    assert "have a norm above the threshold" in verdict.sentence
    none = judge([block(0, 50, 2.0, 5.0, above_threshold=0)], 3)
    assert none.kind == "none"
    assert none.sentence.endswith("have a norm above the threshold.")


def drawn_blocks() -> st.SearchStrategy[list[BlockRecord]]:
    counts = st.sampled_from([0, 1, 2, 3, 4, 50])
    one = st.tuples(
        counts, st.floats(1.0, 3.0), st.none() | st.floats(0, 90), st.none() | counts, st.none() | counts
    )  # fmt: skip
    return st.lists(one, min_size=1, max_size=6).map(lambda rows: [block(at, *row) for at, row in enumerate(rows)])


@settings(max_examples=300, deadline=None)
@given(drawn_blocks())
def test_defects_need_a_determined_direction_near_the_observed_one(blocks: list[BlockRecord]) -> None:
    verdict = judge(blocks, 3)
    threshold = any(each.marked["above_threshold"] is not None for each in blocks)
    rule: Rule = "above_threshold" if threshold else "outlying"

    def tokens(each: BlockRecord, by: Rule) -> int:
        found = each.marked[by]
        return found.tokens if found else 0

    showing = [each for each in blocks if tokens(each, rule) >= 3]
    near = [
        each
        for each in showing
        if each.determined and each.observed and each.observed.angle_to_predicted_deg["cumulative"] <= 30
    ]
    aligned = [each for each in blocks if tokens(each, "equation_5") >= 3]
    expected = "defects" if near else "unpredicted" if showing else "aligned" if aligned else "none"
    assert verdict.kind == expected
    assert verdict.fails == bool(showing)
    shown = [each.block for each in showing or aligned]
    assert (verdict.first_block in shown) if shown else (verdict.first_block is None)
    if showing:
        assert verdict.first_block is not None
        assert verdict.first_block - 1 not in shown
    if verdict.kind == "defects":
        assert verdict.gap is not None
        assert verdict.gap >= MIN_GAP
        assert verdict.angle_to_predicted_deg is not None
        assert verdict.angle_to_predicted_deg <= 30
    assert verdict.sentence.endswith(".")
    assert verdict.confidence.endswith(".")
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict
