"""Directions of tokens over images, from sums and sketches, so that no token is kept.

The one that outlying tokens share, and how far they spread around it; and the principal components of patch tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from sinder_cli.analysis.records import Observed
from sinder_cli.defects.settings import Stage
from sinder_cli.defects.spectrum import angle_between, fixed_sign

if TYPE_CHECKING:
    from torch import Tensor

SKETCH_ROWS = 8  # singular directions kept; a defect needs one
FOLDED_AT_ONCE = 64  # new rows per decomposition


class Sketch:
    """The leading singular directions of a growing matrix, of which only `SKETCH_ROWS` rows are kept.

    Rows are `s_k v_k` of the matrix so far, in float64, largest first; those cut off are smaller than all of them.
    Exact up to that rank. Beyond it, energies are lower bounds, close for directions that stand out from the rest.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None  # [≤ SKETCH_ROWS, N]

    def fold(self, rows: Tensor) -> None:
        """Add more rows `[M, N]`, or those of another sketch."""
        for part in rows.double().split(FOLDED_AT_ONCE):
            stacked = part if self.rows is None else torch.cat([self.rows, part])
            mixing = torch.linalg.eigh(stacked @ stacked.T).eigenvectors.flip(1)  # [m, m], largest first
            self.rows = mixing[:, :SKETCH_ROWS].T @ stacked

    @property
    def energies(self) -> list[float]:
        """The leading eigenvalues σ² of the matrix's Gram matrix, largest first."""
        return [] if self.rows is None else (self.rows**2).sum(dim=1).tolist()


class ObservedDirection:
    """The leading direction of the outlying tokens' unit vectors, over images."""

    def __init__(self) -> None:
        self.tokens = 0
        self.images = 0
        self.all_tokens = Sketch()  # of unit vectors of tokens
        self.all_images = Sketch()  # of one unit vector per image: the leading direction of its tokens
        self.companions = 0  # tokens of images that have two or more
        self.off_axis = 0.0  # Σ sin² between those and the direction of their own image

    def add(self, tokens: Tensor) -> None:
        """Add the outlying tokens `[M, N]` of one image; those that are not finite are left out."""
        tokens = tokens.double().cpu()
        norms = tokens.norm(dim=1)
        good = norms.isfinite() & (norms > 0)
        count = int(good.sum())
        if not count:
            return
        image = Sketch()
        image.fold(tokens[good] / norms[good, None])
        assert image.rows is not None
        self.tokens += count
        self.images += 1
        self.all_tokens.fold(image.rows)
        self.all_images.fold(image.rows[:1] / image.rows[:1].norm())
        if count > 1:
            self.companions += count
            self.off_axis += max(0.0, count - image.energies[0])

    def merge(self, other: ObservedDirection) -> None:
        """Add what was observed in other images."""
        for mine, theirs in ((self.all_tokens, other.all_tokens), (self.all_images, other.all_images)):
            if theirs.rows is not None:
                mine.fold(theirs.rows)
        self.tokens += other.tokens
        self.images += other.images
        self.companions += other.companions
        self.off_axis += other.off_axis

    @property
    def direction(self) -> Tensor | None:
        """Direction that all outlying tokens share, `[N]` float32 of unit norm and fixed sign; None without any."""
        rows = self.all_tokens.rows
        return None if rows is None else fixed_sign(rows[0] / rows[0].norm()).float()

    def record(self, predicted: dict[Stage, Tensor]) -> Observed | None:
        """Return the summary, with the angle to each predicted direction `[N]`; None without outlying tokens.

        Spreads are the angles whose sine is the root mean square of the sines. Within: between a token and its image's
        direction. Across: between two images' directions, over all pairs. There the sum of cos² is the sum of σ⁴ over
        the sketch of those n unit vectors, minus n for the pairs of a vector with itself: Σ_ij cos²(d_i, d_j) = ‖D Dᵀ‖²
        = Σ_k σ_k⁴.
        """
        direction = self.direction
        if direction is None:
            return None
        pairs = self.images * (self.images - 1)
        same = sum(energy**2 for energy in self.all_images.energies) - self.images
        return Observed(
            tokens=self.tokens,
            images=self.images,
            explained=min(1.0, self.all_tokens.energies[0] / self.tokens),
            spread_within_deg=_angle_of(self.off_axis / self.companions) if self.companions else None,
            spread_across_deg=_angle_of(1 - same / pairs) if pairs else None,
            angle_to_predicted_deg={stage: angle_between(direction, nu) for stage, nu in predicted.items()},
        )


def _angle_of(sin_squared: float) -> float:
    return math.degrees(math.asin(math.sqrt(min(1.0, max(0.0, sin_squared)))))


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
