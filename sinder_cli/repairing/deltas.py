"""Singular values as parameters: W = W₀ + U diag(ε) Vᵀ; and the state of a repair, ε of every target it has touched.

An adapter holds only ε; U and V are computed again from W₀. The computed SVD of W₀ is the exact SVD of W₀ + E, where E
is the rounding error. Let Δ be the symmetric and Γ the antisymmetric part of UᵀEV. To first order, and in the basis of
U and V, the rounding changes U diag(ε) Vᵀ by

    Δᵢⱼ (εᵢ − εⱼ)/(σᵢ − σⱼ) + Γᵢⱼ (εᵢ + εⱼ)/(σᵢ + σⱼ).

In float64 ‖E‖ is at most about 1e-14 σ₁, so only two cases matter: σᵢ ≈ σⱼ, which is harmless if εᵢ = εⱼ, and
σᵢ ≈ σⱼ ≈ 0, which is harmless if both ε are 0. The gradients of `SingularBasis.project` keep ε in this form, so code
that applies ε need not know the groups.
"""

from __future__ import annotations

import math
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


NEAR_EQUAL = 1e-9  # of σ₁: for a larger gap, rounding by 1e-14 σ₁ alters the change by at most 1e-5 of itself


@dataclass(frozen=True)
class SingularBasis:
    """The thin SVD of one target weight `W₀` `[out, in]`: U `[out, r]`, S `[r]`, Vt `[r, in]`, contiguous.

    U and Vt are float32 or better. S stays on the CPU in float64: only then are near-equal values recognized.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the three parts by name."""
        return {"U": self.U, "S": self.S, "Vt": self.Vt}

    def to(self, device: torch.device | str) -> SingularBasis:
        """Return the same basis with its vectors on another device."""
        return SingularBasis(self.U.to(device), self.S.cpu(), self.Vt.to(device))

    def offloaded(self) -> SingularBasis:
        """Return the same basis on the CPU, where its vectors stay until a step uses them."""
        return SingularBasis(to_pinned_cpu(self.U), self.S.cpu(), to_pinned_cpu(self.Vt))

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Ranges [start, stop) of two or more near-equal singular values; vanishing ones form no group."""
        return tuple(run for run in self._runs[:-1] if run[1] - run[0] > 1)

    @cached_property
    def rank(self) -> int:
        """Number of singular values that do not vanish; the others are near-equal to 0."""
        return self._runs[-1][0]

    @cached_property
    def _runs(self) -> list[tuple[int, int]]:
        """Ranges [start, stop) of S and a final 0 in which each value is near-equal to the one before it."""
        falling = torch.cat([self.S, self.S.new_zeros(1)])
        apart = (falling[:-1] - falling[1:]) > NEAR_EQUAL * falling[0]
        starts = [0, *(apart.nonzero().flatten() + 1).tolist()]
        return list(zip(starts, [*starts[1:], len(falling)], strict=True))

    def project(self, gradient: Tensor) -> Tensor:
        """Return ∂L/∂ε = diag(Uᵀ (∂L/∂W) V): `[out, in]` → `[r]`, with one value for near-equal singular values.

        Each entry of a group becomes the mean of the group, ⟨∂L/∂W, U_g V_gᵀ⟩ over its size, which does not depend on
        the choice of U_g and V_g. Entries of vanishing singular values, whose U and V turn independently, become 0.
        """
        U, Vt = self._vectors(gradient.device)
        projected = ((U.T @ gradient) * Vt).sum(dim=1)
        for start, stop in self.groups:
            projected[start:stop] = projected[start:stop].mean()
        projected[self.rank :] = 0
        return projected

    def change(self, delta: Tensor) -> Tensor:
        """Return U diag(ε) Vᵀ: `[r]` → `[out, in]`."""
        U, Vt = self._vectors(delta.device)
        return (U * delta) @ Vt

    def _vectors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.U.to(device, non_blocking=True), self.Vt.to(device, non_blocking=True)


def to_pinned_cpu(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU, pinned if it comes from a CUDA device, which can then read it without waiting."""
    copy = tensor.to("cpu", copy=True)
    return copy.pin_memory() if tensor.is_cuda else copy


