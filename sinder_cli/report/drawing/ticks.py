"""Where the marks of an axis or of a colour scale lie, and what they say."""

from __future__ import annotations

import math
from typing import NamedTuple

from sinder_cli.report.wording import numbers


class Tick(NamedTuple):
    """A mark on an axis: where, and what it says."""

    at: float
    label: str


def round_steps(largest: float, whole: bool = False) -> list[float]:
    """0 and three to five equal steps of 1, 2, 2.5 or 5 × 10ⁿ that reach `largest`; `whole`: integers only."""
    largest = largest if largest > 0 else 1.0
    power = 10.0 ** math.floor(math.log10(largest / 5))
    sizes = [factor * power for factor in (1, 2, 2.5, 5, 10, 20)]
    fitting = [size for size in sizes if size * 5 >= largest * (1 - 1e-9) and (not whole or size == int(size))]
    size = fitting[0] if fitting else 1.0
    return [index * size for index in range(math.ceil(largest / size * (1 - 1e-9)) + 1)]


def log_ticks(low: float, high: float) -> list[Tick]:
    """Marks at 1, 2 and 5 × 10ⁿ between `low` (at 0) and `high` (at 1) on a logarithmic axis; else the two ends."""
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
