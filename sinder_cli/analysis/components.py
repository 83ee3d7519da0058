"""Principal components of patch tokens, from sums to which each image is added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """A mean `[N]` and principal components `[N, 3]`, float64 on the CPU."""

    mean: Tensor
    components: Tensor

    def project(self, tokens: Tensor) -> Tensor:
        """Return the coordinates `[…, 3]` of tokens `[…, N]`, float32."""
        return ((tokens.double().cpu() - self.mean) @ self.components).float()


class Moments:
    """Count, sum and second moments of tokens, in float64."""

    def __init__(self, width: int, device: str | torch.device = "cpu") -> None:
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.second = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, tokens: Tensor) -> None:
        """Add tokens `[M, N]`; those that are not finite are left out."""
        kept = tokens[tokens.isfinite().all(dim=1)].double()
        self.count += len(kept)
        self.sum += kept.sum(dim=0)
        self.second += kept.T @ kept

    def merge(self, other: Moments) -> None:
        """Add the sums over other tokens."""
        self.count += other.count
        self.sum += other.sum.to(self.sum.device)
        self.second += other.second.to(self.sum.device)

    def to_cpu(self) -> Moments:
        """Return a copy on the CPU, which can be sent to another process."""
        moved = Moments(len(self.sum))
        moved.merge(self)
        return moved

    def basis(self, count: int = 3) -> Basis:
        """Return the mean and the leading eigenvectors of the covariance.

        Deterministic: a full symmetric eigendecomposition, and each vector has the sign that makes its largest entry
        positive. If there are fewer than `count` dimensions, the rest is filled with zeros.
        """
        mean = (self.sum / max(self.count, 1)).cpu()
        covariance = (self.second / max(self.count, 1)).cpu() - mean[:, None] * mean
        vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :count]  # [N, count], largest eigenvalue first
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        return Basis(mean, pad(vectors * largest.sign(), (0, count - vectors.shape[1])))
