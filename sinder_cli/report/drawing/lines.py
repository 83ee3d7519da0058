"""Two backbones side by side: how alike their tokens are, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sinder_cli.report.drawing.canvas import block_axis
from sinder_cli.report.drawing.colours import ACCENT, LINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sinder_cli.analysis.records import Distribution, PairRecord


def draw_cosines(figure: Figure, title: str, pairs: Sequence[PairRecord]) -> None:
    """Medians over the blocks with a band from 1 % to 99 %: patch tokens, and cls where both sides have one."""
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