def blank_basis(weight: Tensor) -> SingularBasis:
    """Return a basis of empty tensors in the shapes for a weight that another process has decomposed."""
    r, kept = min(weight.shape), torch.promote_types(weight.dtype, torch.float32)
    U, Vt = (weight.new_empty(shape, dtype=kept) for shape in ((len(weight), r), (r, weight.shape[1])))
    return SingularBasis(U, torch.empty(r, dtype=torch.float64), Vt)


def singular_basis(weight: Tensor) -> SingularBasis:
    """Decompose a target weight in float64 on its device, or on the CPU if the device (MPS) has no float64."""
    given = weight.detach()
    exact = (given.cpu() if given.device.type == "mps" else given).double()
    if exact.shape[0] < exact.shape[1]:  # LAPACK takes three times as long for [1536, 4096] as for its transpose
        V, S, Ut = _tall_svd(exact.T)
        U, Vt = Ut.T, V.T
    else:
        U, S, Vt = _tall_svd(exact)
    kept = torch.promote_types(given.dtype, torch.float32)
    U, Vt = (part.to(kept).contiguous() for part in (U, Vt))
    return SingularBasis(U, S.contiguous(), Vt).to(given.device)


def _tall_svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of `[m, n]`, m ≥ n, float64.

    On a CUDA device through the polar decomposition: PyTorch's default there, one-sided Jacobi, leaves rounding errors
    of 1e-12 σ₁, a hundred times LAPACK's, and takes four times as long. Where that does not reach LAPACK's accuracy,
    as for a matrix with a column of zeros, cuSOLVER's own QR iteration does.
    """
    if not W.is_cuda:
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        return U, S, Vt
    found = svd_by_polar(W)
    return torch.linalg.svd(W, full_matrices=False, driver="gesvd") if found is None else found


POLAR_STEPS = 100  # 1.5^100 is beyond 1/ε of float64: what has not converged then has no part in the matrix at all
CONVERGED = 3e-8  # ‖I − XᵀX‖, which the next step squares
EXACT = 1e-13  # of ‖W‖: about ten times the error of LAPACK's SVD


def svd_by_polar(W: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the thin SVD of `[m, n]`, m ≥ n, by W = Q H with orthonormal Q and H = V diag(S) Vᵀ: U is Q V.

    Q comes from the iteration X ← X (3 I − XᵀX)/2 of Newton and Schulz, which is all matrix products (Higham and
    Papadimitriou, 1994). Returns None if it does not converge, or if the result is less exact than `EXACT`.
    """
    identity = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
    bound = (torch.linalg.matrix_norm(W, 1) * torch.linalg.matrix_norm(W, math.inf)).sqrt()  # ≥ σ₁
    X = W / bound
    for _ in range(POLAR_STEPS):
        error = identity - X.T @ X
        X = X + X @ error / 2
        if float(error.norm()) <= CONVERGED:
            break
    else:
        return None
    H = X.T @ W
    values, V = torch.linalg.eigh((H + H.T) / 2)
    values, V = values.flip(0), V.flip(1)
    U, S = X @ V * torch.where(values < 0, -1.0, 1.0), values.abs()
    if float(((U * S) @ V.T - W).norm()) > EXACT * float(W.norm()) or bool((S[1:] > S[:-1]).any()):
        return None
    return U, S, V.T


def target_name(block: int, role: str) -> str:
    """Return the name of a target in records and files, such as `blocks.3.mlp.down`."""
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
        """Return ε and its momentum after one step of SGD."""
        velocity = self.velocity * momentum + gradient
        return Moved(self, self.delta.sub(velocity, alpha=lr), velocity)

    def write(self, delta: Tensor | None = None) -> None:
        """Write W₀ + U diag(ε) Vᵀ into the module, for the given ε or else the target's own."""
        original = self.original.to(self.weight.device, non_blocking=True)
        self.weight.copy_(original + self.basis.change(self.delta if delta is None else delta))


@dataclass(frozen=True)
class Moved:
    """The new ε and momentum of one target after a step."""

    target: Target
    delta: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class TargetState:
    """The state of a target in a checkpoint: ε and its momentum `[r]`, and the basis, which never changes."""

    delta: Tensor
    velocity: Tensor
    basis: SingularBasis


