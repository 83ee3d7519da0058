"""One step of all ranks together: each has its part of the batch, and one all-reduce makes their deltas one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sinder_cli.events import Emit
from sinder_cli.images.loading import skip_all
from sinder_cli.ranks import Ranks
from sinder_cli.repair.step import StepGradient

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.repair.deltas import Deltas


@dataclass(frozen=True)
class SharedStep:
    """One step of all ranks together."""

    gradient: StepGradient  # of the mean loss of all defective images
    images: int


@dataclass(frozen=True)
class _Told:
    """What one rank tells the others of its part of a batch."""

    images: int
    losses: tuple[float, ...]
    first_block: int | None
    masked_tokens: int
    blocks: frozenset[int]
    unreadable: dict[str, str]


def gathered(
    local: StepGradient, images: int, unreadable: dict[str, str], deltas: Deltas, ranks: Ranks, emit: Emit
) -> SharedStep:
    """The step of the whole batch, from this rank's part.

    What others could not decode is named and added to `unreadable`.
    """
    if ranks.size == 1:
        return SharedStep(local, images)
    touched = frozenset(target.block for target in deltas.touched)
    told = ranks.every(_Told(images, local.losses, local.first_block, local.masked_tokens, touched, unreadable))
    skip_all([each.unreadable for each in told], unreadable, emit)
    deltas.agree([each.blocks for each in told], ranks)
    losses = tuple(loss for each in told for loss in each.losses)
    whole = replace(
        local,
        losses=losses,
        gradients=_reduced(local, len(losses), deltas, ranks),
        first_block=min((each.first_block for each in told if each.first_block is not None), default=None),
        masked_tokens=sum(each.masked_tokens for each in told),
    )
    return SharedStep(whole, sum(each.images for each in told))


def _reduced(local: StepGradient, count: int, deltas: Deltas, ranks: Ranks) -> dict[str, Tensor]:
    """∂L/∂ε of the mean over `count` images of all ranks, in one all-reduce; of the targets that any rank has."""
    targets = deltas.touched
    if not targets:
        return {}
    mean_to_sum = len(local.losses)
    sums = [local.gradients.get(target.name, torch.zeros_like(target.delta)) * mean_to_sum for target in targets]
    present = sums[0].new_tensor([target.name in local.gradients for target in targets])
    flat = ranks.total(torch.cat([*sums, present]))
    *parts, present = flat.split([len(part) for part in sums] + [len(targets)])
    return {
        target.name: part / max(count, 1)
        for target, part, held in zip(targets, parts, present.tolist(), strict=True)
        if held
    }
