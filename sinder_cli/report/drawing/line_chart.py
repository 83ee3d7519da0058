"""One line over the steps of a repair, as a chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sinder_cli.report.drawing.canvas import ACCENT, GOOD, LINE, Chart
from sinder_cli.report.drawing.scales import round_steps
from sinder_cli.report.formatting import numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 240  # more are averaged: a phone shows no finer line
HEIGHT = 2.7  # inches

Point = tuple[float, float]


@dataclass(frozen=True)
class Marks:
    """What is marked in a chart besides its line: a value of y to reach, and the step whose state was kept."""

    goal: float | None = None
    kept: float | None = None


def line_chart(
    points: Sequence[Point],
    name: str,
    title: str,
    labels: tuple[str, str],
    top: float | None = None,
    marks: Marks = Marks(),
) -> Chart | None:
    """Return a chart of (x, y ≥ 0) points, from 0 on both axes up to their largest or `top`; None without finite ones.

    `labels` are those of both axes. Many points are drawn as means of some; the table of the chart has all of them.
    """
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return None
    thinned, averaged = thinned_points(finite)
    caption = title if averaged == 1 else f"{title}: each point is the mean of {averaged} steps"
    draw = partial(draw_line, title=title, points=thinned, labels=labels, top=top, marks=marks)
    rows = [{labels[0]: x, labels[1]: y} for x, y in points]
    return Chart(name, title, caption, HEIGHT, draw, rows)


def thinned_points(points: Sequence[Point]) -> tuple[list[Point], int]:
    """Return at most `MAX_POINTS` points, each the mean of so many of the given ones."""
    averaged = math.ceil(len(points) / MAX_POINTS)
    return [_mean_point(points[at : at + averaged]) for at in range(0, len(points), averaged)], averaged


def _mean_point(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def draw_line(
    figure: Figure, title: str, points: Sequence[Point], labels: tuple[str, str], top: float | None, marks: Marks
) -> None:
    """Draw one line with round ticks from 0, and the marks."""
    axes = figure.add_subplot(title=title)
    across, up = round_steps(max(x for x, _ in points), whole=True), round_steps(top or max(y for _, y in points))
    axes.set_xlim(0, across[-1])
    axes.set_xticks(across, [f"{x:,.0f}" for x in across])
    axes.set_ylim(0, up[-1])
    axes.set_yticks(up, numbers(up))
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    one = len(points) == 1
    axes.plot(*zip(*points, strict=True), color=LINE, linewidth=1.6, marker="o" if one else None, clip_on=False)
    if marks.goal is not None:
        axes.axhline(marks.goal, color=GOOD, linewidth=1.1, linestyle="--")
        axes.annotate("goal", (0, marks.goal), (4, -4), textcoords="offset points", color=GOOD, va="top")
    if marks.kept is not None:
        at = min(marks.kept, across[-1])
        left = at > 0.8 * across[-1]
        axes.axvline(at, color=ACCENT, linewidth=1.1, linestyle=":")
        axes.annotate(
            "kept", (at, up[-1]), (-4 if left else 4, -4), textcoords="offset points",
            color=ACCENT, va="top", ha="right" if left else "left",
        )  # fmt: skip
