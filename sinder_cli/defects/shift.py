"""Shift retrieval: is a token's nearest neighbour in a shifted view of its image the same place?

It needs no labels and measures whether a token contains its position. It is only reported and decides nothing: tokens
that a repair restores are found again, but a ruined model, whose tokens contain little but their position, scores even
better.
Shapes: h × w patches, N width; the shifted view lacks the first `CELLS` rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from torch import Tensor

CELLS = 2  # patches by which the view is shifted, down and to the right
AT_A_TIME = 1024  # tokens that are compared with all others
NEAR = 1  # patches: a token found within this distance counts as found


@dataclass(frozen=True)
class Retrieval:
    """Shares of the tokens that are found again; None where there is no such token."""

    marked: float | None
    others: float | None

    @classmethod
    def of(cls, found: Tensor, marked: Tensor) -> Retrieval:
        """Compute the shares from the found and the marked tokens, bool of one shape."""
        return cls(*(found[group].float().mean().item() if bool(group.any()) else None for group in (marked, ~marked)))


def shifted(images: Tensor, patch_size: int) -> Tensor:
    """Return the views of images `[B, 3, H, W]`, cut at whole patches: nothing wraps around."""
    return images[..., CELLS * patch_size :, CELLS * patch_size :]


def found_again(whole: Tensor, view: Tensor) -> Tensor:
    """Return which tokens of a view `[h − CELLS, w − CELLS, N]` are found in the image `[h, w, N]`; bool, as the view.

    The nearest token is the one with the highest cosine, after the mean token of each side is subtracted. A token that
    is not finite is not found, and finds no other one.
    """
    h, w, _ = whole.shape
    places, tokens = (_centred(each.flatten(0, 1)) for each in (whole, view))
    nearest = torch.cat([(part @ places.T).argmax(dim=1) for part in tokens.split(AT_A_TIME)])
    nearest = nearest.view(h - CELLS, w - CELLS)
    rows, columns = nearest // w - CELLS, nearest % w - CELLS  # in the view's own rows and columns
    own_rows = torch.arange(h - CELLS, device=whole.device)[:, None]
    own_columns = torch.arange(w - CELLS, device=whole.device)[None]
    near = ((rows - own_rows).abs() <= NEAR) & ((columns - own_columns).abs() <= NEAR)
    return near & view.isfinite().all(dim=-1)


def _centred(tokens: Tensor) -> Tensor:
    """Subtract the mean of the finite tokens `[T, N]` and normalize; those that are not finite become 0."""
    finite = tokens.isfinite().all(dim=1, keepdim=True)
    known = tokens.where(finite, 0)
    mean = known.sum(dim=0) / finite.sum().clamp_min(1)
    return normalize((known - mean).where(finite, 0), dim=-1)
