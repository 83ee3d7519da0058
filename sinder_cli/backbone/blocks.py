"""The tensors of one block, read by role from the checkpoint: all that weights-only commands ever hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sinder_cli.backbone.layermap import BlockMap, WeightRef, references
from sinder_cli.backbone.weights import Weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor


BESIDE = "beside."  # how the roles of sub-layers beside the first ones begin


@dataclass(frozen=True)
class BlockTensors:
    """One block's map together with its tensors by role, such as `mlp.up` `[H, N]`."""

    map: BlockMap
    by_role: dict[str, Tensor]

    def get(self, role: str) -> Tensor | None:
        return self.by_role.get(role)

    def __getitem__(self, role: str) -> Tensor:
        return self.by_role[role]

    @property
    def branches(self) -> Iterator[BlockTensors]:
        """This block's sub-layers, and those beside them."""
        yield self
        if self.map.beside:
            beside = {role.removeprefix(BESIDE): part for role, part in self.by_role.items() if role.startswith(BESIDE)}
            yield from BlockTensors(self.map.beside, beside).branches


def rows_of(tensor: Tensor, ref: WeightRef) -> Tensor:
    """The part of a stored tensor that a reference means; a view."""
    return tensor if ref.rows is None else tensor[ref.rows[0] : ref.rows[1]]


_MIXING_ROLES = re.compile(r"(beside\.)*attention\.(query|key)")  # the linearization drops the mixing of tokens


def read_block(
    weights: Weights, block: BlockMap, dtype: torch.dtype | None = None, device: str = "cpu"
) -> BlockTensors:
    """Read the mapped tensors of one block but its queries and keys, as float32 unless `dtype` says otherwise.

    They are copied here and now, so that reading ahead in a thread waits for the disk instead of the computation.
    """
    import torch

    roles = {role: ref for role, ref in references(block) if not _MIXING_ROLES.match(role)}
    stored = weights.read({ref.name for ref in roles.values()})
    wide = {name: tensor.to(device, dtype or torch.float32, copy=True) for name, tensor in stored.items()}
    return BlockTensors(block, {role: rows_of(wide[ref.name], ref) for role, ref in roles.items()})
