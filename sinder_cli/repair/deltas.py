"""The state of a repair: deltas ε of the singular values of every target weight that a step has touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sinder_cli.backbone.blocks import rows_of
from sinder_cli.backbone.describe import Backbone
from sinder_cli.backbone.layermap import WeightRef, trained_references
from sinder_cli.events import Emit, Noted, silent
from sinder_cli.repair.basis import SingularBasis, singular_basis

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class Target:
    """One target weight inside the module, its original W₀ `[out, in]`, its basis, ε and the momentum of ε `[r]`."""

    name: str  # blocks.3.mlp.down
    ref: WeightRef  # the module's parameter that holds it, whole or in some rows
    weight: Tensor  # a view into that parameter
    original: Tensor
    basis: SingularBasis
    delta: Tensor
    velocity: Tensor

    def descend(self, gradient: Tensor, lr: float, momentum: float) -> None:
        """One step of SGD with momentum on ε, written back as W₀ + U diag(ε) Vᵀ."""
        self.velocity.mul_(momentum).add_(gradient)
        self.delta.sub_(self.velocity, alpha=lr)
        self.weight.copy_(self.original + self.basis.change(self.delta))


@dataclass
class Deltas:
    """The targets of a module by block; a block is decomposed when a step first reaches it."""

    backbone: Backbone
    module: nn.Module
    emit: Emit = silent
    by_block: dict[int, list[Target]] = field(default_factory=dict)

    def of_block(self, index: int) -> list[Target]:
        """The targets of one block, decomposed now if they were not yet."""
        if index not in self.by_block:
            references = trained_references(self.backbone.layers.blocks[index])
            self.emit(Noted(f"decomposing the {len(references)} target weights of block {index}"))
            self.by_block[index] = [self._target(f"blocks.{index}.{role}", ref) for role, ref in references.items()]
        return self.by_block[index]

    @property
    def touched(self) -> list[Target]:
        """All targets so far, in the order of their blocks."""
        return [target for index in sorted(self.by_block) for target in self.by_block[index]]

    @torch.no_grad()
    def descend(self, gradients: Mapping[str, Tensor], lr: float, momentum: float) -> None:
        """Step those targets that have a gradient; the others keep their velocity, as torch's SGD does without one."""
        for target in self.touched:
            if target.name in gradients:
                target.descend(gradients[target.name], lr, momentum)

    def _target(self, name: str, ref: WeightRef) -> Target:
        weight = rows_of(self.module.get_parameter(ref.name).detach(), ref)
        basis = singular_basis(weight)
        return Target(name, ref, weight, weight.clone(), basis, torch.zeros_like(basis.S), torch.zeros_like(basis.S))
