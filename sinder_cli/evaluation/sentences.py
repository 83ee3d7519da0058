"""What figures say, in words: whether the second model is better than the original, and than the placebos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sinder_cli.evaluation.records import DifferenceRecord, FigureRecord

PLACEBO = "averaging the marked tokens at the end does as well: by this figure the repair is an inpainting filter"


def sentences_of(figures: Sequence[FigureRecord], label: str = "repaired") -> tuple[str, ...]:
    """Return one or two sentences a figure that has a better end; `label` is the second model's name."""
    return tuple(sentence for figure in figures for sentence in _sentences(figure, label))


def _sentences(figure: FigureRecord, label: str) -> Iterator[str]:
    repaired = figure.of("repaired")
    if repaired is None or repaired.to_original is None or figure.better == "neither":
        return
    yield f"{figure.name}: {label} is {_standing(repaired.to_original, figure)} against the original."
    if repaired.to_original.standing == "better" and repaired.to_smoothed is not None:
        if repaired.to_smoothed.standing == "better":
            return
        yield f"{figure.name}: {PLACEBO} ({_interval(repaired.to_smoothed, figure)} against it)."


def _standing(difference: DifferenceRecord, figure: FigureRecord) -> str:
    return f"{difference.standing} ({_interval(difference, figure)})"


def _interval(difference: DifferenceRecord, figure: FigureRecord) -> str:
    unit = " %" if figure.unit == "%" else ""
    return f"{shown(difference.value)}{unit}, 95 % interval {shown(difference.low)} to {shown(difference.high)}"


def shown(difference: float) -> str:
    """Return a difference with its sign: +0.34, −1.2, +0.0012."""
    size = abs(difference)
    digits = 2 if size >= 0.1 or size == 0 else 4
    return f"{'−' if difference < 0 else '+'}{size:.{digits}f}"
