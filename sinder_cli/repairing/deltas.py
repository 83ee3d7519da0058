"""The state of a repair: deltas ε of the singular values of every target weight that a step has touched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from sinder_cli.backbone.contract import Backbone, WeightRef, trained_references
from sinder_cli.backbone.weights import rows_of
from sinder_cli.events import Emit, Noted, silent
from sinder_cli.repairing.basis import SingularBasis, blank_basis, singular_basis, to_pinned_cpu

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sinder_cli.distributed import Ranks


def target_name(block: int, role: str) -> str:
    """How records and files name a target: `blocks.3.mlp.down`."""
    return f"blocks.{block}.{role}"


@dataclass
class Target:
    """One target weight inside the module, its original W₀ `[out, in]`, its basis, ε and the momentum of ε `[r]`."""

    block: int
    name: str
    ref: WeightRef  # the module's parameter that holds it, whole or in some rows
    weight: Tensor  # a view into that parameter
    original: Tensor
    basis: SingularBasis
    delta: Tensor
    velocity: Tensor

    def moved(self, gradient: Tensor, lr: float, momentum: float) -> Moved:
        """ε and its momentum after one step of SGD."""
        velocity = self.velocity * momentum + gradient
        return Moved(self, self.delta.sub(velocity, alpha=lr), velocity)

    def write(self, delta: Tensor | None = None) -> None:
        """Put W₀ + U diag(ε) Vᵀ into the module, for the target's own ε or another."""
        original = self.original.to(self.weight.device, non_blocking=True)
        self.weight.copy_(original + self.basis.change(self.delta if delta is None else delta))


@dataclass(frozen=True)
class Moved:
    """What a step makes of ε and its momentum of one target."""

    target: Target
    delta: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class TargetState:
    """What a checkpoint holds of a target: ε and its momentum `[r]`, and the basis, which never changes."""

    delta: Tensor
    velocity: Tensor
    basis: SingularBasis


