"""Outlying patches in a learned position embedding: another input-independent source of odd tokens."""

from __future__ import annotations

from dataclasses import dataclass

from sinder_cli.backbone.contract import Backbone

OUTLIER_DEVIATIONS = 6.0  # robust standard deviations (1.4826 × median absolute deviation) above the median norm
OUTLIER_FACTOR = 1.5  # and at least so many times the median norm


@dataclass(frozen=True)
class OutlyingPosition:
    """A position whose embedding stands out: row-major index, norm, and the share of ‖·‖² in one dimension."""

    patch: int
    norm: float
    dimension: int
    share: float


@dataclass(frozen=True)
class PositionCheck:
    """Norms of a position embedding over its patches, and those that stand out."""

    patches: int
    median_norm: float
    max_norm: float
    largest_share: float
    outliers: tuple[OutlyingPosition, ...]


def check_positions(backbone: Backbone) -> PositionCheck | None:
    """Look for patches with an outlying position embedding; None for a backbone that learns no such table."""
    position = backbone.layers.position
    if position is None:
        return None
    table = backbone.weights.read([position.weight.name])[position.weight.name].float()
    rows = table.reshape(-1, table.shape[-1])[position.prefix :]  # [patches, N]
    norms = rows.norm(dim=1)
    shares, dimensions = (rows**2 / norms.clamp_min(1e-12)[:, None] ** 2).max(dim=1)
    median = norms.median()
    spread = 1.4826 * (norms - median).abs().median()
    limit = max((median + OUTLIER_DEVIATIONS * spread).item(), OUTLIER_FACTOR * median.item())
    found = (norms > limit).nonzero().flatten().tolist()
    outliers = tuple(OutlyingPosition(i, norms[i].item(), int(dimensions[i]), shares[i].item()) for i in found)
    return PositionCheck(len(rows), median.item(), norms.max().item(), shares.max().item(), outliers)
