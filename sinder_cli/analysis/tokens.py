"""The tokens of one block of one backbone, taken apart, and what the rules mark among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sinder_cli.analysis.records import Rule
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.backbone.describe import Backbone
from sinder_cli.defects.detection import DetectionRule, alignments, defect_mask
from sinder_cli.defects.prediction import Prediction
from sinder_cli.defects.rules import STAGES
from sinder_cli.defects.tokens import outlier_mask, patch_grid

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Subject:
    """A backbone ready to be run, with what its weights predict."""

    backbone: Backbone
    module: Any
    prediction: Prediction

    def directions(self, device: str | torch.device) -> Tensor:
        """The predicted directions of all stages, `[blocks, 4, N]`."""
        return torch.stack([self.prediction.directions(stage) for stage in STAGES], dim=1).to(device)


@dataclass(frozen=True)
class BlockTokens:
    """One block's tokens of one batch, in float32, and what the rules mark among them."""

    patches: Tensor  # [B, h, w, N]
    norms: Tensor  # [B, h, w]: of patches
    cls: Tensor | None  # [B, N]
    registers: Tensor  # [B, R, N]
    cosines: Tensor  # [B, h, w, 4]: |cos| to the predicted direction of each stage
    masks: dict[Rule, Tensor]  # bool [B, h, w]

    @property
    def degrees(self) -> Tensor:
        """The angles `[B, h, w, 4]` of `cosines`."""
        return torch.rad2deg(torch.acos(self.cosines.clamp_max(1.0)))


def block_tokens(
    subject: Subject, tokens: Tensor, images: Tensor, block: int, nu: Tensor, settings: AnalyzeSettings
) -> BlockTokens:
    """Take apart the tokens after one block `[B, T, N]`; `nu` `[4, N]` holds its predicted directions."""
    backbone, rule = subject.backbone, DetectionRule.of(settings)
    tokens = tokens.float()
    patches = patch_grid(backbone, tokens, images)
    cosines = alignments(patches, nu)
    norms = patches.norm(dim=-1)
    masks: dict[Rule, Tensor] = {"outlying": outlier_mask(norms)}
    if rule.trusts(subject.prediction.gaps()[block]):
        masks["equation_5"] = defect_mask(-cosines[..., STAGES.index("cumulative")], rule)
    if settings.norm_threshold is not None:
        masks["above_threshold"] = norms > settings.norm_threshold
    registers = tokens[:, int(backbone.has_cls) : backbone.prefix_tokens]
    return BlockTokens(patches, norms, tokens[:, 0] if backbone.has_cls else None, registers, cosines, masks)


def in_basis(side: BlockTokens, settings: AnalyzeSettings) -> Tensor:
    """Which patch tokens principal components are taken from, bool `[B, h, w]`: all, or those that no rule marks."""
    if not settings.exclude_masked:
        return torch.ones_like(side.masks["outlying"])
    return ~torch.stack(list(side.masks.values())).any(dim=0)
