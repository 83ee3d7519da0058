"""The tokens of one block of one backbone, taken apart, and what the rules mark among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sinder_cli.analysis.records import Rule
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.backbone.contract import Backbone
from sinder_cli.defects.detection import DetectionRule, alignments, defect_mask, norm_ratios, outlying
from sinder_cli.defects.inpainting import inpainted, outlying_factor
from sinder_cli.defects.prediction import Prediction
from sinder_cli.defects.settings import STAGES
from sinder_cli.defects.tokens import in_precision, patch_grid

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Subject:
    """A backbone ready to be run, with what its weights predict; `original` unless it is an inpainted one."""

    backbone: Backbone
    module: Any
    prediction: Prediction
    original: bool = True

    def directions(self, device: str | torch.device) -> Tensor:
        """The predicted directions of all stages, `[blocks, 4, N]`."""
        return torch.stack([self.prediction.directions(stage) for stage in STAGES], dim=1).to(device)

    def running(self, settings: AnalyzeSettings) -> Backbone:
        """The backbone in the precision of the settings."""
        return in_precision(self.backbone, settings.dtype, settings.tf32)

    def inpainted(self, settings: AnalyzeSettings) -> Subject:
        """The same module with its outlying tokens replaced as they appear."""
        backbone = inpainted(self.backbone, settings.norm_factor)
        return replace(self, backbone=replace(backbone, name=f"{backbone.name}, inpainted"), original=False)


def featured(subjects: Sequence[Subject]) -> int:
    """Which of the subjects features are written of: the inpainted one, or else the first."""
    return next((at for at, subject in enumerate(subjects) if not subject.original), 0)


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

    @property
    def stream(self) -> Tensor:
        """All tokens again, in the order of the residual stream: `[B, prefix + h·w, N]`."""
        cls = [] if self.cls is None else [self.cls[:, None]]
        return torch.cat([*cls, self.registers, self.patches.flatten(1, 2)], dim=1)


def block_by_block(subject: Subject, images: Tensor, nu: Tensor, settings: AnalyzeSettings) -> Iterator[BlockTokens]:
    """Run normalized images `[B, 3, H, W]` and take apart the tokens after each block; `nu` `[blocks, 4, N]`."""
    running = subject.running(settings)
    tokens, context = running.embed(subject.module, images)
    start = norm_ratios(patch_grid(running, tokens, images).float().norm(dim=-1))
    for block in range(running.depth):
        tokens = running.run_block(subject.module, block, tokens, context)
        yield block_tokens(subject, tokens, images, block, nu[block], start, settings)


def block_tokens(
    subject: Subject,
    tokens: Tensor,
    images: Tensor,
    block: int,
    nu: Tensor,
    start: Tensor,
    settings: AnalyzeSettings,
) -> BlockTokens:
    """Take apart the tokens after one block `[B, T, N]`.

    `nu` `[4, N]` holds the block's predicted directions, `start` `[B, h, w]` the ratios of norms at the embedding.
    """
    backbone, rule = subject.backbone, DetectionRule.of(settings)
    tokens = tokens.float()
    patches = patch_grid(backbone, tokens, images)
    cosines = alignments(patches, nu)
    norms = patches.norm(dim=-1)
    factor = outlying_factor(settings.norm_factor)
    masks: dict[Rule, Tensor] = {"outlying": outlying(norm_ratios(norms), start, factor)}
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
