"""One step of all ranks together: each has its part of the batch, and one all-reduce keeps their deltas equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sinder_cli.distributed import Ranks
from sinder_cli.events import Emit
from sinder_cli.images.loading import skip_all
from sinder_cli.repairing.step import BlockGradient, StepGradient

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.repairing.deltas import Deltas, Target


@dataclass(frozen=True)
class SharedStep:
    """One step of all ranks together."""

    gradient: StepGradient  # of all defective images
    images: int


@dataclass(frozen=True)
class _RankShare:
    """The message of one rank to the others about its part of a batch."""

    images: int
    parts: dict[int, BlockGradient]  # by defective block, without its tensors
    masked_tokens: int
    defective: int
    idle: tuple[tuple[int, float], ...]
    blocks: frozenset[int]  # touched by the rank
    unreadable: dict[str, str]


def gathered(
    local: StepGradient,
    images: int,
    unreadable: dict[str, str],
    deltas: Deltas,
    window: int,
    ranks: Ranks,
    emit: Emit,
) -> SharedStep:
    """Return the step of the whole batch, given this rank's part.

    Images that other ranks could not decode are named in a warning and added to `unreadable`.
    """
    if ranks.size == 1:
        return SharedStep(local, images)
    touched = frozenset(target.block for target in deltas.touched)
    parts = {part.block: replace(part, gradients={}, responses={}) for part in local.parts}
    shares = ranks.all_gather(
        _RankShare(images, parts, local.masked_tokens, local.defective, local.idle, touched, unreadable)
    )
    skip_all([each.unreadable for each in shares], unreadable, emit)
    deltas.agree([each.blocks for each in shares], ranks)
    whole = StepGradient(
        _reduced(local, shares, deltas, window, ranks),
        sum(each.masked_tokens for each in shares),
        sum(each.defective for each in shares),
        tuple(pair for each in shares for pair in each.idle),
    )
    return SharedStep(whole, sum(each.images for each in shares))


def _reduced(
    local: StepGradient, shares: Sequence[_RankShare], deltas: Deltas, window: int, ranks: Ranks
) -> tuple[BlockGradient, ...]:
    """Compute the sums over all ranks, in one all-reduce, for the blocks that any rank found defective."""
    mine = {part.block: part for part in local.parts}
    blocks = sorted({block for each in shares for block in each.parts})
    targets_of = {block: deltas.of_window(block, window) for block in blocks}
    of_block = {block: [each.parts[block] for each in shares if block in each.parts] for block in blocks}
    probes_of = {block: max(one.probes for one in of_block[block]) for block in blocks}  # 0, or the same on all ranks

    def row(block: int, kind: str, target: Target) -> Tensor:
        """Return this rank's part, flat; zeros if it has none."""
        if block in mine and target.name in (found := getattr(mine[block], kind)):
            return found[target.name].flatten()
        return torch.zeros_like(target.delta).repeat(probes_of[block] if kind == "responses" else 1)

    rows = [
        row(block, kind, target)
        for block in blocks
        for kind in ("gradients", "responses")
        for target in targets_of[block]
    ]
    if not rows:
        return ()
    sums = iter(ranks.all_reduce(torch.cat(rows)).split([len(row) for row in rows]))
    parts = []
    for block in blocks:
        names = [target.name for target in targets_of[block]]
        gradients, responses = ({name: next(sums) for name in names} for _ in range(2))
        each, probes = of_block[block], probes_of[block]
        parts.append(
            BlockGradient(
                block,
                tuple(loss for one in each for loss in one.losses),
                sum(one.leaving for one in each),
                sum(one.excess for one in each),
                gradients,
                {name: found.unflatten(0, (probes, -1)) for name, found in responses.items()} if probes else {},
                probes,
                sum(one.probed for one in each),
            )
        )
    return tuple(parts)
