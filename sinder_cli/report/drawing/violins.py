"""Violin plots of norms and angles, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sinder_cli.report.drawing.canvas import block_axis
from sinder_cli.report.drawing.colours import ACCENT, INK, LINE, SOFT
from sinder_cli.report.wording import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sinder_cli.analysis.histogram import Curve
    from sinder_cli.analysis.records import Distribution

HALF_WIDTH = 0.42  # of a violin, in blocks
FULL_LINES = 16  # blocks up to which lines have their full width: beyond, they would hide the violins


def draw_norms(
    figure: Figure,
    title: str,
    curves: Sequence[Curve | None],
    norms: Sequence[Distribution | None],
    limits: tuple[float, float],
) -> None:
    """One violin a block on a logarithmic axis; `limits` are shared with the other side of a comparison."""
    axes = figure.add_subplot(title=title)
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    axes.set_ylabel("L2 norm (no unit), log scale")
    _label_decades(axes, limits)
    draw_violins(axes, curves, norms, [LINE] * len(norms))
    block_axis(axes, len(norms))


def draw_angles(
    figure: Figure,
    title: str,
    curves: Sequence[Curve | None],
    angles: Sequence[Distribution | None],
    determined: Sequence[bool],
    observed: Sequence[float | None],
) -> None:
    """One violin a block, grey where the direction is not determined, and the observed direction's angle over it."""
    axes = figure.add_subplot(title=title)
    axes.set_ylim(-2, 92)
    axes.set_yticks([0, 15, 30, 45, 60, 75, 90])
    axes.set_ylabel("angle to ν, degrees")
    draw_violins(axes, curves, angles, [LINE if sure else SOFT for sure in determined])
    heights = [float("nan") if angle is None else angle for angle in observed]
    axes.plot(
        range(len(heights)),
        heights,
        color=ACCENT,
        linewidth=1.4,
        marker="o",
        markersize=3.2,
        label="observed direction of outlying tokens",
        zorder=4,
    )
    figure.legend(loc="outside lower right")  # even of an empty line: both sides keep one shape
    block_axis(axes, len(angles))


def draw_violins(
    axes: Axes, curves: Sequence[Curve | None], values: Sequence[Distribution | None], colours: Sequence[str]
) -> None:
    """Each block's distribution as an outline, lines from end to end and from 1 % to 99 %, a dash at the median."""
    slim = min(1.0, FULL_LINES / len(values))
    known = [
        (at, curve, value, colour)
        for at, (curve, value, colour) in enumerate(zip(curves, values, colours, strict=True))
        if curve is not None and value is not None
    ]
    for at, curve, _, colour in known:
        left = [at - HALF_WIDTH * density for density in curve.density]
        right = [at + HALF_WIDTH * density for density in curve.density]
        axes.fill_betweenx(curve.at, left, right, facecolor=colour, alpha=0.35, linewidth=0)
    blocks, drawn, tints = [at for at, *_ in known], [value for _, _, value, _ in known], [each[-1] for each in known]
    axes.vlines(blocks, [v.min for v in drawn], [v.max for v in drawn], colors=tints, linewidth=0.7 * slim)
    axes.vlines(blocks, [v.p01 for v in drawn], [v.p99 for v in drawn], colors=tints, linewidth=1.8 * slim)
    medians = [value.median for value in drawn]
    axes.plot(blocks, medians, "_", color=INK, markersize=4 * slim, markeredgewidth=1.4, zorder=3)


def _label_decades(axes: Axes, limits: tuple[float, float]) -> None:
    """1, 2 and 5 × 10ⁿ, or powers of ten alone where those would crowd."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = limits
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 3000 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
