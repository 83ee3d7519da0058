"""The greedy step: shrink the one singular value that moves defective tokens most for what it moves the others.

A singular defect is written by few singular values, which ordinary tokens hardly use. What is left of a singular value,
σ + ε, answers for the share `s = (∂L/∂ε) · (σ + ε)/L` of the loss: 1 where it writes all that makes the tokens stand
out, since its part of the loss falls in proportion to it, however much of it is gone already. A slope of more than the
whole loss comes from the steepness of what triggers the defect, holds for no larger step, and differs from token to
token: it counts as 1/s. That share is averaged over the latest steps and lowered by its standard error, so that what
helps one image by chance counts for little. What a unit of δ = ε/σ moves ordinary tokens is measured by random probes
(`step.Probes`). The gain of a singular value is the share over what the loss of all that is left would move them; it
only ever shrinks, to 0 at most.
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

KEPT = 0.9  # of the weight of the steps before, at each step
TO_GATHER = 8  # steps at a block before a move there, or one pass where there are fewer images
SURE = 4  # the same where the largest gain is clear: `LEAD` times the next, or of what answers for `ALL`
LEAD = 3.0  # more than chance in the probes makes of two singular values that are alike
ALL = 0.95  # of the loss, in all images alike: what a singular value answers for that writes the defect alone
FLOOR = 0.1  # of the mean response: a singular value that seems to move nothing is not known that well
NEARLY_SETTLED = 0.5  # of the mean ordinary norm: an excess that tokens of three median norms are far above
GONE = 0.999  # of a singular value: shrunk to 0, up to rounding
LEAST_EXCESS = 0.05  # of the loss, so that a share of nothing is not a number


@dataclass(frozen=True)
class Observed:
    """What steps at one block have shown of the singular values of its window, in one row: `[R]` each."""

    shares: Tensor  # weighted sum of the shares of the loss
    squares: Tensor  # and of their squares
    weight: float
    responses: Tensor  # sum over the probes, for δ
    probes: int

    def is_enough(self, images: int, least: int = SURE) -> bool:
        """Whether so many steps have been observed, or one of each image where there are fewer images to visit."""
        return self.weight >= _weight_after(min(least, images)) - 1e-6

    def anew(self) -> Observed:
        """The same with the shares forgotten: once what wrote the defect is gone, they have to be seen again."""
        nothing = torch.zeros_like(self.shares)
        return replace(self, shares=nothing, squares=nothing, weight=0.0)


@dataclass(frozen=True)
class Shrinkage:
    """One move: a run of near-equal singular values of one target, shrunk by a share of themselves."""

    target: Target
    start: int
    stop: int
    share: float

    def delta(self) -> Tensor:
        """The new ε `[r]` of the target: no singular value falls under 0."""
        delta = self.target.delta.clone()
        sigma = scale_of(self.target)[self.start : self.stop]
        delta[self.start : self.stop] = (delta[self.start : self.stop] - self.share * sigma).maximum(-sigma)
        return delta

    @property
    def is_the_last(self) -> bool:
        """Whether nothing of these singular values is left then."""
        sigma = scale_of(self.target)[self.start : self.stop]
        return bool((self.delta()[self.start : self.stop] <= -GONE * sigma).all())


@dataclass
class Observations:
    """The state of greedy steps, by first defective block."""

    by_block: dict[int, Observed] = field(default_factory=dict)

    def step(
        self, part: BlockGradient, targets: Sequence[Target], images: int, settings: RepairSettings
    ) -> tuple[Observed, Shrinkage | None, float]:
        """What is observed with one more step, the move, if there is one, and the gain; nothing is changed yet.

        No move is made at a gain below `min_gain`, nor before enough steps have been observed. `targets` are those of
        the window that ends at the part's block; `images` is how many there are to visit.
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
        """What to do with an image that is defective at a block, given the excess of its loss there.

        Where what was observed promises no gain, the image goes on to later blocks; a gradient is still taken there, to
        learn more, unless its tokens are nearly as near to their neighbours as ordinary ones. `targets` are those of
        the window, None while some are not decomposed yet. What is not finite goes no further: the gradient tells, and
        the step is skipped.
        """
        seen = self.by_block.get(block)
        if not math.isfinite(excess) or seen is None or targets is None or seen.weight < _weight_after(2):
            return FIRST_ALONE
        if _best(seen, targets, excess)[1] >= settings.min_gain:
            return FIRST_ALONE
        return Interest(gradient=excess > NEARLY_SETTLED, onward=True)

    def _with(self, part: BlockGradient, targets: Sequence[Target]) -> Observed:
        loss = max(part.excess, LEAST_EXCESS * len(part.losses))
        slopes = _flat(part.gradients, targets) * _left(targets) / loss
        shares = torch.where(slopes > 1, 1 / slopes, slopes.clamp_min(-1))
        responses = torch.zeros_like(shares)
        if part.probes:
            responses = _flat(part.responses, targets).square().sum(dim=0) / part.probed
        before = self.by_block.get(part.block)
        if before is None:
            return Observed(shares, shares.square(), 1.0, responses, part.probes)
        return Observed(
            before.shares * KEPT + shares,
            before.squares * KEPT + shares.square(),
            before.weight * KEPT + 1.0,
            before.responses + responses,
            before.probes + part.probes,
        )


