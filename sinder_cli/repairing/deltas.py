"""Singular values as parameters: W = W₀ + U diag(ε) Vᵀ; and the state of a repair, ε of every target it has touched.

An adapter holds ε alone, and U and V are found again from W₀. An SVD of W₀ is exact for W₀ + E, where ‖E‖ is the
rounding of the computation. With the symmetric part Δ and the antisymmetric part Γ of UᵀEV, to first order and in the
basis of U and V, that moves U diag(ε) Vᵀ by

    Δᵢⱼ (εᵢ − εⱼ)/(σᵢ − σⱼ) + Γᵢⱼ (εᵢ + εⱼ)/(σᵢ + σⱼ).

In float64 ‖E‖ is at most about 1e-14 σ₁, so that two cases matter: σᵢ ≈ σⱼ, harmless where εᵢ = εⱼ, and σᵢ ≈ σⱼ ≈ 0,
harmless where both ε are 0. `SingularBasis.project` gives gradients that keep ε so; whoever applies ε needs no groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from sinder_cli.backbone.contract import Backbone, WeightRef, trained_references
from sinder_cli.backbone.weights import rows_of
from sinder_cli.events import Emit, Noted, silent

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sinder_cli.distributed import Ranks


NEAR_EQUAL = 1e-9  # of σ₁: beyond such a gap, 1e-14 σ₁ of rounding moves the change by at most 1e-5 of itself


@dataclass(frozen=True)
class SingularBasis:
    """The thin SVD of one target weight `W₀` `[out, in]`: U `[out, r]`, S `[r]`, Vt `[r, in]`, contiguous.

    U and Vt are float32 or better. S stays on the CPU in float64: which values are near-equal shows only there.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The three parts by name."""
        return {"U": self.U, "S": self.S, "Vt": self.Vt}

    def to(self, device: torch.device | str) -> SingularBasis:
        """The same with its vectors on another device."""
        return SingularBasis(self.U.to(device), self.S.cpu(), self.Vt.to(device))

    def offloaded(self) -> SingularBasis:
        """The same on the CPU, where its vectors wait for their steps."""
        return SingularBasis(to_pinned_cpu(self.U), self.S.cpu(), to_pinned_cpu(self.Vt))

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """The runs [start, stop) of two or more near-equal singular values; those that vanish are none."""
        return tuple(run for run in self._runs[:-1] if run[1] - run[0] > 1)

    @cached_property
    def rank(self) -> int:
        """How many singular values do not vanish; the others are near-equal to 0."""
        return self._runs[-1][0]

    @cached_property
    def _runs(self) -> list[tuple[int, int]]:
        """[start, stop) of the runs of S and a last 0 in which each value is near-equal to the one before."""
        falling = torch.cat([self.S, self.S.new_zeros(1)])
        apart = (falling[:-1] - falling[1:]) > NEAR_EQUAL * falling[0]
        starts = [0, *(apart.nonzero().flatten() + 1).tolist()]
        return list(zip(starts, [*starts[1:], len(falling)], strict=True))

    def project(self, gradient: Tensor) -> Tensor:
        """∂L/∂ε = diag(Uᵀ (∂L/∂W) V): `[out, in]` → `[r]`, where near-equal singular values keep one ε.

        A group gets the mean of its entries, which is that of ⟨∂L/∂W, U_g V_gᵀ⟩ and no matter of the choice of U_g and
        V_g; vanishing singular values, whose U and V turn independently, get 0.
        """
        U, Vt = self._vectors(gradient.device)
        projected = ((U.T @ gradient) * Vt).sum(dim=1)
        for start, stop in self.groups:
            projected[start:stop] = projected[start:stop].mean()
        projected[self.rank :] = 0
        return projected

    def change(self, delta: Tensor) -> Tensor:
        """U diag(ε) Vᵀ: `[r]` → `[out, in]`."""
        U, Vt = self._vectors(delta.device)
        return (U * delta) @ Vt

    def _vectors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.U.to(device, non_blocking=True), self.Vt.to(device, non_blocking=True)


def to_pinned_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU; pinned if it comes from a CUDA device, which reads it from there without waiting."""
    copy = tensor.to("cpu", copy=True)
    return copy.pin_memory() if tensor.is_cuda else copy


def blank_basis(weight: Tensor) -> SingularBasis:
    """Room for the basis of a weight that another process has decomposed."""
    r, kept = min(weight.shape), torch.promote_types(weight.dtype, torch.float32)
    U, Vt = (weight.new_empty(shape, dtype=kept) for shape in ((len(weight), r), (r, weight.shape[1])))
    return SingularBasis(U, torch.empty(r, dtype=torch.float64), Vt)


def singular_basis(weight: Tensor) -> SingularBasis:
    """Decompose a target weight in float64, wherever it lies; on the CPU where its device (MPS) has no float64."""
    given = weight.detach()
    exact = (given.cpu() if given.device.type == "mps" else given).double()
    if exact.shape[0] < exact.shape[1]:  # LAPACK takes three times as long for [1536, 4096] as for its transpose
        V, S, Ut = torch.linalg.svd(exact.T, full_matrices=False)
        U, Vt = Ut.T, V.T
    else:
        U, S, Vt = torch.linalg.svd(exact, full_matrices=False)
    kept = torch.promote_types(given.dtype, torch.float32)
    U, Vt = (part.to(kept).contiguous() for part in (U, Vt))
    return SingularBasis(U, S.contiguous(), Vt).to(given.device)


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
