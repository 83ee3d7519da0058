"""A look at photographs: plain words that fit a terminal, and panels that say what they show."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from typing import Any

import pytest
from made_analysis import Made

from sinder_cli.analysis.records import Analysis, Distribution, Gain, ImageInpainting, Inpainting, Verdict
from sinder_cli.analysis.run import AnalysisResult
from sinder_cli.report.analysis.look import Answer, _rows, answer_of

RESULT = Made(images=1).result()
VERDICTS = {  # as `judge` words them, with numbers of many letters
    "defects": ("defects from block 17: …", "Some doubt, since …: …"),
    "unpredicted": (
        "outlying tokens from block 17, not predicted by the weights: …",
        "Their direction is not that of a singular defect: σ₁/σ₂ of the predicted one is at most 1.05 there, so"
        " that the weights determine none.",
    ),
    "aligned": (
        "no outlying norms, but tokens along the predicted direction from block 17: …",
        "σ₁/σ₂ is 1.43 at block 17; tokens of ordinary norm seldom harm.",
    ),
    "none": (
        "no defects: tokens that have a norm above 3 × their image's median are too few to count, at most 2 tokens"
        " (0.0038 %) at block 17.",
        "52,345 patch tokens per block were seen; the predicted direction is determined in no block"
        " (σ₁/σ₂ up to 25.5).",
    ),
    "broken": (
        "tokens that are not finite from block 17: 52,345 patch tokens are NaN or infinite.",
        "Nothing else can be said about this model: check its weights, and that the precision is enough.",
    ),
}


def around(value: float, p01: float | None = None) -> Distribution:
    low = value if p01 is None else p01
    return Distribution(count=10, mean=value, min=low, p01=low, median=value, p99=value, max=value)


def inpainting(gain: Gain | None, cls: float | None = 0.9997, good: float = 0.99999, **given: Any) -> Inpainting:
    image = ImageInpainting(
        image="a.jpg", tokens=9, max_ratio=1234.5, block=17, cls_cosine=cls, good_cosine=good, marked_cosine=0.01
    )
    facts: dict[str, Any] = {
        "gain": gain,
        "sentence": "…",
        "tokens": 9,
        "unmarked": 0,
        "images": 1,
        "replaced": 9,
        "cls_cosine": None if cls is None else around(cls),
        "good_cosine": around(good),
        "marked_cosine": around(0.01),
        "by_image": (image,),
    }
    return Inpainting(**{**facts, **given})


def answered(found: Inpainting | None, kind: str = "defects", images: int = 1, **more: Any) -> Answer:
    sentence, confidence = VERDICTS[kind]
    verdict = Verdict(
        kind=kind, first_block=17, sentence=sentence, confidence=confidence, tokens=12_345, gap=25.51,
        angle_to_predicted_deg=12.3, block=17,
    )  # fmt: skip
    changed: dict[str, Any] = {"inpainting": found, "verdict": verdict, "images": images, **more}
    return answer_of("m", replace(RESULT, analysis=RESULT.analysis.model_copy(update=changed)))


@pytest.mark.parametrize(
    ("gain", "cls", "begins"),
    [
        ("features", 0.95, "Repair: yes, "),
        ("features", 0.5, "Repair: yes, "),
        ("marked", 0.9997, "Repair: it would help little, "),
        ("none", 0.9997, "Repair: no. "),
        ("healthy", 1.0, "Repair: no, "),
        (None, 1.0, "Repair: no. "),
    ],
)
def test_the_last_line_says_plainly_whether_to_repair(gain: Gain | None, cls: float, begins: str) -> None:
    answer = answered(inpainting(gain, cls))
    assert answer.lines[-1].startswith(begins)
    assert answer.repair == (gain in ("features", "marked"))


@pytest.mark.parametrize("gain", ["features", "marked", "none"])
def test_the_angle_of_cls_is_told_on_both_sides_of_the_threshold(gain: Gain) -> None:
    line = answered(inpainting(gain, good=0.995)).lines[2]
    assert line == (
        "Without its outlying tokens (9) cls would move by 1.4°, good tokens by 5.7° (1 % over 5.7°),"
        " marked ones by 89°."
    )


def test_without_cls_good_patches_move() -> None:
    line = answered(inpainting("marked", cls=None), images=3).lines[2]
    assert line.startswith("Without its outlying tokens (9 in 1 of 3 photographs) good tokens would move by 0.26°")


def test_a_cls_that_moves_far_is_warned_of() -> None:
    assert "outliers may carry information" in answered(inpainting("features", 0.5)).lines[-1]
    assert "outliers may carry information" not in answered(inpainting("features", 0.95)).lines[-1]


def test_tokens_that_no_rule_is_certain_of_are_told() -> None:
    answer = answered(inpainting("healthy", unmarked=5))
    assert answer.lines[-1] == (
        "Repair: no. Stand out by norm: 5, none certain to be a defect (--mark norm marks them all)."
    )


def test_without_an_inpainted_pass_no_repair_is_spoken_of() -> None:
    assert len(answered(None).lines) == 2


@pytest.mark.parametrize("kind", list(VERDICTS))
@pytest.mark.parametrize("gain", ["features", "far", "marked", "none", "healthy", "unmarked", None])
def test_each_line_takes_two_of_a_terminal_at_most(kind: str, gain: str | None) -> None:
    many: dict[str, Any] = {"tokens": 12_345, "images": 8}
    found = {
        "features": inpainting("features", 0.95, 0.995, **many),
        "far": inpainting("features", -0.2, 0.5, **many),
        "marked": inpainting("marked", **many),
        "none": inpainting("none", **many),
        "healthy": inpainting("healthy"),
        "unmarked": inpainting("healthy", unmarked=12_345),
        None: inpainting(None),
    }[gain]
    for line in answered(found, kind, images=8).lines:
        shown = textwrap.wrap(line, 80, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        assert len(shown) <= 2, line


def test_panels_say_what_they_show() -> None:
    row = _rows("m", Made(images=1).result(), None, None)[0]  # its portraits are made once
    assert row.heading.endswith("norms: bright stands out (log scale)")
    labels = [each.label for each in row.pictures]
    assert labels[0] == "photograph"
    norms = labels[1].removeprefix("norm, block 3: ").split(" to ")
    assert len(norms) == 2
    assert all(norm.replace(",", "").replace(".", "").isdigit() for norm in norms)


def test_large_norms_are_written_out() -> None:
    made = RESULT.analysis.blocks[-1]
    assert made.patch_norm
    large = made.patch_norm.model_copy(update={"min": 56.71, "max": 1872.4})
    blocks = (*RESULT.analysis.blocks[:-1], made.model_copy(update={"patch_norm": large}))
    found: Analysis = RESULT.analysis.model_copy(update={"blocks": blocks})
    result: AnalysisResult = replace(Made(images=1).result(), analysis=found)
    assert _rows("m", result, None, None)[0].pictures[1].label == "norm, block 3: 56.7 to 1,872"
