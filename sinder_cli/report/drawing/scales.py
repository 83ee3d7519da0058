"""Colour scales: from the values of a map to colours, and the ticks that show which colour is which value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sinder_cli.report.drawing.canvas import ABSENT, BRIGHT
from sinder_cli.report.drawing.pictures import linear_position, log_position
from sinder_cli.report.formatting import number, numbers

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.analysis.records import Distribution
    from sinder_cli.report.drawing.pictures import Picture


class Spread(Protocol):
    """Summary of a set of numbers, such as a `Distribution`."""

    @property
    def min(self) -> float: ...
    @property
    def median(self) -> float: ...
    @property
    def max(self) -> float: ...


class NormSpread(NamedTuple):
    """The smallest, the median and the largest of some norms."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, norms: Tensor) -> NormSpread:
        """Return the spread of the finite norms among norms of any shape."""
        finite = norms[norms.isfinite()]
        if not len(finite):
            return cls(0.0, 0.0, 0.0)
        return cls(finite.min().item(), finite.median().item(), finite.max().item())


@dataclass(frozen=True)
class ColourScale:
    """A perceptually uniform colour map between two values, which saturates beyond them.

    On every scale, values that stand out are bright; `colour_map` is a name that matplotlib knows.
    """

    label: str  # what is measured, with its unit
    low: float
    high: float
    colour_map: str
    logarithmic: bool = False
    suffix: str = ""  # after the number of a tick, such as °
    step: float | None = None  # distance between ticks; None: a round number

    def paint(self, values: Tensor) -> Picture:
        """Return the colours `[h, w, 3]` of values `[h, w]`; values that are not finite are grey."""
        from matplotlib import colormaps

        absent = ~values.isfinite().numpy()
        values = values.double().nan_to_num(self.low, self.low, self.low)
        if self.logarithmic:
            at = log_position(values, self.low, self.high)
        else:
            at = linear_position(values.numpy(), self.low, self.high)
        colours: Picture = colormaps[self.colour_map](at, bytes=True)[..., :3]
        colours[absent] = ABSENT
        return colours

    def bar(self, width: int = 256, height: int = 12) -> Picture:
        """Return all colours, `[height, width, 3]`: from `low` at the left to `high` at the right."""
        import numpy as np
        from matplotlib import colormaps

        row = colormaps[self.colour_map](np.linspace(0, 1, width), bytes=True)[:, :3]
        bar: Picture = np.repeat(row[None], height, axis=0)
        return bar

    @property
    def ticks(self) -> list[Tick]:
        """Marks between the left end (0) and the right end (1)."""
        if self.logarithmic:
            return log_ticks(self.low, self.high)
        span = self.high - self.low
        if span <= 0:
            return [Tick(0.5, f"{number(self.low)}{self.suffix}")]
        step = self.step or round_steps(span)[1]
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        values = [at * step for at in range(first, last + 1)]
        labels = numbers(values)
        return [
            Tick((value - self.low) / span, f"{label}{self.suffix}")
            for value, label in zip(values, labels, strict=True)
        ]

    @property
    def words(self) -> str:
        """Range of the values that the colours stand for."""
        low, high = (f"{value}{self.suffix}" for value in numbers([self.low, self.high]))
        return f"{low} to {high}{' (log scale)' if self.logarithmic else ''}"


ANGLES = ColourScale("angle to ν, degrees", 0.0, 90.0, "viridis_r", suffix="°", step=30.0)
COSINES = ColourScale("cosine to ν, absolute", 0.0, 1.0, "viridis", step=0.25)
FIDELITY = ColourScale("cosine to the inpainted original, no unit", 0.5, 1.0, "cividis_r", step=0.1)


def norm_scale(spreads: Iterable[Spread | None]) -> ColourScale:
    """Return a scale from the smallest to the largest norm of all spreads, at least up to 3 × the largest median.

    With 3 × the median on the scale, harmless variation stays dark.
    """
    from sinder_cli.defects.settings import NORM_FACTOR

    known = [each for each in spreads if each is not None and each.max > 0]
    if not known:
        return ColourScale("L2 norm, no unit", 1.0, 1.0, BRIGHT, logarithmic=True)
    median = max(each.median for each in known)
    low = max(min(each.min for each in known), median / 1000)  # zero has no place on a logarithmic scale
    high = max(NORM_FACTOR * median, *(each.max for each in known), low)
    return ColourScale("L2 norm, no unit", low, high, BRIGHT, logarithmic=True)


def attention_scale(weights: Tensor) -> ColourScale:
    """Return a scale over the weights of one map alone: images differ too much for a common scale."""
    finite = weights[weights.isfinite()]
    low, high = (finite.min().item(), finite.max().item()) if len(finite) else (0.0, 0.0)
    return ColourScale("attention of cls, weight", low, high, "cividis")


def cosine_scale(distribution: Distribution | None) -> ColourScale:
    """Return a scale from the 1st percentile, rounded down, to 1; the largest differences are brightest."""
    low = math.floor(min(distribution.p01, 0.95) * 10) / 10 if distribution is not None else 0.0
    return ColourScale("cosine between both sides, no unit", low, 1.0, "cividis_r")


class Tick(NamedTuple):
    """A mark on an axis: its position and its label."""

    at: float
    label: str


def round_steps(largest: float, whole: bool = False) -> list[float]:
    """Return 0 and three to five equal steps of 1, 2, 2.5 or 5 × 10ⁿ that reach `largest`; `whole`: integers only."""
    largest = largest if largest > 0 else 1.0
    power = 10.0 ** math.floor(math.log10(largest / 5))
    sizes = [factor * power for factor in (1, 2, 2.5, 5, 10, 20)]
    fitting = [size for size in sizes if size * 5 >= largest * (1 - 1e-9) and (not whole or size == int(size))]
    size = fitting[0] if fitting else 1.0
    return [index * size for index in range(math.ceil(largest / size * (1 - 1e-9)) + 1)]


def log_ticks(low: float, high: float) -> list[Tick]:
    """Return marks at 1, 2 and 5 × 10ⁿ from `low` (at 0) to `high` (at 1) on a log axis; if too few, the two ends."""
    if not 0 < low < high:
        return [Tick(0.5, f"{high:.3g}")]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    values = [factor * 10.0**power for power in powers for factor in factors]
    inside = [value for value in values if low <= value <= high]
    shown = inside if len(inside) > 1 else [low, high]
    labels = numbers(shown)
    return [
        Tick(math.log(value / low) / math.log(high / low), label) for value, label in zip(shown, labels, strict=True)
    ]
