"""What is said of figures: a filter is named only where averaging was measured to be no worse."""

from __future__ import annotations

import pytest

from sinder_cli.evaluation.records import (
    DifferenceRecord,
    Evaluation,
    FigureRecord,
    SideRecord,
    TaskRecord,
    ValueRecord,
)
from sinder_cli.evaluation.sentences import headline, sentences_of

RANGES = {"better": (5.0, 4.0, 6.0), "worse": (-5.0, -6.0, -4.0), "within noise": (2.0, -0.1, 4.0)}


def difference(standing: str, images: int = 12) -> DifferenceRecord:
    if standing == "too few images":
        return DifferenceRecord(value=3.0, images=2, standing="too few images")
    value, low, high = RANGES[standing]
    return DifferenceRecord(value=value, low=low, high=high, images=images, standing=standing)  # type: ignore[arg-type]


def figure(original: str, smoothed: str | None, images: int = 12) -> FigureRecord:
    placebo = None if smoothed is None else difference(smoothed)
    repaired = ValueRecord(
        side="repaired", value=9.0, images=12, to_original=difference(original, images), to_smoothed=placebo
    )
    values = (ValueRecord(side="original", value=4.0, images=12), repaired)
    return FigureRecord(name="f", unit="%", better="higher", noise=0, values=values)


def said(original: str, smoothed: str | None, images: int = 12) -> str:
    (sentence,) = sentences_of([figure(original, smoothed, images)], "mine")
    return sentence


def test_a_repair_that_beats_averaging_is_said_to() -> None:
    assert said("better", "better") == (
        "f: mine is better than the original (+5.00 points, 95 % interval +4.00 to +6.00), and better than averaging"
        " the marked tokens at the end (+5.00 points, 95 % interval +4.00 to +6.00)."
    )
    assert said("better", None).endswith("+6.00).")


@pytest.mark.parametrize(
    ("smoothed", "words"),
    [
        (
            "within noise",
            "; but it is within noise of averaging the marked tokens at the end (+2.00 points, 95 % interval",
        ),
        (
            "worse",
            "; averaging the marked tokens at the end is better (−5.00 points, 95 % interval −6.00 to −4.00 against",
        ),
    ],
)
def test_a_filter_is_named_where_averaging_does_as_well(smoothed: str, words: str) -> None:
    assert words in said("better", smoothed)
    assert "by this figure the repair is an inpainting filter" in said("better", smoothed)


def test_a_filter_is_not_named_where_too_few_images_compare() -> None:
    assert said("better", "too few images").endswith(
        "; too few images compare it with averaging the marked tokens at the end."
    )


@pytest.mark.parametrize("original", ["within noise", "worse"])
def test_averaging_that_is_better_is_always_named(original: str) -> None:
    assert "averaging the marked tokens at the end is better" in said(original, "worse")
    assert "filter" not in said(original, "worse")
    assert "averaging" not in said(original, "better")
    assert (", and of averaging" in said(original, "within noise")) is (original == "within noise")


def test_figures_of_cls_alone_are_held_against_the_inpainted_original() -> None:
    repaired = ValueRecord(
        side="repaired", value=9, images=12, to_original=difference("better"), to_inpainted=difference("within noise")
    )
    values = (ValueRecord(side="original", value=4, images=12), repaired)
    (sentence,) = sentences_of([figure("better", None).model_copy(update={"values": values})], "mine")
    assert "; but it is within noise of the inpainted original (" in sentence
    assert "an inpainting filter" in sentence


@pytest.mark.parametrize(
    ("value", "standing", "named"), [(11, "better", True), (7, "better", False), (11, "worse", False)]
)
def test_a_blur_that_scores_higher_still_is_named(value: float, standing: str, named: bool) -> None:
    whole = figure("better", "better")
    blurred = ValueRecord(side="blurred", value=value, images=12, to_original=difference(standing))
    (sentence,) = sentences_of([whole.model_copy(update={"values": (*whole.values, blurred)})], "mine")
    assert ("a blurred map of the original is better still" in sentence) is named


def test_repetitions_are_named_only_where_they_differ() -> None:
    tie = DifferenceRecord(value=0, low=0, high=0, images=12, standing="within noise")
    repaired = ValueRecord(side="repaired", value=4, images=12, to_original=tie)
    whole = figure("better", None).model_copy(
        update={"values": (ValueRecord(side="original", value=4, images=12), repaired)}
    )
    assert "repetitions" not in sentences_of([whole], "mine")[0]
    assert "repetitions differ by ±0.15" in sentences_of([whole.model_copy(update={"noise": 0.15})], "mine")[0]


def test_a_difference_over_fewer_images_is_said_to_be() -> None:
    assert "on the 7 images in which both can be measured" in said("better", None, images=7)
    assert "both can be measured" not in said("better", None)


def test_the_headline_counts_what_beats_averaging() -> None:
    figures = (figure("better", "better"), figure("better", "within noise"), figure("worse", "worse"))
    task = TaskRecord(
        task="t", protocol="", data="", images=12, trained_on=0, settings={}, figures=figures, notes={}, sentences=(),
        skipped={}, seconds=0,
    )  # fmt: skip
    sides = tuple(
        SideRecord(side=side, label=label, made="", model="m", weights="w", fingerprint="f")
        for side, label in (("original", "original"), ("repaired", "mine"))
    )
    assert headline(Evaluation(sinder="0", sides=sides, tasks=(task,), settings={})) == (
        "Of 3 figures, mine is better than the original on 2, worse on 1, and within noise on 0. On 1 of the 2 it also"
        " beats averaging the marked tokens at the end."
    )
