"""The inpainted original: a forward pass that replaces outlying tokens, where they appear, by neighbours' averages.

No weight is changed. Its other tokens and cls show what the network would output without outliers. It is the yardstick
of a repair, which needs no clean copy of the model, and the baseline that a trained repair must beat.

From Python, with a `Backbone` and the module that it builds:

    without = inpainted(backbone)
    tokens = last_tokens(without, module, images)  # before the final norm; `without.finish(module, tokens)` applies it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sinder_cli.backbone.contract import Backbone
from sinder_cli.defects.detection import neighbour_averages, norm_ratios, outlying
from sinder_cli.defects.settings import NORM_FACTOR

if TYPE_CHECKING:
    from torch import Tensor

Seen = Callable[[int, "Tensor"], None]  # a block's number, and the tokens that are replaced there: bool [B, h, w]


@dataclass(frozen=True)
class _Context:
    """The context of a pass: the backbone's own context, the patch grid, and the norms at the embedding."""

    own: Any
    grid: tuple[int, int]
    start: Tensor  # [B, h, w]: ratios


def outlying_factor(norm_factor: float) -> float:
    """Return the norm factor of outlying tokens: the given one, or the default for 0 (a repair by angles alone)."""
    return norm_factor or NORM_FACTOR


def inpainted(backbone: Backbone, norm_factor: float = NORM_FACTOR, seen: Seen | None = None) -> Backbone:
    """Return a backbone whose blocks pass on no outlying patch token; it runs the module of the original.

    After each block, tokens that are `outlying` (above `norm_factor` median norms of their image, and risen since the
    embedding) are replaced by the average of their unmarked neighbours, filled inwards; in an image with every token
    marked, all stay. cls and registers are never replaced. A pass without outlying tokens is the original's, bit for
    bit. `norm_factor` 0, which means the paper's rule in a repair, means the default here.
    """
    factor = outlying_factor(norm_factor)

    def embed(module: Any, images: Tensor) -> tuple[Tensor, Any]:
        tokens, own = backbone.embed(module, images)
        grid = (images.shape[-2] // backbone.patch_size, images.shape[-1] // backbone.patch_size)
        return tokens, _Context(own, grid, norm_ratios(_patch_norms(backbone, tokens, grid)))

    def run_block(module: Any, index: int, tokens: Tensor, context: _Context) -> Tensor:
        tokens = backbone.run_block(module, index, tokens, context.own)
        marked = outlying(norm_ratios(_patch_norms(backbone, tokens, context.grid)), context.start, factor)
        if seen is not None:
            seen(index, marked)
        return _replaced(backbone, tokens, marked)

    return replace(backbone, embed=embed, run_block=run_block, forward=None)


def _patch_norms(backbone: Backbone, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens[:, backbone.prefix_tokens :].float().norm(dim=-1).unflatten(1, grid)


def _replaced(backbone: Backbone, tokens: Tensor, marked: Tensor) -> Tensor:
    """Return the tokens `[B, T, N]` with averages in place of the marked ones, bool `[B, h, w]`."""
    found = marked.flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    if not found:
        return tokens
    tokens = tokens.clone()
    for image in found:
        out = marked[image][..., None]  # [h, w, 1]
        if bool(out.all()):
            continue
        patches = tokens[image, backbone.prefix_tokens :].unflatten(0, marked.shape[1:])
        whole = patches.masked_fill(out, 0)  # an infinite token would turn a sum over its neighbours into 0 · ∞
        averages = neighbour_averages(whole, marked[image]).to(tokens.dtype)
        tokens[image, backbone.prefix_tokens :] = torch.where(out, averages, patches).flatten(0, 1)
    return tokens
