"""Figures of several sides, compared: values, paired differences, and their bootstrap intervals over images.

The same resamples are used for all sides and figures. A difference is said to be within noise if its 95 % interval
contains zero, or if it is smaller than what repetitions of the protocol differ by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from sinder_cli.evaluation.contract import Figure, SideName

if TYPE_CHECKING:
    from torch import Tensor

AT_A_TIME = 256  # resamples
LEVEL = 0.95
Standing = Literal["better", "worse", "within noise", "higher", "lower"]


@dataclass(frozen=True)
class Difference:
    """A side's value less another's, in shown units, with the bootstrap interval over images."""

    value: float
    low: float
    high: float
    standing: Standing


@dataclass(frozen=True)
class Measured:
    """One figure of one side in shown units (%: × 100); None where there is nothing to measure."""

    value: float | None
    to_original: Difference | None = None  # None for the original itself
    to_smoothed: Difference | None = None


def resamples(images: int, count: int, seed: int) -> Tensor:
    """Return how often each image is in each resample, `[count, images]` float64; by the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(images, (count, images), generator=generator)
    return torch.zeros(count, images, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(count, images, dtype=torch.float64)
    )


def compared(figures: Mapping[SideName, Figure], counts: Tensor) -> dict[SideName, Measured]:
    """Return a figure of every side, and its differences to the original and to the smoothed original."""
    resampled = {side: _resampled(figure, counts) for side, figure in figures.items()}
    values = {side: _value(figure) for side, figure in figures.items()}

    def difference(side: SideName, base: SideName) -> Difference | None:
        own, other = values[side], values.get(base)
        if side == base or own is None or other is None:
            return None
        return _difference(figures[side], own - other, resampled[side] - resampled[base])

    return {
        side: Measured(values[side], difference(side, "original"), difference(side, "smoothed")) for side in figures
    }


def _scale(figure: Figure) -> float:
    return 100.0 if figure.unit == "%" else 1.0


def _value(figure: Figure) -> float | None:
    value = figure.value(figure.statistics.sum(dim=0)).item() * _scale(figure)
    return value if value == value else None  # NaN: nothing to measure


def _resampled(figure: Figure, counts: Tensor) -> Tensor:
    """Return the figure of each resample, `[resamples]`, in shown units."""
    parts = [figure.value(part @ figure.statistics) for part in counts.split(AT_A_TIME)]
    return torch.cat(parts) * _scale(figure)


def _difference(figure: Figure, value: float, resampled: Tensor) -> Difference:
    known = resampled[resampled.isfinite()]
    if len(known) == 0:
        return Difference(value, value, value, "within noise")
    tail = (1 - LEVEL) / 2
    low, high = (torch.quantile(known, at).item() for at in (tail, 1 - tail))
    return Difference(value, low, high, _standing(figure, value, low, high))


def _standing(figure: Figure, value: float, low: float, high: float) -> Standing:
    if low <= 0 <= high or abs(value) <= figure.noise:
        return "within noise"
    if figure.better == "neither":
        return "higher" if value > 0 else "lower"
    return "better" if (value > 0) == (figure.better == "higher") else "worse"
