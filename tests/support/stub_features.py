"""Features in memory, and what a task is given to score them, without a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from planted_dinov2 import random_tensors
from safetensors.torch import save_file
from sinder_plugins.dinov2.config import Config
from torch import Tensor

from sinder_cli import ModelRequest
from sinder_cli.tasks import Dataset, Features, Figure, ImageFiles, Part, Scoring, SideFeatures, Task

TINY = Config(width=64, depth=2, hidden=128, grid=5)
TINY_SIDE = 70  # pixels: 5 × 5 patches of 14


@dataclass
class StubFeatures(Features):
    """The parts of some images; `read` counts how often each image was read."""

    parts: Mapping[str, Sequence[Tensor]]
    read: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def part(self, name: Part, index: int) -> Tensor:
        self.read[index] = self.read.get(index, 0) + 1
        return self.parts[name][index]

    def stacked(self, name: Part) -> Tensor:
        return torch.stack(list(self.parts[name]))


def scoring(
    task: Task,
    view: str,
    test: Mapping[str, Sequence[Tensor]],
    truth: Sequence[Any],
    classes: Sequence[str],
    train: Mapping[str, Sequence[Tensor]] | None = None,
    train_truth: Sequence[Any] = (),
    seed: int = 0,
    **settings: Any,
) -> Scoring:
    """What a task gets to score one side, whose features are these."""
    side = SideFeatures({view: StubFeatures(test)}, {} if train is None else {view: StubFeatures(train)})
    nothing = ImageFiles(())
    dataset = Dataset(nothing, truth, None if train is None else nothing, train_truth, tuple(classes))
    return Scoring(side, dataset, task.settings(**settings), side, seed=seed)


def value(figure: Figure) -> float:
    """A figure over all images, as a fraction."""
    return float(figure.value(figure.statistics.sum(dim=0)))


def values(figures: Sequence[Figure]) -> dict[str, float]:
    """Figures by name, as fractions."""
    return {figure.name: value(figure) for figure in figures}


def tiny_model(folder: Path) -> ModelRequest:
    """A checkpoint of a tiny DINOv2 with random weights."""
    path = folder / "tiny.safetensors"
    save_file(random_tensors(TINY), path)
    return ModelRequest("dinov2_custom", path)
