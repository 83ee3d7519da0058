"""Charts of an analysis: violins of norms and angles over blocks, cosines of two backbones, places on the grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sinder_cli.report.drawing.canvas import ABSENT, ACCENT, BRIGHT, INK, LINE, SOFT, block_axis
from sinder_cli.report.formatting import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from sinder_cli.analysis.histogram import Curve
    from sinder_cli.analysis.records import Distribution, PairRecord


HALF_WIDTH = 0.42  # of half a violin, in blocks
FULL_LINES = 16  # up to this number of blocks, lines have full width; with more, they would hide the violins


def draw_norms(
    figure: Figure,
    title: str,
    curves: Sequence[Curve | None],
    norms: Sequence[Distribution | None],
    limits: tuple[float, float],
) -> None:
    """Draw one violin per block on a logarithmic axis; `limits` are shared with the other side of a comparison."""
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
    """Draw one violin per block, grey if its direction is not determined, and the observed direction's angle."""
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
    figure.legend(loc="outside lower right")  # even for an empty line, so that both sides have the same shape
    block_axis(axes, len(angles))


def draw_violins(
    axes: Axes, curves: Sequence[Curve | None], values: Sequence[Distribution | None], colours: Sequence[str]
) -> None:
    """Draw each block's distribution: an outline, lines from end to end and from 1 % to 99 %, a dash at the median."""
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
    """Label 1, 2 and 5 × 10ⁿ, or powers of ten alone if the labels would be too close."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = limits
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 3000 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def draw_cosines(figure: Figure, title: str, pairs: Sequence[PairRecord]) -> None:
    """Draw medians over the blocks with a band from 1 % to 99 %: patch tokens, and cls if both sides have one."""
    axes = figure.add_subplot(title=title)
    axes.set_ylabel("cosine (no unit)")
    _draw_band(axes, [pair.patch_cosine for pair in pairs], LINE, "patch tokens", "o", "-")
    if any(pair.cls_cosine for pair in pairs):
        _draw_band(axes, [pair.cls_cosine for pair in pairs], ACCENT, "cls", "s", "--")
    axes.legend(loc="lower left")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.99), max(high, 1 + 0.02 * (1 - min(low, 0.99))))
    block_axis(axes, len(pairs))


def _draw_band(
    axes: Axes, cosines: Sequence[Distribution | None], colour: str, label: str, marker: str, dashes: str
) -> None:
    known = [(block, each) for block, each in enumerate(cosines) if each is not None]
    blocks = [block for block, _ in known]
    axes.fill_between(
        blocks,
        [each.p01 for _, each in known],
        [each.p99 for _, each in known],
        facecolor=colour,
        alpha=0.18,
        linewidth=0,
    )
    medians = [each.median for _, each in known]
    axes.plot(blocks, medians, dashes, color=colour, linewidth=1.4, marker=marker, markersize=3.2, label=label)


def draw_positions(figure: Figure, title: str, shares: Mapping[str, Tensor | None], top: float) -> None:
    """Draw one map `[H, W]` per rule: the share of the tokens at each place that it marks; grey without any token.

    Colours go up to `top`, which both sides share. A rule that does not apply to the block has None, and gets an empty
    map of the same shape; at least one rule always applies.
    """
    import torch
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    colour_map = colormaps[BRIGHT].with_extremes(bad="#" + bytes(ABSENT).hex())
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    shape = next(share.shape for share in shares.values() if share is not None)
    axes = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    maps = []
    for each, (rule, share) in zip(axes, shares.items(), strict=True):
        values = 100 * share if share is not None else torch.full(shape, torch.nan)
        maps.append(each.imshow(values.numpy(), cmap=colour_map, vmin=0, vmax=100 * top, interpolation="nearest"))
        if share is None:
            each.text(0.5, 0.5, "ν not\ndetermined", transform=each.transAxes, ha="center", va="center", color="white")
        each.set_title(rule, fontsize=9.5)
        each.set_xlabel("column, patches")
        each.grid(visible=False)
        for axis in (each.xaxis, each.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axes[0].set_ylabel("row, patches")
    bar = figure.colorbar(maps[-1], ax=list(axes), label="share of the tokens there, %", shrink=0.85, pad=0.02)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set_rasterized(True)  # drawn as an image: 256 separate bands would show gaps between them
