"""What figures say, in words: whether the second model is better than the original, and than the placebos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from sinder_cli.evaluation.records import DifferenceRecord, Evaluation, FigureRecord, Standing, ValueRecord


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
        words += f" On {counts['too few images']}, there are too few images to say."
    if counts["better"] and any(value.to_smoothed for value in judged):
        words += f" On {beaten} of the {counts['better']} it also beats averaging the marked tokens at the end."
    return words


def sentences_of(figures: Sequence[FigureRecord], label: str = "repaired") -> tuple[str, ...]:
    """Return one or two sentences for each figure that has a better end; `label` is the second model's name."""
    return tuple(sentence for figure in figures for sentence in _sentences(figure, label))


AVERAGING = "averaging the marked tokens at the end"
INPAINTED = "the inpainted original"


def _sentences(figure: FigureRecord, label: str) -> Iterator[str]:
    original, repaired = figure.of("original"), figure.of("repaired")
    if repaired is None or repaired.to_original is None or figure.better == "neither":
        return
    against = repaired.to_original
    if against.standing == "too few images":
        images = f"{against.images} image{'' if against.images == 1 else 's'}"
        words = f"{shown(against.value)} on {images}"
        yield f"{figure.name}: too few images to judge ({words})."
        return
    words = f"{figure.name}: {label} is {_against(against, 'than the original', figure)}"
    if original is not None and against.images < max(original.images, repaired.images):
        words += f", on the {against.images} images in which both can be measured"
    words += _placebo_words(against.standing, repaired, figure)
    yield f"{words}{_blur_words(repaired, figure)}."


def _placebo_words(standing: Standing, repaired: ValueRecord, figure: FigureRecord) -> str:
    """Return how the second model compares with the placebo: the smoothed original, or, for cls, the inpainted one.

    `standing` is its own against the original. It is called a filter only where it is better, and the placebo was
    measured to be no worse.
    """
    better = standing == "better"
    placebo = repaired.to_smoothed or repaired.to_inpainted
    if placebo is None:
        return ""
    other = AVERAGING if repaired.to_smoothed is not None else INPAINTED
    compared = f"({interval(placebo, figure)} against that)"
    filtering = "by this figure the repair is an inpainting filter"
    if placebo.standing == "worse":
        return f"; {other} is better {compared}" + (f": {filtering}, and not the best" if better else "")
    if placebo.standing == "better":
        return f", and {_against(placebo, f'than {other}', figure)}" if better else ""
    if placebo.standing == "within noise":
        if better:
            return f"; but it is within noise of {other} {compared}: {filtering}, as far as these images show"
        return f", and of {other} {compared}" if standing == "within noise" else ""
    return f"; too few images compare it with {other}" if better else ""


def _blur_words(repaired: ValueRecord, figure: FigureRecord) -> str:
    """Return a caution where a mere blur is better than the original, and than the second model."""
    blurred = figure.of("blurred")
    if blurred is None or blurred.value is None or repaired.value is None or blurred.to_original is None:
        return ""
    above = blurred.value > repaired.value if figure.better == "higher" else blurred.value < repaired.value
    if blurred.to_original.standing != "better" or not above:
        return ""
    return "; a blurred map of the original is better still: the figure rewards smoothness"


def _against(difference: DifferenceRecord, than: str, figure: FigureRecord) -> str:
    if difference.standing == "within noise":
        unsteady = figure.noise > 0 and abs(difference.value) <= figure.noise
        why = f"; repetitions differ by ±{figure.noise:.2g}" if unsteady else ""
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
