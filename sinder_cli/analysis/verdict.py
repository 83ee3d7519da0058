"""From numbers to an answer: are there defects, from where on, do the weights predict them, how sure is it?"""

from __future__ import annotations

from collections.abc import Sequence

from sinder_cli.analysis.records import BlockRecord, Marked, Rule, Verdict

PREDICTED_DEGREES = 30.0  # an observed direction this near to a determined predicted one counts as predicted
CLEAR_GAP, CLEAR_TOKENS = 2.0, 30  # at which a direction, and what was seen of it, leave little doubt

RULE_WORDS: dict[Rule, str] = {
    "outlying": "a norm above 3 × their image's median",
    "above_threshold": "a norm above the threshold",
    "equation_5": "equation (5)",
}


def judge(blocks: Sequence[BlockRecord], min_tokens: int) -> Verdict:
    """The verdict on one backbone.

    A block shows outlying tokens when at least `min_tokens` of them, over all images, stand out by norm (above
    `norm_threshold` if one was given, else above 3 × the median). They are defects where the weights predict them:
    the observed direction of some such block lies within 30° of a determined predicted one.
    """
    rule: Rule = "above_threshold" if any(block.marked["above_threshold"] for block in blocks) else "outlying"
    showing = _showing(blocks, rule, min_tokens)
    near = [block for block in showing if block.determined and _angle(block) <= PREDICTED_DEGREES]
    if near:
        return _defects(showing, min(near, key=_angle), rule)
    if showing:
        return _unpredicted(showing, rule)
    aligned = _showing(blocks, "equation_5", min_tokens)
    return _aligned(aligned) if aligned else _none(blocks, rule, min_tokens)


def _defects(showing: Sequence[BlockRecord], best: BlockRecord, rule: Rule) -> Verdict:
    first, most = showing[0], _strongest(showing, rule)
    angle, gap, found = _angle(best), best.gap["cumulative"], _marked(best, rule)
    clear = gap >= CLEAR_GAP and found.tokens >= CLEAR_TOKENS
    return Verdict(
        kind="defects",
        first_block=first.block,
        sentence=f"defects from block {first.block}: {_counted(most, rule)}. Their direction is the one that the"
        f" weights predict, {angle:.1f}° off at block {best.block}.",
        confidence=f"{'Little doubt' if clear else 'Some doubt'}: σ₁/σ₂ is {gap:.3g} there, and the direction was"
        f" seen on {found.tokens:,} tokens.",
        gap=gap,
        tokens=_marked(most, rule).tokens,
        angle_to_predicted_deg=angle,
    )


def _unpredicted(showing: Sequence[BlockRecord], rule: Rule) -> Verdict:
    first, most = showing[0], _strongest(showing, rule)
    determined = [block for block in showing if block.determined]
    nearest = min(determined or showing, key=_angle)
    why = (
        f"at the nearest, block {nearest.block}, it lies {_angle(nearest):.0f}° from the predicted one"
        if determined
        else f"σ₁/σ₂ of the predicted one is at most {max(block.gap['cumulative'] for block in showing):.3g} there,"
        " so that the weights single out none"
    )
    return Verdict(
        kind="unpredicted",
        first_block=first.block,
        sentence=f"outlying tokens from block {first.block}, not predicted by the weights: {_counted(most, rule)}.",
        confidence=f"Their direction is no singular defect: {why}.",
        gap=nearest.gap["cumulative"],
        tokens=_marked(most, rule).tokens,
        angle_to_predicted_deg=_angle(nearest),
    )


def _aligned(aligned: Sequence[BlockRecord]) -> Verdict:
    most = _strongest(aligned, "equation_5")
    return Verdict(
        kind="aligned",
        first_block=aligned[0].block,
        sentence=f"no outlying norms, but tokens along the predicted direction from block {aligned[0].block}:"
        f" {_counted(most, 'equation_5')}.",
        confidence=f"σ₁/σ₂ is {most.gap['cumulative']:.3g} at block {most.block}; tokens of ordinary norm seldom harm.",
        gap=most.gap["cumulative"],
        tokens=_marked(most, "equation_5").tokens,
        angle_to_predicted_deg=None,
    )


def _none(blocks: Sequence[BlockRecord], rule: Rule, min_tokens: int) -> Verdict:
    seen = max((block.patch_norm.count for block in blocks if block.patch_norm), default=0)
    gap = max(block.gap["cumulative"] for block in blocks)
    determined = any(block.determined for block in blocks)
    word = "is determined in some block" if determined else "is determined in no block"
    return Verdict(
        kind="none",
        first_block=None,
        sentence=f"no defects: in no block do {min_tokens} tokens or more have {RULE_WORDS[rule]}.",
        confidence=f"{seen:,} patch tokens a block were looked at; the predicted direction {word} (σ₁/σ₂ ≤ {gap:.3g}).",
        gap=gap,
        tokens=0,
        angle_to_predicted_deg=None,
    )


def _showing(blocks: Sequence[BlockRecord], rule: Rule, min_tokens: int) -> list[BlockRecord]:
    return [block for block in blocks if (block.marked[rule] is not None) and _marked(block, rule).tokens >= min_tokens]


def _strongest(blocks: Sequence[BlockRecord], rule: Rule) -> BlockRecord:
    return max(blocks, key=lambda block: _marked(block, rule).tokens)


def _counted(block: BlockRecord, rule: Rule) -> str:
    """How many tokens, at the block that has most."""
    marked = _marked(block, rule)
    rule_of = "are marked by" if rule == "equation_5" else "have"
    return f"{marked.tokens:,} tokens ({100 * marked.share:.2g} %) at block {block.block} {rule_of} {RULE_WORDS[rule]}"


def _marked(block: BlockRecord, rule: Rule) -> Marked:
    return block.marked[rule] or Marked(tokens=0, share=0.0, images=0, positions=())


def _angle(block: BlockRecord) -> float:
    """Degrees from the observed to the predicted direction of the cumulative stage; 90 without one."""
    return block.observed.angle_to_predicted_deg["cumulative"] if block.observed else 90.0
