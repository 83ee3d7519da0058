"""Verdict on a backbone: whether it has defects, from which block on, whether weights predict them, and how sure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sinder_cli.analysis.records import BlockRecord, Marked, Rule, Verdict
from sinder_cli.defects.settings import NORM_FACTOR, PREDICTED_DEGREES

STRAY_SHARE = 1e-4  # share of all tokens: fewer are too few to count, however many images are run
ALIGNED_TOKENS = 3  # of equation (5) in a block, at least: the paper's; one or two lie there by chance
CLEAR_GAP, CLEAR_TOKENS = 2.0, 30  # σ₁/σ₂ and number of tokens from which there is little doubt


@dataclass(frozen=True)
class Norms:
    """The rule that marks tokens that stand out by norm, and its description."""

    rule: Rule
    factor: float  # × the image's median, for the rule `outlying`

    @property
    def words(self) -> str:
        if self.rule == "above_threshold":
            return "a norm above the threshold"
        return f"a norm above {self.factor:g} × their image's median"


def judge(blocks: Sequence[BlockRecord], min_tokens: int, norm_factor: float = NORM_FACTOR) -> Verdict:
    """Return the verdict on one backbone.

    A block, whichever it is, shows outlying tokens if at least `min_tokens` of them over all images, and one in 10,000,
    stand out by norm (above `norm_threshold` if one was given, else outlying by `norm_factor`). They are defects if the
    weights predict them: in some such block, the observed direction lies within 30° of a determined predicted one. They
    begin where the unbroken run of such blocks begins. Tokens that are not finite take precedence over all else.
    """
    above = any(block.marked["above_threshold"] for block in blocks)
    rule = Norms("above_threshold" if above else "outlying", norm_factor)
    broken = [block for block in blocks if block.nonfinite]
    if broken:
        return _broken(broken)
    showing = _showing(blocks, rule.rule, min_tokens)
    near = [block for block in showing if _is_near(block)]
    if near:
        return _defects(showing, near, rule)
    if showing:
        return _unpredicted(showing, rule)
    aligned = _showing(blocks, "equation_5", max(min_tokens, ALIGNED_TOKENS))
    return _aligned(aligned) if aligned else _none(blocks, rule, min_tokens)


def _broken(broken: Sequence[BlockRecord]) -> Verdict:
    first, count = broken[0].block, max(block.nonfinite for block in broken)
    return Verdict(
        kind="broken",
        first_block=first,
        sentence=f"tokens that are not finite from block {first}: {count:,} patch tokens are NaN or infinite.",
        confidence="Nothing else can be said about this model: check its weights, and that the precision is enough.",
        tokens=count,
        gap=None,
        angle_to_predicted_deg=None,
        block=None,
    )


def _defects(showing: Sequence[BlockRecord], near: Sequence[BlockRecord], rule: Norms) -> Verdict:
    best = min(near, key=_angle)
    first, most = _start_of_run(showing, best), _strongest(showing, rule.rule)
    return Verdict(
        kind="defects",
        first_block=first,
        sentence=f"defects from block {first}: {_counted(most, rule.rule)} have {rule.words}."
        f" Their direction is the one that the weights predict, {_angle(best):.1f}° off at block {best.block}.",
        confidence=_confidence(showing, near, best, rule.rule),
        gap=best.gap["cumulative"],
        tokens=_marked(most, rule.rule).tokens,
        angle_to_predicted_deg=_angle(best),
        block=best.block,
    )


def _confidence(showing: Sequence[BlockRecord], near: Sequence[BlockRecord], best: BlockRecord, rule: Rule) -> str:
    """Return how sure it is that these are the predicted defects, and what would remove a doubt."""
    gap, found = best.gap["cumulative"], _marked(best, rule).tokens
    doubts = [
        *(["the predicted direction is weakly determined"] if gap < CLEAR_GAP else []),
        *(["few tokens were seen, so more images are needed"] if found < CLEAR_TOKENS else []),
        *(
            ["in most blocks the observed direction is further from the predicted one"]
            if 2 * len(near) < len(showing)
            else []
        ),
    ]
    evidence = (
        f"σ₁/σ₂ is {gap:.3g} at block {best.block}, the direction was seen on {found:,} tokens there, and it lies"
        f" within {PREDICTED_DEGREES:.0f}° of the predicted one in {len(near)} of {len(showing)} blocks"
    )
    return f"Some doubt, since {' and '.join(doubts)}: {evidence}." if doubts else f"Little doubt: {evidence}."


def _unpredicted(showing: Sequence[BlockRecord], rule: Norms) -> Verdict:
    most = _strongest(showing, rule.rule)
    first = _start_of_run(showing, most)
    determined = [block for block in showing if block.determined]
    nearest = min(determined or showing, key=_angle)
    why = (
        f"at the nearest, block {nearest.block}, it lies {_angle(nearest):.0f}° from the predicted one"
        if determined
        else f"σ₁/σ₂ of the predicted one is at most {max(block.gap['cumulative'] for block in showing):.3g} there,"
        " so that the weights determine none"
    )
    return Verdict(
        kind="unpredicted",
        first_block=first,
        sentence=f"outlying tokens from block {first}, not predicted by the weights:"
        f" {_counted(most, rule.rule)} have {rule.words}.",
        confidence=f"Their direction is not that of a singular defect: {why}.",
        gap=nearest.gap["cumulative"],
        tokens=_marked(most, rule.rule).tokens,
        angle_to_predicted_deg=_angle(nearest),
        block=most.block,
    )


def _aligned(aligned: Sequence[BlockRecord]) -> Verdict:
    most = _strongest(aligned, "equation_5")
    return Verdict(
        kind="aligned",
        first_block=aligned[0].block,
        sentence=f"no outlying norms, but tokens along the predicted direction from block {aligned[0].block}:"
        f" {_counted(most, 'equation_5')} are marked by equation (5).",
        confidence=f"σ₁/σ₂ is {most.gap['cumulative']:.3g} at block {most.block}; tokens of ordinary norm seldom harm.",
        gap=most.gap["cumulative"],
        tokens=_marked(most, "equation_5").tokens,
        angle_to_predicted_deg=None,
        block=most.block,
    )


def _none(blocks: Sequence[BlockRecord], rule: Norms, min_tokens: int) -> Verdict:
    seen = max((block.patch_norm.count for block in blocks if block.patch_norm), default=0)
    gap = max(block.gap["cumulative"] for block in blocks)
    determined = any(block.determined for block in blocks)
    word = "is determined in some block" if determined else "is determined in no block"
    return Verdict(
        kind="none",
        first_block=None,
        sentence=_nothing(blocks, rule, min_tokens),
        confidence=f"{seen:,} patch tokens per block were seen; the predicted direction {word}"
        f" (σ₁/σ₂ up to {gap:.3g}).",
        gap=gap,
        tokens=0,
        angle_to_predicted_deg=None,
        block=None,
    )


def _nothing(blocks: Sequence[BlockRecord], rule: Norms, min_tokens: int) -> str:
    """Return the sentence that no token is outlying, or that those that stand out are too few to count.

    `defects.detection` says what `healthy` means here.
    """
    if not any(_marked(block, each).tokens for block in blocks for each in ("outlying", rule.rule)):
        words = Norms("outlying", rule.factor).words.replace("their", "its")
        return f"healthy: no token is outlying in any block, none has {words}."
    most = _strongest(blocks, rule.rule)
    if _marked(most, rule.rule).tokens >= min_tokens:
        return f"no defects: tokens that have {rule.words} are too few to count, at most {_counted(most, rule.rule)}."
    return f"no defects: in no block do {min_tokens} tokens or more have {rule.words}."


def _showing(blocks: Sequence[BlockRecord], rule: Rule, min_tokens: int) -> list[BlockRecord]:
    """Return the blocks in which a rule marks more than strays."""
    found = [(block, _marked(block, rule)) for block in blocks]
    return [block for block, marked in found if marked.tokens >= min_tokens and marked.share >= STRAY_SHARE]


def _start_of_run(showing: Sequence[BlockRecord], block: BlockRecord) -> int:
    """Return the first block of the unbroken run of showing blocks that ends at this one."""
    shown, start = {each.block for each in showing}, block.block
    while start - 1 in shown:
        start -= 1
    return start


def _is_near(block: BlockRecord) -> bool:
    """Return True if a determined predicted direction agrees with the observed one."""
    return block.determined and _angle(block) <= PREDICTED_DEGREES


def _strongest(blocks: Sequence[BlockRecord], rule: Rule) -> BlockRecord:
    return max(blocks, key=lambda block: _marked(block, rule).tokens)


def _counted(block: BlockRecord, rule: Rule) -> str:
    """Return in words how many tokens a rule marks in a block, and which share of all they are."""
    marked = _marked(block, rule)
    return f"{marked.tokens:,} tokens ({100 * marked.share:.2g} %) at block {block.block}"


def _marked(block: BlockRecord, rule: Rule) -> Marked:
    return block.marked[rule] or Marked(tokens=0, share=0.0, images=0, positions=())


def _angle(block: BlockRecord) -> float:
    """Return the degrees from the observed to the predicted direction of the cumulative stage; 90 without one."""
    return block.observed.angle_to_predicted_deg["cumulative"] if block.observed else 90.0