@dataclass
class Deltas:
    """The targets of a module by block; a block is decomposed when a step first reaches it."""

    backbone: Backbone
    module: nn.Module
    emit: Emit = silent
    offload: bool = False  # bases and original weights wait on the CPU, and travel when a step uses them
    by_block: dict[int, list[Target]] = field(default_factory=dict)
    agreed: set[int] = field(default_factory=set)  # blocks whose bases are the same on all ranks
    decompose: Callable[[Tensor], SingularBasis] = singular_basis

    def of_block(self, index: int) -> list[Target]:
        """The targets of one block, decomposed now if they were not yet."""
        if index not in self.by_block:
            references = trained_references(self.backbone.layers.blocks[index])
            self.emit(Noted(f"decomposing the {len(references)} target weights of block {index}"))
            self.by_block[index] = [self._target(index, role, ref) for role, ref in references.items()]
        return self.by_block[index]

    @property
    def cuda(self) -> torch.device | None:
        """The CUDA device that the module is on, if it is on one."""
        device = next(self.module.parameters()).device
        return device if device.type == "cuda" else None

    @property
    def touched(self) -> list[Target]:
        """All targets so far, in the order of their blocks."""
        return [target for index in sorted(self.by_block) for target in self.by_block[index]]

    @property
    def changed(self) -> list[Target]:
        """The touched targets with a delta other than zero; a weight without one is left bit for bit."""
        return [target for target in self.touched if bool(target.delta.any())]

    @torch.no_grad()
    def descend(self, gradients: Mapping[str, Tensor], lr: float, momentum: float) -> None:
        """Step those targets that have a gradient; the others keep their velocity, as torch's SGD does without one.

        Where that fails, for want of memory, all ε and momenta are those of before, and no use is left for the module.
        """
        steps = [
            target.moved(gradients[target.name], lr, momentum) for target in self.touched if target.name in gradients
        ]
        for step in steps:
            step.target.write(step.delta)
        for step in steps:
            step.target.delta, step.target.velocity = step.delta, step.velocity

    @torch.no_grad()
    def put(self, deltas: Mapping[str, Tensor]) -> None:
        """Give targets, by name, another ε; where that fails, all ε are those of before, as in `descend`."""
        chosen = [(target, deltas[target.name]) for target in self.touched if target.name in deltas]
        for target, delta in chosen:
            target.write(delta)
        for target, delta in chosen:
            target.delta = delta

    def values(self) -> dict[str, Tensor]:
        """A copy of every ε that is not zero, by target."""
        return {target.name: target.delta.clone() for target in self.changed}

    def put_back(self, values: Mapping[str, Tensor]) -> None:
        """Give every target the ε that it has in `values`, or zero: the original bits where that is all."""
        for target in self.touched:
            target.delta = values.get(target.name, torch.zeros_like(target.delta)).to(target.delta)
            target.velocity = torch.zeros_like(target.velocity)
            if bool(target.delta.any()):
                target.write()
            else:
                target.weight.copy_(target.original.to(target.weight.device))

    def of_window(self, last: int, window: int) -> list[Target]:
        """The targets of the window that ends at a block, in the order of their blocks; all are touched."""
        return [target for block in range(max(0, last - window + 1), last + 1) for target in self.by_block[block]]

    def agree(self, touched: Sequence[Collection[int]], ranks: Ranks) -> None:
        """Touch all blocks that any rank has touched, as `touched` lists them by rank.

        Each has the bases of the first rank that decomposed it; nobody decomposes a block that it did not need itself.
        Where a rank is lost meanwhile, each block has the bases that it had, or none.
        """
        for index in sorted({index for blocks in touched for index in blocks} - self.agreed):
            holder = next(rank for rank, blocks in enumerate(touched) if index in blocks)
            self.by_block[index] = self._agreed(index, holder, ranks)
            self.agreed.add(index)

    def _agreed(self, index: int, holder: int, ranks: Ranks) -> list[Target]:
        """The targets of a block with the bases of one rank, which come into copies: they may come in part."""
        targets = self.by_block.get(index)
        if targets is None:
            references = trained_references(self.backbone.layers.blocks[index])
            targets = [
                self._target(index, role, ref, blank_basis(self._weight(ref))) for role, ref in references.items()
            ]
        agreed = []
        for target in targets:
            device = target.weight.device
            copies = {name: part.to(device, copy=True) for name, part in target.basis.tensors().items()}
            parts = {name: ranks.broadcast(copy, holder) for name, copy in copies.items()}
            agreed.append(replace(target, basis=self._placed(SingularBasis(**parts), device)))
        return agreed

    def decomposed(self, name: str) -> SingularBasis:
        """The basis of a target by its name, from the original weight that the module still holds."""
        index = int(name.split(".")[1])
        references = trained_references(self.backbone.layers.blocks[index])
        by_name = {target_name(index, role): ref for role, ref in references.items()}
        return self.decompose(self._weight(by_name[name]))

    @torch.no_grad()
    def restore(self, index: int, states: Mapping[str, TargetState]) -> None:
        """Put the targets of a block, by name, into the state that they had; the module holds the original weights."""
        references = trained_references(self.backbone.layers.blocks[index])
        targets = []
        for role, ref in references.items():
            state = states[target_name(index, role)]
            target = self._target(index, role, ref, state.basis)
            target.delta.copy_(state.delta)
            target.velocity.copy_(state.velocity)
            target.write()
            targets.append(target)
        self.by_block[index] = targets

    def _target(self, index: int, role: str, ref: WeightRef, basis: SingularBasis | None = None) -> Target:
        weight = self._weight(ref)
        basis = self._placed(self.decompose(weight) if basis is None else basis, weight.device)
        original = to_pinned_cpu(weight) if self.offload else weight.clone()
        zeros = (weight.new_zeros(len(basis.S)) for _ in range(2))
        return Target(index, target_name(index, role), ref, weight, original, basis, *zeros)

    def _weight(self, ref: WeightRef) -> Tensor:
        return rows_of(self.module.get_parameter(ref.name).detach(), ref)

    def _placed(self, basis: SingularBasis, device: torch.device) -> SingularBasis:
        """The basis where it waits for its steps."""
        return basis.offloaded() if self.offload else basis.to(device)
