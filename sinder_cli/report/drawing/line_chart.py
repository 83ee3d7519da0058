"""One line over the steps of a repair, laid out for a drawing in SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sinder_cli.report.drawing.scales import Tick, round_steps
from sinder_cli.report.formatting import numbers

WIDTH, HEIGHT = 360, 210  # of the whole drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 42, 350, 28, 168  # of the plotting area
MAX_POINTS = 240  # more are averaged: a phone shows no finer line

Point = tuple[float, float]


class LineChart(NamedTuple):
    """Everything that the drawing of one line needs, in drawing units."""

    name: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    line: list[Point]
    goal: float | None  # height of a horizontal mark
    averaged: int  # points of the data in one point of the line
    kept: float | None = None  # place of a vertical mark

    @property
    def path(self) -> str:
        """The points of an SVG polyline."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.line)


def line_chart(
    points: Sequence[Point],
    name: str,
    x_label: str,
    y_label: str,
    top: float | None = None,
    goal: float | None = None,
    kept: float | None = None,
) -> LineChart | None:
    """Lay out (x, y ≥ 0) points, from 0 on both axes up to the data's maximum or `top`; None without finite points.

    `goal` is a value of y that is marked, `kept` a value of x.
    """
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

    return LineChart(
        name,
        x_label,
        y_label,
        [Tick(across(x), f"{x:,.0f}") for x in x_steps],
        [Tick(up(y), label) for y, label in zip(y_steps, numbers(y_steps), strict=True)],
        [(across(x), up(y)) for x, y in thinned],
        None if goal is None else up(goal),
        averaged,
        None if kept is None else across(min(kept, x_steps[-1])),
    )


def _mean_point(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
