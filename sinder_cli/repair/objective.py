"""What a repair minimizes: the distance of defective tokens from their neighbourhood (SINDER, section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sinder_cli.defects.detection import interior, learning_targets, neighbour_averages, neighbour_distances

if TYPE_CHECKING:
    from torch import Tensor


def neighbour_loss(patches: Tensor, logits: Tensor, mask: Tensor, kernel: int, temperature: float) -> Tensor:
    """Mean over masked tokens of ‖x − target‖, over the mean token norm of the interior; a scalar.

    One image: patches `[h, w, N]`, logits and mask `[h, w]`. Targets and the scale carry no gradient.
    """
    with torch.no_grad():
        targets = learning_targets(patches, logits, mask, kernel, temperature)
        scale = patches.float()[interior(mask, kernel // 2)].norm(dim=-1).mean()
    return (patches[mask].float() - targets).norm(dim=-1).mean() / scale


def average_loss(patches: Tensor, mask: Tensor) -> Tensor:
    """Mean over masked tokens of ‖x − average of the unmarked neighbours‖, over `ordinary_scale`; a scalar.

    One image: patches `[h, w, N]`, mask bool `[h, w]`, border included. Averages and the scale carry no gradient.
    """
    with torch.no_grad():
        targets = neighbour_averages(patches, mask)[mask]
        scale = ordinary_scale(patches, mask)
    return (patches[mask].float() - targets).norm(dim=-1).mean() / scale


def ordinary_scale(patches: Tensor, mask: Tensor) -> Tensor:
    """The mean norm of unmarked tokens; of all where every token is marked."""
    norms = patches.float().norm(dim=-1)
    return norms[~mask].mean() if not bool(mask.all()) else norms.mean()


def ordinary_loss(patches: Tensor, mask: Tensor) -> Tensor:
    """The loss of unmarked tokens: the least that can be asked of marked ones; 0 where every token is marked."""
    if bool(mask.all()):
        return patches.new_zeros((), dtype=torch.float32)
    return neighbour_distances(patches, mask)[~mask].mean() / ordinary_scale(patches, mask)
