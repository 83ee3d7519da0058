"""What a task is given to score one side, whose features are in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kept_features import KeptFeatures
from torch import Tensor

from sinder_cli.tasks import Dataset, Figure, ImageFiles, Part, Scoring, SideFeatures, Task


@dataclass(frozen=True)
class StubFeatures(KeptFeatures):
    """Features in memory; `read` counts how often each image was read."""

    read: dict[int, int] = field(default_factory=dict)

    def part(self, name: Part, index: int) -> Tensor:
        self.read[index] = self.read.get(index, 0) + 1
        return super().part(name, index)


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
