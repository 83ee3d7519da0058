"""Singular values as parameters: W = W₀ + U diag(ε) Vᵀ, exact at ε = 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SingularBasis:
    """The thin SVD of one target weight `W₀` `[out, in]`: U `[out, r]`, S `[r]`, Vt `[r, in]`, contiguous float32."""

    U: Tensor
    S: Tensor
    Vt: Tensor

    def project(self, gradient: Tensor) -> Tensor:
        """∂L/∂ε = diag(Uᵀ (∂L/∂W) V): `[out, in]` → `[r]`."""
        return ((self.U.T @ gradient) * self.Vt).sum(dim=1)

    def change(self, delta: Tensor) -> Tensor:
        """U diag(ε) Vᵀ: `[r]` → `[out, in]`."""
        return (self.U * delta) @ self.Vt


def singular_basis(weight: Tensor) -> SingularBasis:
    """Decompose a target weight in float32 or better, wherever it lies."""
    U, S, Vt = torch.linalg.svd(
        weight.detach().to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False
    )
    return SingularBasis(U.contiguous(), S.contiguous(), Vt.contiguous())
