"""Singular values as parameters: W = W₀ + U diag(ε) Vᵀ, exact at ε = 0, and the same on another machine.

An adapter holds ε alone, and U and V are found again from W₀. An SVD of W₀ is exact for W₀ + E, where ‖E‖ is the
rounding of the computation. With the symmetric part Δ and the antisymmetric part Γ of UᵀEV, to first order and in the
basis of U and V, that moves U diag(ε) Vᵀ by

    Δᵢⱼ (εᵢ − εⱼ)/(σᵢ − σⱼ) + Γᵢⱼ (εᵢ + εⱼ)/(σᵢ + σⱼ).

In float64 ‖E‖ is at most about 1e-14 σ₁, so that two cases matter: σᵢ ≈ σⱼ, harmless where εᵢ = εⱼ, and σᵢ ≈ σⱼ ≈ 0,
harmless where both ε are 0. `SingularBasis.project` gives gradients that keep ε so; whoever applies ε needs no groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

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
