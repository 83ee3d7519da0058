"""Features in memory, for tests of tasks: what a store would hold, without a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sinder_cli.tasks import Part


@dataclass(frozen=True)
class KeptFeatures:
    """The parts of some images, by name: one tensor an image."""

    parts: Mapping[str, Sequence[Tensor]]

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def part(self, name: Part, index: int) -> Tensor:
        return self.parts[name][index]

    def stacked(self, name: Part) -> Tensor:
        return torch.stack(list(self.parts[name]))