def scale_of(target: Target) -> Tensor:
    """σ of each singular value, `[r]`, as the target's ε has it; 0 where it vanishes, so that it never moves."""
    sigma = target.basis.S.to(target.delta, copy=True)  # S is float64 on the CPU, as ε of such weights is
    sigma[target.basis.rank :] = 0
    for start, stop in target.basis.groups:
        sigma[start:stop] = sigma[start:stop].mean()
    return sigma


def polyak_deltas(
    targets: Sequence[Target], gradients: Mapping[str, Tensor], loss: float, trust: float
) -> dict[str, Tensor]:
    """ε of each target after `δ ← δ − min(L/‖g‖, trust) · g/‖g‖`, g = ∂L/∂δ over all of them together."""
    scales = {target.name: scale_of(target) for target in targets}
    length = torch.cat([gradients[name] * sigma for name, sigma in scales.items()]).norm().item()
    step = min(loss / length, trust) / length if length > 0 else 0.0
    return {
        target.name: target.delta - step * scales[target.name].square() * gradients[target.name] for target in targets
    }


def _left(targets: Sequence[Target]) -> Tensor:
    """What is left of each singular value, (σ + ε)/σ in one row, `[R]`; 1 where it vanishes."""
    sigma = torch.cat([scale_of(target) for target in targets])
    epsilon = torch.cat([target.delta for target in targets])
    return torch.where(sigma > 0, 1 + epsilon / sigma, 1.0).clamp_min(0)


def _weight_after(steps: int) -> float:
    return sum(KEPT**step for step in range(steps))


def _flat(parts: Mapping[str, Tensor], targets: Sequence[Target]) -> Tensor:
    """What is by ε in each target, `[…, r]`, by δ in one row `[…, R]`."""
    return torch.cat([parts[target.name] * scale_of(target) for target in targets], dim=-1)


def _responses(seen: Observed) -> Tensor:
    """The mean square movement of ordinary tokens for a unit of each δ, `[R]`, over their mean norm."""
    measured = seen.responses / max(seen.probes, 1)
    return (measured + FLOOR * measured.mean()).clamp_min(1e-12)


def _shares(seen: Observed) -> Tensor:
    """The share of the loss that each singular value answers for, less its standard error, `[R]`."""
    mean = seen.shares / max(seen.weight, 1e-12)
    if seen.weight <= 1.5:
        return mean
    spread = (seen.squares / seen.weight - mean.square()).clamp_min(0)
    return mean - (spread / max(seen.weight - 1, 0.5)).sqrt()


def _best(seen: Observed, targets: Sequence[Target], excess: float) -> tuple[int, float, float]:
    """The place in the row of the singular value of the largest gain, that gain for a mean excess, and its lead."""
    left = _left(targets)
    gains = _shares(seen).clamp_min(0) * max(excess, 0.0) / (_responses(seen).sqrt() * left)
    gains[left <= 1 - GONE] = 0  # shrunk to 0 already
    largest = gains.topk(min(2, len(gains)))
    first, second = largest.values[0].item(), largest.values[-1].item()
    return int(largest.indices[0]), first, first / max(second, 1e-12)


def _place(targets: Sequence[Target], at: int) -> tuple[Target, int]:
    """The target, and the index in it, of a place in the row."""
    for target in targets:
        if at < len(target.delta):
            return target, at
        at -= len(target.delta)
    raise IndexError(at)
