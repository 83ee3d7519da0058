"""Pictures of features: three principal components of an image's tokens as colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sinder_cli.evaluation.contract import Pixels

if TYPE_CHECKING:
    from torch import Tensor


def pca_picture(patches: Tensor, reference: Tensor) -> Pixels:
    """Return three components of tokens `[h, w, N]` as RGB `[h, w, 3]`, in the basis and range of reference tokens.

    The same reference for several sides gives them the same colours. Tokens that are not finite are black.
    """
    flat = reference.flatten(0, 1).nan_to_num(posinf=0, neginf=0)
    mean = flat.mean(dim=0)
    _, _, basis = torch.pca_lowrank(flat - mean, q=min(6, *flat.shape), center=False, niter=4)
    basis = basis[:, :3]
    signs = basis.gather(0, basis.abs().argmax(dim=0)[None]).sign()  # the same tokens, the same colours
    own = (flat - mean) @ (basis * signs)
    low, high = (torch.quantile(own, at, dim=0) for at in (0.02, 0.98))
    shown = ((patches - mean) @ (basis * signs) - low) / (high - low).clamp_min(1e-12)
    return (shown.nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
