"""Figures of several sides, compared: values, paired differences, and their bootstrap intervals over images.

The same resamples are used for all sides and figures. A difference is said to be within noise if its 95 % interval
contains zero, or if it is smaller than what repetitions of the protocol differ by. Where fewer than five images have
something to measure, no difference is judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sinder_cli.evaluation.contract import Figure, SideName
from sinder_cli.evaluation.records import DifferenceRecord, Standing

if TYPE_CHECKING:
    from torch import Tensor

AT_A_TIME = 256  # resamples
LEVEL = 0.95
LEAST_IMAGES = 5  # with something to measure, for an interval to mean anything
KNOWN = 0.9  # share of the resamples in which there is something to measure


@dataclass(frozen=True)
class Measured:
    """One figure of one side in shown units (%: × 100); None where there is nothing to measure."""

    value: float | None
    to_original: DifferenceRecord | None = None  # None for the original itself
    to_smoothed: DifferenceRecord | None = None


def resamples(images: int, count: int, seed: int) -> Iterator[Tensor]:
    """Yield how often each image is in each resample, `[≤ AT_A_TIME, images]` float64; by the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, AT_A_TIME):
        drawn = torch.randint(images, (min(AT_A_TIME, count - start), images), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))


def compared(figures: Mapping[SideName, Figure], images: int, count: int, seed: int) -> dict[SideName, Measured]:
    """Return a figure of every side, and its differences to the original and to the smoothed original."""
    statistics = {side: figure.statistics.double() for side, figure in figures.items()}
    values = {side: _value(figure, statistics[side]) for side, figure in figures.items()}
    parts: dict[SideName, list[Tensor]] = {side: [] for side in figures}
    for counts in resamples(images, count, seed):
        for side, figure in figures.items():
            parts[side].append(figure.value(counts @ statistics[side]) * _scale(figure))
    resampled = {side: torch.cat(found) for side, found in parts.items()}

    def difference(side: SideName, base: SideName) -> DifferenceRecord | None:
        own, other = values[side], values.get(base)
        if side == base or own is None or other is None:
            return None
        informative = min(_contributing(statistics[each]) for each in (side, base))
        return _difference(figures[side], own - other, resampled[side] - resampled[base], informative)

    return {
        side: Measured(values[side], difference(side, "original"), difference(side, "smoothed")) for side in figures
    }


def _contributing(statistics: Tensor) -> int:
    """Return how many images have something to measure."""
    return int((statistics != 0).any(dim=1).sum())


def _scale(figure: Figure) -> float:
    return 100.0 if figure.unit == "%" else 1.0


def _value(figure: Figure, statistics: Tensor) -> float | None:
    value = figure.value(statistics.sum(dim=0)).item() * _scale(figure)
    return value if math.isfinite(value) else None  # nothing to measure


def _difference(figure: Figure, value: float, resampled: Tensor, informative: int) -> DifferenceRecord:
    known = resampled[resampled.isfinite()]
    if informative < LEAST_IMAGES or len(known) < KNOWN * len(resampled):
        return DifferenceRecord(value=value, low=value, high=value, standing="too few images")
    tail = (1 - LEVEL) / 2
    low, high = (torch.quantile(known, at).item() for at in (tail, 1 - tail))
    return DifferenceRecord(value=value, low=low, high=high, standing=_standing(figure, value, low, high))


def _standing(figure: Figure, value: float, low: float, high: float) -> Standing:
    if low <= 0 <= high or abs(value) <= figure.noise:
        return "within noise"
    if figure.better == "neither":
        return "higher" if value > 0 else "lower"
    return "better" if (value > 0) == (figure.better == "higher") else "worse"
