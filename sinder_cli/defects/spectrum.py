"""The leading left singular pair of a matrix, without a full SVD.

Golub–Kahan–Lanczos: the Krylov space of M Mᵀ with full reorthogonalization, restarted from its best Ritz vectors.
Matrix–vector products only: on a CPU one costs a tenth of a product with a thin block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

KRYLOV_SIZE = 40  # vectors, of which KEPT are kept between restarts
KEPT = 8
MAX_RESTARTS = 12
SAFE_EXPONENT = 20  # squares of entries within 2^±20 neither overflow nor vanish in float32
ANGLE_TOLERANCE = 1e-4  # radians: the bound ‖M Mᵀu − σ²u‖ / (σ₁² − σ₂²) on the angle to the true direction


@dataclass(frozen=True)
class LeadingPair:
    """ν `[N]` of unit norm with its sign fixed, σ₁, and σ₂ below it."""

    direction: Tensor
    sigma: float
    second: float

    @property
    def gap(self) -> float:
        """σ₁/σ₂; near 1 the direction is not determined, and a zero matrix determines none."""
        if self.second > 0:
            return self.sigma / self.second
        return math.inf if self.sigma > 0 else 1.0


def leading_left(matrix: Tensor, start: Tensor | None = None) -> LeadingPair:
    """Return the leading left singular vector of `matrix` `[N, M]` and its two largest singular values.

    `start` `[N]` is a first guess that shortens the search. σ₂ comes from a second search in the complement of ν, so
    that a doubled σ₁, which no single Krylov space can see, is reported as a gap of 1. The result depends only on the
    input.
    """
    exponent = math.frexp(torch.linalg.vector_norm(matrix, math.inf).item())[1]
    scale = 2.0**exponent if abs(exponent) > SAFE_EXPONENT else 1.0  # scaling by a power of 2 is exact
    if scale != 1.0:
        matrix = matrix / scale
    seed = _seeded(matrix)
    first = seed if start is None else start.to(matrix) / start.norm() + 1e-3 * seed
    u, runner_up, sigma = _lanczos(matrix, first, None)
    if len(u) == 1:
        return LeadingPair(u.new_ones(1), sigma * scale, 0.0)
    _, _, second = _lanczos(matrix, runner_up + 0.1 * seed, u, sigma)
    return LeadingPair(fixed_sign(u / u.norm()), sigma * scale, min(second, sigma) * scale)


def fixed_sign(direction: Tensor) -> Tensor:
    """Return ±ν with its entry of largest magnitude positive."""
    return direction * torch.sign(direction[direction.abs().argmax()])


def angle_between(a: Tensor, b: Tensor) -> float:
    """Return the angle in degrees, 0 to 90, between the lines through `a` and `b`, accurate down to 1e-6 degrees."""
    a, b = a.double() / a.double().norm(), b.double() / b.double().norm()
    b = b * torch.sign(a @ b)
    return math.degrees(2 * math.atan2((a - b).norm().item(), (a + b).norm().item()))


def _seeded(matrix: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[0], generator=generator, dtype=torch.float64)
    return (start / start.norm()).to(matrix)


def _lanczos(
    matrix: Tensor, start: Tensor, deflated: Tensor | None, largest: float = 0.0
) -> tuple[Tensor, Tensor, float]:
    """Return the two leading left singular vectors of `matrix`, or of (I − uuᵀ) `matrix` where `deflated` is u, and σ₁.

    `largest` is the σ of the deflated u: rounding leaves residuals relative to it, and smaller ones have no meaning.

    Rows of Q `[m, N]` are an orthonormal basis, rows of P `[m, M]` its images Mᵀq; (PPᵀ) is M Mᵀ seen from the basis.
    """
    whole = matrix.shape[0] - (deflated is not None)  # a basis of so many vectors spans everything
    size = min(KRYLOV_SIZE, whole)
    floor = 8 * torch.finfo(matrix.dtype).eps
    Q, P = matrix.new_zeros(size, matrix.shape[0]), matrix.new_zeros(size, matrix.shape[1])
    filled, q = 0, start
    for _ in range(MAX_RESTARTS):
        while filled < size:
            q = _orthonormal(q, Q[:filled], deflated)
            Q[filled], P[filled] = q, q @ matrix
            q = matrix @ P[filled]
            filled += 1
            if filled % KEPT == 0 or filled == size:
                theta, V = _ritz(P[:filled])
                u, sigma2 = V[0] @ Q[:filled], theta[0].item()
                residual = matrix @ (V[0] @ P[:filled]) - sigma2 * u
                if deflated is not None:
                    residual -= (deflated @ residual) * deflated
                error = residual.norm().item()
                below = sigma2 - theta[1].item() if filled > 1 else sigma2
                # only the value is searched in the complement, and it converges twice as fast as the vector
                enough = error <= 1e-3 * sigma2 if deflated is not None else error <= ANGLE_TOLERANCE * below
                if enough or error <= floor * max(sigma2, largest**2) or filled == whole:
                    return u, V[min(1, filled - 1)] @ Q[:filled], math.sqrt(max(sigma2, 0.0))
        keep = min(KEPT, size - 1)
        Q[:keep], P[:keep] = V[:keep] @ Q, V[:keep] @ P
        filled, q = keep, residual
    return u, Q[min(1, size - 1)], math.sqrt(max(sigma2, 0.0))


def _ritz(P: Tensor) -> tuple[Tensor, Tensor]:
    """Return Ritz values, largest first, and the coefficients of their vectors, one row each."""
    wide = P.double()
    theta, V = torch.linalg.eigh(wide @ wide.T)
    return theta.flip(0), V.T.flip(0).to(P.dtype)


def _orthonormal(q: Tensor, Q: Tensor, deflated: Tensor | None) -> Tensor:
    """Return `q` made orthogonal to basis and u, twice because of float32; a new direction if nothing is left."""
    norm = q.norm()
    for seed in range(2, 5):
        for _ in range(2):
            q = q - (Q @ q) @ Q
            if deflated is not None:
                q = q - (deflated @ q) * deflated
        if q.norm() > 1e-5 * norm and norm > 0:
            return q / q.norm()
        generator = torch.Generator().manual_seed(seed + len(Q))  # the Krylov space is exhausted
        q = torch.randn(q.shape[0], generator=generator, dtype=torch.float64).to(q)
        norm = q.norm()
    return q / q.norm()
