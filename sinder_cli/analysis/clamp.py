"""A backbone whose linear layers have their largest singular values clamped (SINDER, figure 4); no file is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from sinder_cli.backbone.contract import Backbone, WeightRef, linear_references
from sinder_cli.backbone.weights import rows_of
from sinder_cli.events import Emit, Warned, tracked

if TYPE_CHECKING:
    from torch import Tensor

NEGLIGIBLE = 1e-7  # × σ₁: smaller values are lost in the rounding of W Wᵀ, and float32 hardly resolves them


@dataclass(frozen=True)
class LargestPart:
    """The part that clamping removes from a weight W: `U diag(1 − σ_K/σ) Uᵀ W`.

    It has the M < K singular directions above the K-th: `U` `[out, M]` and `excess` `[M]`, float32. Right singular
    vectors are never needed: Uᵀ W = S Vᵀ.
    """

    U: Tensor
    excess: Tensor

    def taken_from(self, weight: Tensor) -> Tensor:
        """Return the clamped weight, in the dtype of `weight` `[out, in]`."""
        wide = weight.float()
        return (wide - (self.U * self.excess) @ (self.U.T @ wide)).to(weight.dtype)


def largest_part(weight: Tensor, k: int) -> LargestPart:
    """Return the part whose removal lowers the singular values of `weight` `[out, in]` above the K-th to the K-th.

    It is empty if there is no K-th. The leading left singular vectors are eigenvectors of W Wᵀ, or images of those of
    Wᵀ W if that is smaller; in float64 no precision that matters for the largest ones is lost.
    """
    wide = weight.double()
    tall = wide.shape[0] > wide.shape[1]
    gram = wide.T @ wide if tall else wide @ wide.T
    values, vectors = torch.linalg.eigh(gram)
    sigma = values.flip(0).clamp_min(0).sqrt()  # largest first
    if k > len(sigma):
        return LargestPart(wide.new_zeros(len(wide), 0).float(), wide.new_zeros(0).float())
    above = sigma[sigma > torch.maximum(sigma[k - 1], NEGLIGIBLE * sigma[0])]  # the first of them, fewer than K
    leading = vectors.flip(1)[:, : len(above)]
    U = wide @ leading / above if tall else leading
    return LargestPart(U.float(), (1 - sigma[k - 1] / above).float())


def with_clamped_rows(parts: Sequence[tuple[WeightRef, LargestPart]], tensor: Tensor) -> Tensor:
    """Return a whole tensor with the rows of each reference clamped; the given one stays as it is."""
    tensor = tensor.clone()
    for ref, part in parts:
        rows = rows_of(tensor, ref)
        rows.copy_(part.taken_from(rows))
    return tensor


def clamped(backbone: Backbone, k: int, emit: Emit) -> Backbone:
    """Return the backbone with the singular values of every linear layer in its blocks lowered to the layer's K-th.

    Linear layers are query, key, value, output and all MLP weights; each part of a fused projection counts as its own.
    """
    weights = backbone.weights
    parts: dict[str, list[tuple[WeightRef, LargestPart]]] = {}
    for block in tracked(backbone.layers.blocks, emit, "clamping", backbone.depth, "blocks"):
        refs = linear_references(block)
        stored = weights.read({ref.name for ref in refs})
        for ref in refs:
            part = largest_part(rows_of(stored[ref.name], ref), k)
            parts.setdefault(ref.name, []).append((ref, part))
    if not any(part.U.shape[1] for each in parts.values() for _, part in each):
        emit(Warned(f"clamping to singular value {k} changes nothing: no layer has a larger one"))
    label = f"{weights.source.label}, singular values clamped at K = {k}"
    changes = {name: partial(with_clamped_rows, each) for name, each in parts.items()}
    return replace(backbone, weights=weights.mapped(label, changes))
