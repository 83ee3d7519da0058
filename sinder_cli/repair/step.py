"""One step: find the first defective block of each image, and project the loss's gradient onto singular values.

    1. Run the blocks without gradients, keeping the inputs of the last `window` blocks, until the first defective one.
    2. Run the window again with gradients on its target weights only; loss; backward.
    3. ∂L/∂ε = diag(Uᵀ (∂L/∂W) V).

No module is swapped and none is parametrized: any attention kernel, autocast and any model class work unchanged.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sinder_cli.backbone.blocks import rows_of
from sinder_cli.backbone.describe import Backbone
from sinder_cli.defects.detection import DetectionRule, alignment_logits, defect_mask
from sinder_cli.defects.tokens import in_precision, patch_grid
from sinder_cli.repair.deltas import Deltas, Target
from sinder_cli.repair.objective import neighbour_loss
from sinder_cli.repair.settings import RepairSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Directions:
    """The cumulative defect directions ν `[blocks, N]` of a backbone and σ₁/σ₂ of each."""

    nu: Tensor
    gaps: list[float]


@dataclass(frozen=True)
class BlockDefects:
    """The images of a batch whose first defective block is `block`."""

    block: int
    start: int  # the first block of the window
    entering: Tensor  # [k, tokens, N], the input of block `start`
    logits: Tensor  # [k, h, w]
    masks: Tensor  # bool [k, h, w]
    context: Any


@dataclass(frozen=True)
class StepGradient:
    """What one batch says: the loss of each defective image, ∂L/∂ε by target, and where the defects were."""

    losses: tuple[float, ...]
    gradients: dict[str, Tensor]  # of the mean loss of the defective images
    first_block: int | None
    masked_tokens: int

    @property
    def finite(self) -> bool:
        """Whether neither loss nor gradient has a NaN or an infinity."""
        sums = [gradient.sum() for gradient in self.gradients.values()]  # one look at the device, not one a target
        return all(map(math.isfinite, self.losses)) and (not sums or math.isfinite(torch.stack(sums).sum().item()))


@torch.no_grad()
def first_defects(
    backbone: Backbone, module: nn.Module, directions: Directions, images: Tensor, rule: DetectionRule, window: int
) -> list[BlockDefects]:
    """Run a batch `[B, 3, H, W]` block by block; an image leaves it at its first defective block.

    An image whose tokens are not finite leaves it too, with nothing masked: its loss is NaN, and it is not clean.
    """
    found: list[BlockDefects] = []
    tokens, context = backbone.embed(module, images)
    entering: deque[Tensor] = deque(maxlen=window)
    for block in range(backbone.depth):
        entering.append(tokens)
        tokens = backbone.run_block(module, block, tokens, context)
        trusted = rule.trusts(directions.gaps[block])
        if not trusted and block < backbone.depth - 1:  # what is not finite stays so: the last block tells
            continue
        logits = alignment_logits(patch_grid(backbone, tokens, images), directions.nu[block])
        masks = defect_mask(logits, rule) & trusted
        broken = ~logits.isfinite().flatten(1).all(dim=1)
        defective = (masks.flatten(1).sum(dim=1) >= rule.min_tokens) | broken  # [B]
        if not defective.any():
            continue
        start = block - len(entering) + 1
        found.append(BlockDefects(block, start, entering[0][defective], logits[defective], masks[defective], context))
        if defective.all():
            break
        tokens = tokens[~defective]
        entering = deque((kept[~defective] for kept in entering), maxlen=window)
    return found


def step_gradient(
    backbone: Backbone,
    module: nn.Module,
    directions: Directions,
    deltas: Deltas,
    images: Tensor,
    settings: RepairSettings,
) -> StepGradient:
    """The projected gradient of a batch `[B, 3, H, W]`: the mean over its defective images, each in its own window."""
    running = in_precision(backbone, settings.dtype)
    defects = first_defects(running, module, directions, images, DetectionRule.of(settings), settings.window)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    count = sum(len(found.masks) for found in defects)
    for found in defects:
        targets = [t for block in range(found.start, found.block + 1) for t in deltas.of_block(block)]
        values, by_parameter = _window_gradient(running, module, found, targets, settings, images)
        losses += values
        for target in targets:
            projected = target.basis.project(rows_of(by_parameter[target.ref.name], target.ref)) / count
            gradients[target.name] = gradients.get(target.name, 0) + projected
    masked = sum(int(found.masks.sum()) for found in defects)
    return StepGradient(tuple(losses), gradients, defects[0].block if defects else None, masked)


def _window_gradient(
    backbone: Backbone,
    module: nn.Module,
    found: BlockDefects,
    targets: list[Target],
    settings: RepairSettings,
    images: Tensor,
) -> tuple[list[float], dict[str, Tensor]]:
    """The loss of each image and ∂(sum of losses)/∂W of every parameter that holds a target of the window."""
    parameters = {name: module.get_parameter(name) for name in dict.fromkeys(t.ref.name for t in targets)}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            tokens = found.entering
            for block in range(found.start, found.block + 1):
                tokens = backbone.run_block(module, block, tokens, found.context)
            patches = patch_grid(backbone, tokens, images)
            losses = torch.stack(
                [
                    neighbour_loss(grid, logits, mask, settings.kernel, settings.temperature)
                    for grid, logits, mask in zip(patches, found.logits, found.masks, strict=True)
                ]
            )
            gradients = torch.autograd.grad(losses.sum(), list(parameters.values()))
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    return losses.tolist(), dict(zip(parameters, gradients, strict=True))
