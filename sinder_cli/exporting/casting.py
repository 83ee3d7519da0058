"""The same tensors in another floating-point type, cast as they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.sources import TensorInfo, TensorSource
from sinder_cli.backbone.storing import stored_as

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sinder_cli.exporting.settings import DtypeName


@dataclass(frozen=True)
class CastTensors:
    """A source whose floating-point tensors are cast to `dtype`; integers stay as they are."""

    source: TensorSource
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return self.source.label

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(info.shape, self.dtype) if info.dtype.is_floating_point else info
            for name, info in self.source.infos.items()
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read whole tensors, cast. Raises `BadInputError` naming the first one that `dtype` cannot hold."""
        found = self.source.read(names)
        for name in found:  # one at a time, so that there are never two copies of all
            found[name] = stored_as(found[name], name, self.infos[name].dtype)
        return found


def cast(backbone: Backbone, name: DtypeName) -> Backbone:
    """Return the backbone with its weights in the dtype of that name."""
    import torch

    weights = backbone.weights
    return replace(backbone, weights=replace(weights, source=CastTensors(weights.source, getattr(torch, name))))
