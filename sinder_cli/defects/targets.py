"""Where a defective token should go: the weighted average of its neighbourhood (SINDER, section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Binomial 3 × 3 and the usual integer 5 × 5 Gaussian, as in the authors' code; weights are renormalized afterwards.
GAUSSIANS = {
    3: [[1, 2, 1], [2, 4, 2], [1, 2, 1]],
    5: [[1, 4, 7, 4, 1], [4, 16, 26, 16, 4], [7, 26, 41, 26, 7], [4, 16, 26, 16, 4], [1, 4, 7, 4, 1]],
}


def learning_targets(patches: Tensor, logits: Tensor, mask: Tensor, kernel: int, temperature: float) -> Tensor:
    """The weighted neighbourhood average of each masked token, `[M, N]`, in row-major order of the mask.

    patches `[h, w, N]`, logits `[h, w]`, mask bool `[h, w]`, True in the interior only. Weights over the
    kernel × kernel neighbourhood, the token itself included, are `exp(logit/τ) · gaussian`, renormalized.
    """
    reach = kernel // 2
    offsets = torch.arange(-reach, reach + 1, device=patches.device)
    rows, columns = mask.nonzero(as_tuple=True)  # [M]
    r = rows[:, None, None] + offsets[:, None]  # [M, k, 1]
    c = columns[:, None, None] + offsets[None, :]  # [M, 1, k]
    gaussian = torch.tensor(GAUSSIANS[kernel], dtype=torch.float32, device=patches.device)
    near = logits[r, c]  # [M, k, k]
    near = near - near.amax(dim=(1, 2), keepdim=True)  # the same weights, and no 0/0 at a small τ
    weights = torch.exp(near / temperature) * gaussian
    weights = weights / weights.sum(dim=(1, 2), keepdim=True)
    return torch.einsum("mij,mijn->mn", weights, patches[r, c].float())
