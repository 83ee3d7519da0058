"""The inpainted pass as one would write it down: loops over blocks, rounds and tokens, one image at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
Block = Callable[[Tensor], Tensor]  # tokens [1, T, N]
WEIGHTS = ((1, 2, 1), (2, 0, 2), (1, 2, 1))


def ratios_of(tokens: Tensor, prefix: int) -> list[float]:
    """Norm of each patch token over the median, the lower of two in the middle."""
    norms = [float(np.linalg.norm(token)) for token in tokens[0, prefix:].double().numpy()]
    return [norm / sorted(norms)[(len(norms) - 1) // 2] for norm in norms]


def marks_of(tokens: Tensor, start: Sequence[float], prefix: int, factor: float) -> set[int]:
    """The patch tokens that stand out, and more than at the embedding."""
    return {
        at
        for at, (now, before) in enumerate(zip(ratios_of(tokens, prefix), start, strict=True))
        if now > factor and now > 1.5 * before
    }


def filled(patches: Array, marked: set[int], grid: tuple[int, int]) -> Array:
    """Patch tokens `[h·w, N]`: marked ones in rounds, each from its neighbours that were known before the round."""
    h, w = grid
    patches = patches.copy()
    known = set(range(h * w)) - marked
    while known and len(known) < h * w:
        found = {}
        for at in set(range(h * w)) - known:
            row, column, total, weight = at // w, at % w, np.zeros(patches.shape[1]), 0
            for i in range(3):
                for j in range(3):
                    r, c = row + i - 1, column + j - 1
                    if 0 <= r < h and 0 <= c < w and r * w + c in known and WEIGHTS[i][j]:
                        total += WEIGHTS[i][j] * patches[r * w + c]
                        weight += WEIGHTS[i][j]
            if weight:
                found[at] = total / weight
        for at, token in found.items():
            patches[at] = token
        known |= set(found)
    return patches


@torch.no_grad()
def slow_pass(
    embedded: Tensor, blocks: Sequence[Block], prefix: int, grid: tuple[int, int], factor: float, replace: bool = True
) -> tuple[list[Tensor], list[set[int]]]:
    """The tokens `[1, T, N]` after each block, and what is marked there; of the original unless `replace`."""
    start = ratios_of(embedded, prefix)
    tokens, seen, marks = embedded, [], []
    for block in blocks:
        tokens = block(tokens)
        marked = marks_of(tokens, start, prefix, factor)
        if replace and marked:
            patches = filled(tokens[0, prefix:].double().numpy(), marked, grid)
            tokens = torch.cat([tokens[:, :prefix], torch.from_numpy(patches)[None].to(tokens.dtype)], dim=1)
        seen.append(tokens)
        marks.append(marked)
    return seen, marks
