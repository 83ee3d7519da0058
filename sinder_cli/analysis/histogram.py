"""Distributions of a stream of numbers in fixed memory: counts in narrow bins, and exact extremes and mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn.functional import pad

from sinder_cli.analysis.records import Distribution

if TYPE_CHECKING:
    from torch import Tensor

MANTISSA_BITS = 9  # 512 bins per octave: quantiles are accurate to 0.2 %, and mostly far better
OCTAVES = (-24, 40)  # 6e-8 to 1e12; beyond them a norm falls into the first or the last bin
ANGLE_BINS = 1800  # bins of a twentieth of a degree


class Scale(Protocol):
    """The bins of a histogram: the bin of each value, and the edges of the bins."""

    @property
    def bins(self) -> int: ...

    def bin_of(self, values: Tensor) -> Tensor:
        """Return the bin numbers of values of any shape, as int64."""
        ...

    def edges(self) -> Tensor:
        """Return the edges of the bins, `[bins + 1]` float64, ascending."""
        ...


@dataclass(frozen=True)
class OctaveScale:
    """Positive numbers, binned by the exponent and the leading bits of the mantissa of their float32 form."""

    first: int = OCTAVES[0]
    last: int = OCTAVES[1]

    @property
    def bins(self) -> int:
        return (self.last - self.first) << MANTISSA_BITS

    def bin_of(self, values: Tensor) -> Tensor:
        bits = values.float().contiguous().view(torch.int32) >> (23 - MANTISSA_BITS)
        return (bits - ((self.first + 127) << MANTISSA_BITS)).clamp(0, self.bins - 1).long()

    def edges(self) -> Tensor:
        at = torch.arange(self.bins + 1, dtype=torch.float64)
        steps = 1 << MANTISSA_BITS
        return torch.exp2((at / steps).floor() + self.first) * (1 + (at % steps) / steps)


@dataclass(frozen=True)
class LinearScale:
    """Numbers from `low` to `high` in bins of equal width."""

    low: float
    high: float
    bins: int

    def bin_of(self, values: Tensor) -> Tensor:
        at = (values.float() - self.low) * (self.bins / (self.high - self.low))
        return at.long().clamp(0, self.bins - 1)

    def edges(self) -> Tensor:
        return torch.linspace(self.low, self.high, self.bins + 1, dtype=torch.float64)


NORM_SCALE = OctaveScale()
ANGLE_SCALE = LinearScale(0.0, 90.0, ANGLE_BINS)
COSINE_SCALE = LinearScale(-1.0, 1.0, 4000)


@dataclass(frozen=True)
class Curve:
    """The outline of a distribution for a violin: `at` ascending values, `density` between 0 and 1."""

    at: tuple[float, ...]
    density: tuple[float, ...]


class Histogram:
    """Counts of a stream of values on one scale; NaN and infinities are counted separately."""

    def __init__(self, scale: Scale, device: str | torch.device = "cpu") -> None:
        self.scale = scale
        self.counts = torch.zeros(scale.bins, dtype=torch.int64, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.low = torch.full((), torch.inf, device=device)
        self.high = torch.full((), -torch.inf, device=device)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, values: Tensor) -> None:
        """Count values of any shape, on the device of the histogram, without waiting for the device."""
        if not values.numel():
            return
        values = values.detach().float().flatten()
        good = values.isfinite()
        kept = torch.where(good, values, values.new_zeros(()))
        bins = torch.where(good, self.scale.bin_of(kept), self.scale.bins)  # one more, for values that are not finite
        self.counts += torch.bincount(bins, minlength=self.scale.bins + 1)[: self.scale.bins]
        self.nonfinite += (~good).sum()
        self.total += kept.double().sum()
        self.low = torch.minimum(self.low, torch.where(good, values, torch.inf).min())
        self.high = torch.maximum(self.high, torch.where(good, values, -torch.inf).max())

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram of the same scale."""
        device = self.counts.device
        self.counts += other.counts.to(device)
        self.total += other.total.to(device)
        self.nonfinite += other.nonfinite.to(device)
        self.low = torch.minimum(self.low, other.low.to(device))
        self.high = torch.maximum(self.high, other.high.to(device))

    def to_cpu(self) -> Histogram:
        """Return a copy on the CPU, which can be sent to another process."""
        moved = Histogram(self.scale)
        moved.merge(self)
        return moved

    @property
    def count(self) -> int:
        """Number of finite values so far."""
        return int(self.counts.sum())

    def distribution(self) -> Distribution | None:
        """Return mean, extremes and quantiles; None before the first finite value."""
        count = self.count
        if not count:
            return None
        p01, median, p99 = self._quantiles((0.01, 0.5, 0.99))
        mean = self.total.item() / count
        return Distribution(
            count=count, mean=mean, min=self.low.item(), p01=p01, median=median, p99=p99, max=self.high.item()
        )

    def curve(self, points: int, logarithmic: bool = False) -> Curve | None:
        """Return the density over `points` equal steps between the extremes, its peak at 1; None without finite values.

        `logarithmic` makes steps of equal logarithm, and puts numbers below the first octave at its beginning.
        """
        if not self.count:
            return None
        edges, cumulative = self._edges(), pad(self.counts.cpu().cumsum(0).double(), (1, 0))
        if logarithmic:
            edges = edges.clamp_min(2.0 ** OCTAVES[0]).log()
        if edges[0] == edges[-1]:
            return Curve((self.low.item(),), (1.0,))
        grid = torch.linspace(0, 1, points + 1, dtype=torch.float64) * (edges[-1] - edges[0]) + edges[0]
        mass = _interpolate(grid, edges, cumulative).diff()
        middle = (grid[:-1] + grid[1:]) / 2
        at = middle.exp() if logarithmic else middle
        return Curve(tuple(at.tolist()), tuple((mass / mass.max()).tolist()))

    def _edges(self) -> Tensor:
        """Return the edges of the bins, limited to the extremes; the outer bins extend to values beyond the scale."""
        low, high = self.low.item(), self.high.item()
        edges = self.scale.edges().clamp(low, high)
        edges[0], edges[-1] = low, high
        return edges

    def _quantiles(self, shares: tuple[float, ...]) -> list[float]:
        """Return quantiles, linear between two order statistics, as numpy's default.

        The values of one bin are taken to be evenly spaced in it.
        """
        edges, counts = self._edges(), self.counts.cpu()
        cumulative = counts.cumsum(0)

        def order_statistic(rank: Tensor) -> Tensor:
            at = torch.searchsorted(cumulative, rank, right=True)
            inside = (rank - cumulative[at] + counts[at] + 0.5) / counts[at]
            return edges[at] + inside * (edges[at + 1] - edges[at])

        ranks = torch.tensor(shares, dtype=torch.float64) * (cumulative[-1] - 1)
        below, above = (order_statistic(rank.long()) for rank in (ranks.floor(), ranks.ceil()))
        return torch.lerp(below, above, ranks.frac()).tolist()


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Interpolate linearly through the points (xs ascending, ys) at `x`; the last point gives ys[-1]."""
    right = torch.searchsorted(xs, x, right=True).clamp(1, len(xs) - 1)
    left = right - 1
    width = xs[right] - xs[left]
    share = torch.where(width > 0, (x - xs[left]) / width, 1.0)
    return ys[left] + share.clamp(0, 1) * (ys[right] - ys[left])
