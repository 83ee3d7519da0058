"""The greedy step: shrink the singular value that moves defective tokens most, compared with ordinary tokens.

A singular defect is caused by few singular values, which ordinary tokens hardly use. The remainder of a singular value,
σ + ε, is responsible for the share `s = (∂L/∂ε) · (σ + ε)/L` of the loss. This share is 1 if the singular value alone
makes the tokens stand out, since its part of the loss is proportional to the remainder, however much has been removed
already. A share above 1 comes from the steepness of the defect's trigger, does not hold for larger steps, and differs
from token to token: it counts as 1/s. The share is averaged over the latest steps and lowered by its standard error, so
that a chance effect on one image counts little. How far a unit of δ = ε/σ moves ordinary tokens is measured by random
probes (`step.Probes`). The gain of a singular value is its share, times the mean excess of the loss, over the distance
by which ordinary tokens would move if the whole remainder were removed. A singular value that is responsible for all of
the loss in every image goes before others of a somewhat larger gain: these may only blunt a trigger, in the images at
hand. Singular values only shrink, at most to 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from sinder_cli.repairing.deltas import Target
from sinder_cli.repairing.forward import FIRST_ALONE, Interest
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.repairing.step import BlockGradient

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 0.9  # of the weight of the earlier steps, at each step
TO_GATHER = 8  # steps observed at a block before a move there, or one pass if there are fewer images
SURE = 4  # the same if the choice is clear: a gain `LEAD` times the next, a share `ALL`, or a value shrunk before
LEAD = 3.0  # more than chance in the probes makes of two equal singular values
ALL = 0.95  # of the loss, the same in all images: the share of a singular value that causes the defect alone
PREFERRED = 10.0  # × its gain counts what has that share: others may undo the defect in these images alone
FLOOR = 0.1  # of the mean response, added to each: a response that seems to be 0 is not that certain
NEARLY_SETTLED = 0.5  # of the mean ordinary norm: a small excess; that of tokens of three median norms is far larger
GONE = 0.999  # of a singular value: shrunk to 0, up to rounding
LEAST_EXCESS = 0.05  # smallest excess per image that shares are divided by, so that none is divided by 0


@dataclass(frozen=True)
class BlockObservation:
    """The observations of steps at one block, for the singular values of its window in one row: `[R]` each."""

    shares: Tensor  # weighted sum of the shares of the loss
    squares: Tensor  # weighted sum of their squares
    weight: float
    responses: Tensor  # sum of the squared responses over the probes, with respect to δ
    probes: int

    def is_enough(self, images: int, least: int = SURE) -> bool:
        """Return True if `least` steps have been observed, or one per image if there are fewer images to visit."""
        return self.weight >= _weight_after(min(least, images)) - 1e-6

    def anew(self) -> BlockObservation:
        """Return the same without the shares: once a cause of the defect is gone, they have to be observed again."""
        nothing = torch.zeros_like(self.shares)
        return replace(self, shares=nothing, squares=nothing, weight=0.0)


@dataclass(frozen=True)
class Shrinkage:
    """One move: shrink a range of near-equal singular values of one target by a fraction of their size."""

    target: Target
    start: int
    stop: int
    share: float

    def delta(self) -> Tensor:
        """Return the new ε `[r]` of the target; no singular value becomes negative."""
        delta = self.target.delta.clone()
        sigma = scale_of(self.target)[self.start : self.stop]
        delta[self.start : self.stop] = (delta[self.start : self.stop] - self.share * sigma).maximum(-sigma)
        return delta

    @property
    def is_the_last(self) -> bool:
        """True if nothing of these singular values is left after the move."""
        sigma = scale_of(self.target)[self.start : self.stop]
        return bool((self.delta()[self.start : self.stop] <= -GONE * sigma).all())


@dataclass
class Observations:
    """The state of greedy steps, by first defective block."""

    by_block: dict[int, BlockObservation] = field(default_factory=dict)

    def step(
        self, part: BlockGradient, targets: Sequence[Target], images: int, settings: RepairSettings
    ) -> tuple[BlockObservation, Shrinkage | None, float]:
        """Return the observations with one more step, the move, if there is one, and the gain; change nothing yet.

        No move is made at a gain below `min_gain`, nor before enough steps have been observed. `targets` are those of
        the window that ends at the part's block; `images` is the number of images to visit.
        """
        seen = self._with(part, targets)
        at, gain, lead = _best(seen, targets, part.excess / len(part.losses))
        target, index = _place(targets, at)
        chosen_before = bool(target.delta[index] < 0)
        clear = lead >= LEAD or chosen_before or _shares(seen)[at].item() >= ALL
        if gain < settings.min_gain or not seen.is_enough(images, SURE if clear else TO_GATHER):
            return seen, None, gain
        start, stop = next((run for run in target.basis.groups if run[0] <= index < run[1]), (index, index + 1))
        mean = (seen.shares[at] / seen.weight).item()
        left = _left([target])[index].item()
        moved = _responses(seen)[at].sqrt().item()
        share = min(left / max(mean, 1e-6), settings.max_drift / moved, settings.trust)
        shrinkage = Shrinkage(target, start, stop, share)
        return (seen.anew() if shrinkage.is_the_last else seen), shrinkage, gain

    def interest(
        self, block: int, excess: float, targets: Sequence[Target] | None, settings: RepairSettings
    ) -> Interest:
        """Decide what to do with an image that is defective at a block, given the excess of its loss there.

        If the observations promise no gain, the image goes on to later blocks; its gradient is still computed at this
        block, to learn more, unless its tokens are almost as close to their neighbours as ordinary ones. `targets` are
        those of the window, None while some are not decomposed yet. An image whose excess is not finite does not go on:
        its gradient is not finite either, and the step is skipped.
        """
        seen = self.by_block.get(block)
        if not math.isfinite(excess) or seen is None or targets is None or seen.weight < _weight_after(2):
            return FIRST_ALONE
        if _best(seen, targets, excess)[1] >= settings.min_gain:
            return FIRST_ALONE
        return Interest(gradient=excess > NEARLY_SETTLED, onward=True)

    def _with(self, part: BlockGradient, targets: Sequence[Target]) -> BlockObservation:
        loss = max(part.excess, LEAST_EXCESS * len(part.losses))
        slopes = _flat(part.gradients, targets) * _left(targets) / loss
        shares = torch.where(slopes > 1, 1 / slopes, slopes.clamp_min(-1))
        responses = torch.zeros_like(shares)
        if part.probes:
            responses = _flat(part.responses, targets).square().sum(dim=0) / part.probed
        before = self.by_block.get(part.block)
        if before is None:
            return BlockObservation(shares, shares.square(), 1.0, responses, part.probes)
        return BlockObservation(
            before.shares * KEPT + shares,
            before.squares * KEPT + shares.square(),
            before.weight * KEPT + 1.0,
            before.responses + responses,
            before.probes + part.probes,
        )


def scale_of(target: Target) -> Tensor:
    """Return σ of each singular value, `[r]`, in ε's dtype and device; 0 for vanishing ones, which then never move."""
    sigma = target.basis.S.to(target.delta, copy=True)  # a copy, even if S has the dtype and device of ε already
    sigma[target.basis.rank :] = 0
    for start, stop in target.basis.groups:
        sigma[start:stop] = sigma[start:stop].mean()
    return sigma


