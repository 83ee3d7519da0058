"""What a repair minimizes: the distance of defective tokens from their neighbourhood (SINDER, section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sinder_cli.defects.detection import interior
from sinder_cli.defects.targets import learning_targets

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
