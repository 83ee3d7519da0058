"""One step: find the first defective block of each image, and project the loss's gradient onto singular values.

    1. Run the blocks one by one, each recorded by itself, until the first defective one.
    2. Pull the gradient of the loss back through the last ≤ window blocks, from the defective one down.
    3. ∂L/∂ε = diag(Uᵀ (∂L/∂W) V), block by block on the way.

No module is swapped and none is parametrized: any attention kernel, autocast and any model class work unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sinder_cli.backbone.blocks import rows_of
from sinder_cli.backbone.describe import Backbone
from sinder_cli.backbone.device import float32_products
from sinder_cli.backbone.layermap import trained_references
from sinder_cli.defects.detection import DetectionRule
from sinder_cli.defects.tokens import in_precision, patch_grid
from sinder_cli.repair.deltas import Deltas
from sinder_cli.repair.forward import BlockDefects, Directions, first_defects, recorded
from sinder_cli.repair.objective import neighbour_loss
from sinder_cli.repair.settings import RepairSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

# float16 has no normal number under 6e-5, and the gradient of one feature of a token is about 1e-5 in a ViT-g: 2¹²
# lifts it to 0.07 and leaves room for sums a million times as large. What overflows all the same is a skipped step.
LOSS_SCALES = {"float16": 2.0**12}


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
def step_gradient(
    backbone: Backbone,
    module: nn.Module,
    directions: Directions,
    deltas: Deltas,
    images: Tensor,
    settings: RepairSettings,
) -> StepGradient:
    """The projected gradient of a batch `[B, 3, H, W]`: the mean over its defective images, each in its own window."""
    running = in_precision(backbone, settings.dtype, settings.tf32)
    rule = DetectionRule.of(settings)
    scale = LOSS_SCALES.get(settings.dtype, 1.0)
    losses: list[float] = []
    sums: dict[str, Tensor] = {}
    blocks: list[int] = []
    masked = 0
    with _trained(backbone, module):
        for found in first_defects(running, module, directions, images, rule, settings.window):
            blocks.append(found.block)
            masked += int(found.masks[found.defective].sum())
            values, gradient = _loss_gradient(running, found, images, settings, scale)
            losses += values
            for name, projected in _window_gradients(running, module, found, gradient, deltas, settings.tf32):
                sums[name] = sums[name] + projected if name in sums else projected
    gradients = {name: total / (len(losses) * scale) for name, total in sums.items()}
    return StepGradient(tuple(losses), gradients, blocks[0] if blocks else None, masked)


@contextmanager
def _trained(backbone: Backbone, module: nn.Module) -> Iterator[None]:
    """Let the parameters that hold target weights require gradients."""
    names = {ref.name for block in backbone.layers.blocks for ref in trained_references(block).values()}
    parameters = [module.get_parameter(name) for name in names]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _loss_gradient(
    backbone: Backbone, found: BlockDefects, images: Tensor, settings: RepairSettings, scale: float
) -> tuple[list[float], Tensor]:
    """The loss of each defective image, and scale · ∂(sum of losses)/∂tokens `[B, T, N]`, zero for other images."""
    tokens = found.tokens.detach().requires_grad_()
    with torch.enable_grad():
        grids = patch_grid(backbone, tokens, images)
        losses = torch.stack(
            [
                neighbour_loss(grids[i], found.logits[i], found.masks[i], settings.kernel, settings.temperature)
                for i in found.defective.nonzero()[:, 0].tolist()
            ]
        )
        (gradient,) = torch.autograd.grad(losses.sum() * scale, tokens)
    return losses.tolist(), gradient


def _window_gradients(
    backbone: Backbone, module: nn.Module, found: BlockDefects, gradient: Tensor, deltas: Deltas, tf32: bool
) -> Iterator[tuple[str, Tensor]]:
    """∂/∂ε of each target of the window by name, given that of the window's output `[B, T, N]`.

    Takes the window apart, so that the graph of a block is gone before the next one's is needed.
    """
    blocks = [passed.block for passed in found.window]
    if not deltas.by_block.keys() >= set(blocks):
        found.forget()  # decomposing needs the room
    targets_of = {block: deltas.of_block(block) for block in blocks}
    while found.window:
        passed = found.window.pop()
        entering, leaving = passed.entering, passed.leaving
        if leaving is None:
            entering, leaving = recorded(backbone, module, passed.block, entering, found.context)
        targets = targets_of[passed.block]
        names = list(dict.fromkeys(target.ref.name for target in targets))
        sources = [module.get_parameter(name) for name in names]
        with float32_products(tf32):
            gradients = torch.autograd.grad(leaving, [*sources, *([entering] if found.window else [])], gradient)
        gradient = gradients[-1]
        by_name = dict(zip(names, gradients, strict=False))
        for target in targets:
            yield target.name, target.basis.project(rows_of(by_name[target.ref.name], target.ref))