@dataclass
class Deltas:
    """The targets of a module by block; a block is decomposed when a step first reaches it."""

    backbone: Backbone
    module: nn.Module
    emit: Emit = silent
    offload: bool = False  # keep bases and original weights on the CPU, and copy them to the device for a step
    by_block: dict[int, list[Target]] = field(default_factory=dict)
    agreed: set[int] = field(default_factory=set)  # blocks whose bases are the same on all ranks
    decompose: Callable[[Tensor], SingularBasis] = singular_basis

    def of_block(self, index: int) -> list[Target]:
        """Return the targets of one block; decompose them first if that has not been done yet."""
        if index not in self.by_block:
            references = trained_references(self.backbone.layers.blocks[index])
            self.emit(Noted(f"decomposing the {len(references)} target weights of block {index}"))
            self.by_block[index] = [self._target(index, role, ref) for role, ref in references.items()]
        return self.by_block[index]

    @property
    def cuda(self) -> torch.device | None:
        """The CUDA device of the module; None if it is on another kind of device."""
        device = next(self.module.parameters()).device
        return device if device.type == "cuda" else None

    @property
    def touched(self) -> list[Target]:
        """All targets of the blocks touched so far, in the order of the blocks."""
        return [target for index in sorted(self.by_block) for target in self.by_block[index]]

    @property
    def changed(self) -> list[Target]:
        """The touched targets whose delta is not zero; all other weights keep their original bits."""
        return [target for target in self.touched if bool(target.delta.any())]

    @torch.no_grad()
    def descend(self, gradients: Mapping[str, Tensor], lr: float, momentum: float) -> None:
        """Update the targets that have a gradient; the others keep their velocity, as in torch's SGD.

        If that fails for lack of memory, all ε and momenta keep their earlier values, but the module is unusable.
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
        """Set a new ε for the named targets; if that fails, all ε keep their earlier values, as in `descend`."""
        chosen = [(target, deltas[target.name]) for target in self.touched if target.name in deltas]
        for target, delta in chosen:
            target.write(delta)
        for target, delta in chosen:
            target.delta = delta

    def values(self) -> dict[str, Tensor]:
        """Return a copy of every ε that is not zero, by target."""
        return {target.name: target.delta.clone() for target in self.changed}

    def put_back(self, values: Mapping[str, Tensor]) -> None:
        """Set every target to its ε in `values`, or to zero without one, which restores the original bits.

        All momenta become zero.
        """
        for target in self.touched:
            target.delta = values.get(target.name, torch.zeros_like(target.delta)).to(target.delta)
            target.velocity = torch.zeros_like(target.velocity)
            if bool(target.delta.any()):
                target.write()
            else:
                target.weight.copy_(target.original.to(target.weight.device))

    def of_window(self, last: int, window: int) -> list[Target]:
        """Return the targets of the window that ends at block `last`, in block order; all must be touched already."""
        return [target for block in range(max(0, last - window + 1), last + 1) for target in self.by_block[block]]

    def agree(self, touched: Sequence[Collection[int]], ranks: Ranks) -> None:
        """Touch all blocks that any rank has touched; `touched` lists them by rank.

        All ranks use the bases of the first rank that decomposed a block; no rank decomposes a block that it did not
        need itself. If a rank is lost meanwhile, each block keeps the bases that it had, or none.
        """
        for index in sorted({index for blocks in touched for index in blocks} - self.agreed):
            holder = next(rank for rank, blocks in enumerate(touched) if index in blocks)
            self.by_block[index] = self._agreed(index, holder, ranks)
            self.agreed.add(index)

    def _agreed(self, index: int, holder: int, ranks: Ranks) -> list[Target]:
        """Return the targets of a block with the bases of rank `holder`, received into copies: it may stop halfway."""
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
        """Decompose a target, given by name, from the original weight, which the module must still hold."""
        index = int(name.split(".")[1])
        references = trained_references(self.backbone.layers.blocks[index])
        by_name = {target_name(index, role): ref for role, ref in references.items()}
        return self.decompose(self._weight(by_name[name]))

    @torch.no_grad()
    def restore(self, index: int, states: Mapping[str, TargetState]) -> None:
        """Restore the targets of a block from `states`, by name; the module must hold the original weights."""
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
        """Return the basis on the device where it is kept between steps: the CPU if `offload`, else `device`."""
        return basis.offloaded() if self.offload else basis.to(device)
