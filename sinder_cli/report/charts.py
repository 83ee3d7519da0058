"""A line chart as plain coordinates; the page's template draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 360, 210  # of the whole drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 42, 350, 28, 168  # of the plotting area
MAX_POINTS = 240  # more are averaged: a phone shows no finer line

Point = tuple[float, float]


class Tick(NamedTuple):
    """A mark on an axis: where, and what it says."""

    at: float
    label: str


class Chart(NamedTuple):
    """Everything that the drawing of one line needs, in drawing units."""

    name: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    line: list[Point]
    goal: float | None  # height of a horizontal mark
    averaged: int  # points of the data in one point of the line

    @property
    def path(self) -> str:
        """The points of an SVG polyline."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.line)


def line_chart(
    points: Sequence[Point], name: str, x_label: str, y_label: str, top: float | None = None, goal: float | None = None
) -> Chart | None:
    """Lay out (x, y ≥ 0) points, from 0 on both axes up to the data's maximum or `top`; None without finite points."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return None
    averaged = math.ceil(len(finite) / MAX_POINTS)
    thinned = [_mean_point(finite[start : start + averaged]) for start in range(0, len(finite), averaged)]
    x_steps = round_steps(max(x for x, _ in finite), whole=True)
    y_steps = round_steps(top or max(y for _, y in thinned))

    def across(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * x / x_steps[-1]

    def up(y: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * y / y_steps[-1]

    return Chart(
        name,
        x_label,
        y_label,
        [Tick(across(x), f"{x:,.0f}") for x in x_steps],
        [Tick(up(y), f"{y:.4g}") for y in y_steps],
        [(across(x), up(y)) for x, y in thinned],
        None if goal is None else up(goal),
        averaged,
    )


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
    return [Tick(math.log(value / low) / math.log(high / low), f"{value:,.4g}") for value in shown]


def _mean_point(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
