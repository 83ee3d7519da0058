"""What figures say, in words: whether the second model is better than the original, and than the placebos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from sinder_cli.evaluation.records import DifferenceRecord, Evaluation, FigureRecord


def headline(evaluation: Evaluation) -> str:
    """Return the whole evaluation in one sentence."""
    figures = [figure for task in evaluation.tasks for figure in task.figures if figure.better != "neither"]
    judged = [value for figure in figures if (value := figure.of("repaired")) and value.to_original]
    if not judged and any(side.side == "repaired" for side in evaluation.sides):
        return "No figure could be measured on both models."
    if not judged:
        return "One model alone: there is nothing to compare it with; name a run, or a second model with --compare."
    label = next(side.label for side in evaluation.sides if side.side == "repaired")
    counts = Counter(value.to_original.standing for value in judged if value.to_original)
    beaten = sum(
        value.to_smoothed.standing == "better"
        for value in judged
        if value.to_original and value.to_original.standing == "better" and value.to_smoothed
    )
    words = f"Of {len(judged)} figures, {label} is better than the original on {counts['better']}, worse on"
    words += f" {counts['worse']}, and within noise on {counts['within noise']}."
    if counts["too few images"]:
        words += f" On {counts['too few images']}, too few images have anything to measure."
    if counts["better"] and any(value.to_smoothed for value in judged):
        words += f" On {beaten} of the {counts['better']} it also beats averaging the marked tokens at the end."
    return words


def sentences_of(figures: Sequence[FigureRecord], label: str = "repaired") -> tuple[str, ...]:
    """Return one or two sentences for each figure that has a better end; `label` is the second model's name."""
    return tuple(sentence for figure in figures for sentence in _sentences(figure, label))


AVERAGING = "averaging the marked tokens at the end"


def _sentences(figure: FigureRecord, label: str) -> Iterator[str]:
    original, repaired = figure.of("original"), figure.of("repaired")
    if repaired is None or repaired.to_original is None or figure.better == "neither":
        return
    against = repaired.to_original
    if against.standing == "too few images":
        images = f"{against.images} image{'' if against.images == 1 else 's'}"
        words = f"{shown(against.value)} on the {images} with something to measure"
        yield f"{figure.name}: too few images to judge ({words})."
        return
    words = f"{figure.name}: {label} is {_against(against, 'than the original', figure)}"
    if original is not None and against.images < max(original.images, repaired.images):
        words += f", on the {against.images} images in which both can be measured"
    if repaired.to_smoothed is not None:
        words += _placebo_words(against.standing == "better", repaired.to_smoothed, figure)
    yield f"{words}."


def _placebo_words(better: bool, placebo: DifferenceRecord, figure: FigureRecord) -> str:
    """Return how the second model compares with the smoothed original, where that matters.

    `better` says whether it is better than the original. The filter is named only where it was measured to be no worse.
    """
    compared = f"({interval(placebo, figure)} against that)"
    filtering = "by this figure the repair is an inpainting filter"
    if placebo.standing == "worse":
        return f"; {AVERAGING} is better {compared}" + (f": {filtering}, and not the best" if better else "")
    if not better:
        return ""
    if placebo.standing == "better":
        return f", and {_against(placebo, f'than {AVERAGING}', figure)}"
    if placebo.standing == "within noise":
        return f"; but it is within noise of {AVERAGING} {compared}: {filtering}, as far as these images show"
    return f"; too few images compare it with {AVERAGING}"


def _against(difference: DifferenceRecord, than: str, figure: FigureRecord) -> str:
    if difference.standing == "within noise":
        why = f"; repetitions differ by ±{figure.noise:.2g}" if abs(difference.value) <= figure.noise else ""
        return f"within noise of {than.removeprefix('than ')} ({interval(difference, figure)}{why})"
    return f"{difference.standing} {than} ({interval(difference, figure)})"


def interval(difference: DifferenceRecord, figure: FigureRecord) -> str:
    """Return a difference with its interval: +4.7 points, 95 % interval +2.6 to +6.8."""
    unit = " points" if figure.unit == "%" else ""
    if difference.low is None or difference.high is None:
        return f"{shown(difference.value)}{unit}"
    return f"{shown(difference.value)}{unit}, 95 % interval {shown(difference.low)} to {shown(difference.high)}"


def shown(difference: float) -> str:
    """Return a difference with its sign: +0.34, −1.20, +0.0012."""
    size = abs(difference)
    digits = f"{size:.2f}" if size >= 0.1 else f"{size:.4f}"
    return "0" if float(digits) == 0 else f"{'−' if difference < 0 else '+'}{digits}"
