"""The leading left singular pair of a matrix, without a full SVD.

Golub–Kahan–Lanczos: the Krylov space of M Mᵀ with full reorthogonalization, restarted from its best Ritz vectors.
Matrix–vector products only: on a CPU one costs a tenth of a product with a thin block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    """
    floor = 8 * torch.finfo(matrix.dtype).eps

    def is_enough(found: _Ritz) -> bool:
        error = found.residual.norm().item()
        # the complement is searched for its value alone, which converges twice as fast as the vector
        bound = 1e-3 * found.sigma2 if deflated is not None else ANGLE_TOLERANCE * found.below
        return error <= bound or error <= floor * max(found.sigma2, largest**2)

    space = _KrylovSpace(matrix, deflated)
    q, restarts = start, 0
    while True:
        found = space.search(q, is_enough)
        restarts += 1
        if is_enough(found) or space.spans_all or restarts == MAX_RESTARTS:
            return found.vector, found.runner_up, math.sqrt(max(found.sigma2, 0.0))
        q = space.restart(found)


@dataclass(frozen=True)
class _Ritz:
    """The leading left singular pair as a Krylov space approximates it."""

    vector: Tensor  # [N]
    runner_up: Tensor  # [N]: the second Ritz vector, or the first if there is no second
    sigma2: float  # σ₁²
    below: float  # σ₁² − σ₂²
    residual: Tensor  # [N]: M Mᵀu − σ₁²u
    coefficients: Tensor  # [m, m]: rows give the Ritz vectors in the basis


class _KrylovSpace:
    """Rows of Q `[m, N]` are an orthonormal basis, rows of P `[m, M]` its images Mᵀq; PPᵀ is M Mᵀ in this basis.

    The basis is orthogonal to `deflated`, which is a row of its own before it in memory: every new direction is made
    orthogonal to both by the same products. On a GPU, what costs time is the number of operations.
    """

    def __init__(self, matrix: Tensor, deflated: Tensor | None) -> None:
        self.matrix, self.deflated = matrix, deflated
        self.whole = matrix.shape[0] - (deflated is not None)  # a basis of so many vectors spans everything
        self.size = min(KRYLOV_SIZE, self.whole)
        self._rows = matrix.new_zeros(1 + self.size, matrix.shape[0])
        if deflated is not None:
            self._rows[0] = deflated
        self.Q, self.P = self._rows[1:], matrix.new_zeros(self.size, matrix.shape[1])
        self.filled = 0

    @property
    def spans_all(self) -> bool:
        """True if nothing lies outside the basis."""
        return self.filled == self.whole

    def search(self, q: Tensor, is_enough: Callable[[_Ritz], bool]) -> _Ritz:
        """Extend the basis from `q` until the leading pair is good enough, or the basis is full."""
        while True:
            q = self._extend(q)
            if self.filled % KEPT == 0 or self.filled == self.size:
                found = self._leading()
                if self.filled == self.size or is_enough(found):
                    return found

    def restart(self, found: _Ritz) -> Tensor:
        """Keep the best Ritz vectors alone as the basis, and return the direction to go on with."""
        keep = min(KEPT, self.size - 1)
        V = found.coefficients
        self.Q[:keep], self.P[:keep] = V[:keep] @ self.Q, V[:keep] @ self.P
        self.filled = keep
        return found.residual

    def _extend(self, q: Tensor) -> Tensor:
        """Add a direction to the basis, made orthogonal to it, and return the next one, M Mᵀq."""
        q = _orthonormal(q, self._rows[: 1 + self.filled])
        self.Q[self.filled] = q
        image = torch.mv(self.matrix.T, q, out=self.P[self.filled])
        self.filled += 1
        return self.matrix @ image

    def _leading(self) -> _Ritz:
        theta, V = _ritz(self.P[: self.filled])
        Q, sigma2 = self.Q[: self.filled], theta[0].item()
        u = V[0] @ Q
        residual = self.matrix @ (V[0] @ self.P[: self.filled]) - sigma2 * u
        if self.deflated is not None:
            residual -= (self.deflated @ residual) * self.deflated
        second = theta[1].item() if self.filled > 1 else 0.0
        return _Ritz(u, V[min(1, self.filled - 1)] @ Q, sigma2, sigma2 - second, residual, V)


def _ritz(P: Tensor) -> tuple[Tensor, Tensor]:
    """Return Ritz values, largest first, and the coefficients of their vectors, one row each.

    The values are on the CPU, where so small a matrix is decomposed soonest.
    """
    wide = P.double()
    theta, V = torch.linalg.eigh((wide @ wide.T).cpu())
    return theta.flip(0), V.T.flip(0).to(P)


def _orthonormal(q: Tensor, basis: Tensor) -> Tensor:
    """Return `q` made orthogonal to the rows of `basis`, which are orthonormal or zero, and of unit norm.

    Twice, because of float32. If nothing is left of it, the Krylov space is exhausted: a new direction takes its place.
    """
    for seed in range(2, 5):
        before = q.norm()
        for _ in range(2):
            q = torch.addmv(q, basis.T, basis @ q, alpha=-1)
        after = q.norm()
        was, now = torch.stack([before, after]).tolist()
        if now > 1e-5 * was:
            return q / after
        generator = torch.Generator().manual_seed(seed + len(basis) - 1)
        q = torch.randn(q.shape[0], generator=generator, dtype=torch.float64).to(q)
    return q / q.norm()
