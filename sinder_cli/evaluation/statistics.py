"""Figures of several sides, compared: values, paired differences, and their bootstrap intervals over images.

The same resamples are used for all sides and figures, and a difference is one over the images in which both sides have
something to measure: else a model would gain by failing on hard images. A difference is said to be within noise if its
95 % interval contains zero, or if it is smaller than what repetitions of the protocol differ by. Where fewer than five
images have something to measure, no difference is judged.
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

MOST_COUNTS = 2**22  # images × resamples at a time
BASES: tuple[SideName, ...] = ("original", "smoothed", "inpainted")  # that all sides are compared with
LEVEL = 0.95
LEAST_IMAGES = 5  # with something to measure, for an interval to mean anything
KNOWN = 0.9  # share of the resamples in which there is something to measure


@dataclass(frozen=True)
class Measured:
    """One figure of one side in shown units (%: × 100); None where there is nothing to measure."""

    value: float | None
    images: int  # with something to measure
    to_original: DifferenceRecord | None = None  # None for the original itself
    to_smoothed: DifferenceRecord | None = None
    to_inpainted: DifferenceRecord | None = None


def resamples(images: int, count: int, seed: int) -> Iterator[Tensor]:
    """Yield how often each image is in each of some resamples, `[n, images]` float64; by the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    at_a_time = max(1, MOST_COUNTS // images)
    for start in range(0, count, at_a_time):
        drawn = torch.randint(images, (min(at_a_time, count - start), images), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))


def compared(figures: Mapping[SideName, Figure], images: int, count: int, seed: int) -> dict[SideName, Measured]:
    """Return a figure of every side, and its differences to the original and to two placebos."""
    noise = noise_of(figures)
    pairs = [(side, base) for base in BASES if base in figures for side in figures if side != base]
    common = {(side, base): _known(figures[side]) & _known(figures[base]) for side, base in pairs}
    parts: dict[tuple[SideName, SideName], list[Tensor]] = {pair: [] for pair in pairs}
    for counts in resamples(images, count, seed):
        for (side, base), known in common.items():
            own, other = (_values(figures[each], counts * known) for each in (side, base))
            parts[side, base].append(own - other)
    values = {side: _value(figure) for side, figure in figures.items()}

    def difference(side: SideName, base: SideName) -> DifferenceRecord | None:
        if (side, base) not in common or values[side] is None or values[base] is None:
            return None
        known = common[side, base]
        own, other = (_values(figures[each], known.double()[None])[0].item() for each in (side, base))
        if not math.isfinite(own - other):
            return None
        return _difference(figures[side], noise, own - other, torch.cat(parts[side, base]), int(known.sum()))

    return {
        side: Measured(values[side], int(_known(figure).sum()), *(difference(side, base) for base in BASES))
        for side, figure in figures.items()
    }


def noise_of(figures: Mapping[SideName, Figure]) -> float:
    """Return the noise of one figure for all of its differences: the largest that a side has."""
    return max(figure.noise for figure in figures.values())


def _known(figure: Figure) -> Tensor:
    """Return which images have something to measure, bool `[images]`."""
    return (figure.statistics != 0).any(dim=1)


def _values(figure: Figure, counts: Tensor) -> Tensor:
    """Return the figure of resamples, `[n]` in shown units, for how often each image is in them, `[n, images]`."""
    return figure.value(counts @ figure.statistics.double()) * _scale(figure)


def _scale(figure: Figure) -> float:
    return 100.0 if figure.unit == "%" else 1.0


def _value(figure: Figure) -> float | None:
    value = figure.value(figure.statistics.double().sum(dim=0)).item() * _scale(figure)
    return value if math.isfinite(value) else None  # nothing to measure


def _difference(figure: Figure, noise: float, value: float, resampled: Tensor, images: int) -> DifferenceRecord:
    known = resampled[resampled.isfinite()]
    if images < LEAST_IMAGES or len(known) < KNOWN * len(resampled):
        return DifferenceRecord(value=value, images=images, standing="too few images")
    tail = (1 - LEVEL) / 2
    low, high = (torch.quantile(known, at).item() for at in (tail, 1 - tail))
    standing = _standing(figure, noise, value, low, high)
    return DifferenceRecord(value=value, low=low, high=high, images=images, standing=standing)


def _standing(figure: Figure, noise: float, value: float, low: float, high: float) -> Standing:
    if low <= 0 <= high or abs(value) <= noise:
        return "within noise"
    if figure.better == "neither":
        return "higher" if value > 0 else "lower"
    return "better" if (value > 0) == (figure.better == "higher") else "worse"
