"""Where a defective token should go: its neighbourhood's average, weighted (SINDER, section 4) or of what is whole."""

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


def neighbour_averages(patches: Tensor, marked: Tensor) -> Tensor:
    """The average of each token's unmarked neighbours: `[h, w, N]`, marked bool `[h, w]` → `[h, w, N]` float32.

    The eight neighbours weigh as in the binomial 3 × 3. A marked token without an unmarked neighbour takes from marked
    ones that have been averaged already: they are filled inwards. Where every token is marked, each is its own average.
    """
    tokens = patches.float()
    filled, known = tokens, ~marked
    if not bool(known.any()):
        return tokens
    while not bool(known.all()):
        sums, weights = _binomial_sums(filled, known)
        reached = ~known & (weights > 0)
        filled = torch.where(reached[..., None], sums / weights.clamp_min(1)[..., None], filled)
        known = known | reached
    sums, weights = _binomial_sums(tokens, ~marked)  # an unmarked token takes from unmarked ones alone
    whole = ~marked & (weights > 0)
    return torch.where(whole[..., None], sums / weights.clamp_min(1)[..., None], filled)


def _binomial_sums(tokens: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum over the known neighbours of each token `[h, w, N]`, and of their weights `[h, w]`."""
    h, w, _ = tokens.shape
    sums, weights = torch.zeros_like(tokens), torch.zeros(h, w, device=tokens.device)
    padded = torch.nn.functional.pad(tokens * known[..., None], (0, 0, 1, 1, 1, 1))
    present = torch.nn.functional.pad(known.float(), (1, 1, 1, 1))
    for i in range(3):
        for j in range(3):
            weight = GAUSSIANS[3][i][j] * ((i, j) != (1, 1))
            if weight:
                sums += weight * padded[i : i + h, j : j + w]
                weights += weight * present[i : i + h, j : j + w]
    return sums, weights


def neighbour_distances(patches: Tensor, marked: Tensor) -> Tensor:
    """How far each token is from its unmarked neighbours' average: `[h, w, N]`, bool `[h, w]` → `[h, w]`."""
    return (patches.float() - neighbour_averages(patches, marked)).norm(dim=-1)


SETTLED_QUANTILE = 0.9  # of the distances of unmarked tokens: a marked one that is as near as most of them has settled


def unsettled(patches: Tensor, marked: Tensor) -> Tensor:
    """Which marked tokens are further from their neighbours than nine in ten unmarked ones: bool `[h, w]`."""
    if bool(marked.all()):
        return marked
    distances = neighbour_distances(patches, marked)
    usual = distances[~marked]
    kth = max(1, round(SETTLED_QUANTILE * len(usual)))
    return marked & (distances > usual.kthvalue(kth).values)


LEANING = 3.0  # × the median distance from the median: two standard deviations, where leanings are as a Gaussian's


def leaning(patches: Tensor, marked: Tensor) -> Tensor:
    """Which unmarked tokens the defect moves too, if less: bool `[h, w]`.

    A trigger that is not steep is tripped a little by many tokens, whole surfaces at times; and GELU and SiLU dip below
    zero before they rise. Along the direction in which marked tokens are off their neighbours' average, these lie
    further from the median of unmarked ones than `LEANING` times the median distance from it, on either side. patches
    `[h, w, N]`, marked bool `[h, w]`.
    """
    if bool(marked.all()) or not bool(marked.any()):
        return torch.zeros_like(marked)
    tokens = patches.float()
    along = tokens @ (tokens - neighbour_averages(tokens, marked))[marked].mean(dim=0)  # [h, w]
    usual = along[~marked]
    median = usual.median()
    return ~marked & ((along - median).abs() > LEANING * (usual - median).abs().median())