def polyak_deltas(
    targets: Sequence[Target], gradients: Mapping[str, Tensor], loss: float, trust: float
) -> dict[str, Tensor]:
    """Return ε of each target after `δ ← δ − min(L/‖g‖, trust) · g/‖g‖`, g = ∂L/∂δ over all of them together."""
    scales = {target.name: scale_of(target) for target in targets}
    length = torch.cat([gradients[name] * sigma for name, sigma in scales.items()]).norm().item()
    step = min(loss / length, trust) / length if length > 0 else 0.0
    return {
        target.name: target.delta - step * scales[target.name].square() * gradients[target.name] for target in targets
    }


def _left(targets: Sequence[Target]) -> Tensor:
    """Return the remainder of each singular value, (σ + ε)/σ, in one row, `[R]`; 1 for vanishing ones."""
    sigma = torch.cat([scale_of(target) for target in targets])
    epsilon = torch.cat([target.delta for target in targets])
    return torch.where(sigma > 0, 1 + epsilon / sigma, 1.0).clamp_min(0)


def _weight_after(steps: int) -> float:
    return sum(KEPT**step for step in range(steps))


def _flat(parts: Mapping[str, Tensor], targets: Sequence[Target]) -> Tensor:
    """Convert derivatives by ε of each target, `[…, r]`, to derivatives by δ in one row, `[…, R]`."""
    return torch.cat([parts[target.name] * scale_of(target) for target in targets], dim=-1)


def _responses(seen: BlockObservation) -> Tensor:
    """Return the mean square movement of ordinary tokens per unit of each δ, `[R]`, relative to their mean norm."""
    measured = seen.responses / max(seen.probes, 1)
    return (measured + FLOOR * measured.mean()).clamp_min(1e-12)


def _shares(seen: BlockObservation) -> Tensor:
    """Return the share of the loss of each singular value, less its standard error, `[R]`."""
    mean = seen.shares / max(seen.weight, 1e-12)
    if seen.weight <= 1.5:
        return mean
    spread = (seen.squares / seen.weight - mean.square()).clamp_min(0)
    return mean - (spread / max(seen.weight - 1, 0.5)).sqrt()


def _best(seen: BlockObservation, targets: Sequence[Target], excess: float) -> tuple[int, float, float]:
    """Return the place in the row of the singular value to choose, its gain for a mean excess, and its lead.

    It has the largest gain, where the gain of what answers for all of the loss in every image counts more. The lead is
    the ratio to the next one. What causes the defect does so in any image; what merely prevents it may do so in the
    images at hand, and fail in others, which the guard cannot tell if it has the same kind of images.
    """
    left = _left(targets)
    shares = _shares(seen)
    gains = shares.clamp_min(0) * max(excess, 0.0) / (_responses(seen).sqrt() * left)
    gains[left <= 1 - GONE] = 0  # shrunk to 0 already
    certain = (shares >= ALL) & (seen.weight > 1.5)  # one image alone proves nothing
    weighted = torch.where(certain, PREFERRED * gains, gains)
    largest = weighted.topk(min(2, len(gains)))
    first, second = largest.values[0].item(), largest.values[-1].item()
    at = int(largest.indices[0])
    return at, gains[at].item(), first / max(second, 1e-12)


def _place(targets: Sequence[Target], at: int) -> tuple[Target, int]:
    """Return the target of a place in the row, and the index within that target. Raises `IndexError` beyond the row."""
    for target in targets:
        if at < len(target.delta):
            return target, at
        at -= len(target.delta)
    raise IndexError(at)
