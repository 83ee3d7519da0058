"""Equation (5): which patch tokens are defective, given the predicted direction ν of their block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sinder_cli.defects.rules import MIN_GAP
from sinder_cli.defects.settings import DetectionSettings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DetectionRule:
    """When a token is marked and when a block is called defective (SINDER, section 4; the gate on the gap is ours)."""

    threshold: float = 4.0  # marked: logit < mean − 4·std
    min_tokens: int = 3
    min_gap: float = MIN_GAP  # σ₁/σ₂ of the block's direction; 0 for the paper's rule
    margin: int = 1  # border patches never marked: half the neighbourhood's kernel

    @classmethod
    def of(cls, settings: DetectionSettings) -> DetectionRule:
        """Equation (5) as the settings have it."""
        return cls(settings.mask_threshold, settings.min_tokens, settings.min_gap, settings.kernel // 2)

    def trusts(self, gap: float) -> bool:
        """Whether a direction is determined well enough to call a block defective."""
        return gap >= self.min_gap


def alignments(patches: Tensor, directions: Tensor) -> Tensor:
    """`|cos(x, ν)|` in float32: patches `[…, N]`, directions ν `[S, N]` → `[…, S]`."""
    nu = directions.float() / directions.float().norm(dim=-1, keepdim=True)
    tokens = patches.float()
    return ((tokens @ nu.T) / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-12)).abs()


def alignment_logits(patches: Tensor, direction: Tensor) -> Tensor:
    """`−|cos(x, ν)|` in float32: patches `[B, h, w, N]`, ν `[N]` → `[B, h, w]`."""
    return -alignments(patches, direction[None])[..., 0]


def defect_mask(logits: Tensor, rule: DetectionRule) -> Tensor:
    """Interior tokens with `logit < mean − threshold·std` of their own image: `[B, h, w]` → bool `[B, h, w]`."""
    mean = logits.mean(dim=(1, 2), keepdim=True)
    std = logits.std(dim=(1, 2), keepdim=True)
    mask = logits < mean - rule.threshold * std
    return mask & interior(mask, rule.margin)


def interior(mask: Tensor, margin: int) -> Tensor:
    """True away from the border: bool `[h, w]` for any mask `[…, h, w]`."""
    inside = torch.zeros(mask.shape[-2:], dtype=torch.bool, device=mask.device)
    inside[margin : mask.shape[-2] - margin, margin : mask.shape[-1] - margin] = True
    return inside
