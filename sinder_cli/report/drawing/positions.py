"""Where on the grid tokens are marked, over all images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sinder_cli.report.drawing.colours import ABSENT, BRIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


def draw_positions(figure: Figure, title: str, shares: Mapping[str, Tensor | None], top: float) -> None:
    """One map `[H, W]` a rule: of the tokens at each place the share that it marks, and grey where there were none.

    Colours go up to `top`, which both sides share. A rule that does not apply to the block has None, and an empty place
    of the same shape; one rule always applies.
    """
    import torch
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    colour_map = colormaps[BRIGHT].with_extremes(bad="#" + bytes(ABSENT).hex())
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    shape = next(share.shape for share in shares.values() if share is not None)
    axes = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    for each, (rule, share) in zip(axes, shares.items(), strict=True):
        values = 100 * share if share is not None else torch.full(shape, torch.nan)
        drawn = each.imshow(values.numpy(), cmap=colour_map, vmin=0, vmax=100 * top, interpolation="nearest")
        if share is None:
            each.text(0.5, 0.5, "ν not\ndetermined", transform=each.transAxes, ha="center", va="center", color="white")
        each.set_title(rule, fontsize=9.5)
        each.set_xlabel("column, patches")
        each.grid(visible=False)
        for axis in (each.xaxis, each.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axes[0].set_ylabel("row, patches")
    bar = figure.colorbar(drawn, ax=list(axes), label="share of the tokens there, %", shrink=0.85, pad=0.02)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set_rasterized(True)  # an image: 256 bands would show seams between them
