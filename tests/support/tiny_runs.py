"""Repairs of the tiny planted model over pictures in memory."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sinder_cli.distributed import ALONE
from sinder_cli.events import Warned
from sinder_cli.images.decoding import UnreadableImageError
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.repairing.deltas import Deltas
from sinder_cli.repairing.loop import Progress, StepRecord, clean_window, repair_steps
from sinder_cli.repairing.preparing import Prepared, Start
from sinder_cli.repairing.settings import RepairSettings

SIZE = 24  # pixels
RED = [(3, 3), (5, 8), (9, 4)]


class Pictures:
    """Images in memory; None cannot be decoded."""

    in_memory = True

    def __init__(self, *tensors: Tensor | None) -> None:
        self.tensors = list(tensors)
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self.tensors)

    def name(self, index: int) -> str:
        return f"picture {index}"

    def load(self, index: int, side: int | None = None) -> Image.Image:  # noqa: ARG002
        self.loaded.append(index)
        tensor = self.tensors[index]
        if tensor is None:
            raise UnreadableImageError("it is broken")
        pixels = (tensor.permute(1, 2, 0).double().numpy() * 255).round()
        return Image.fromarray(pixels.astype(np.uint8))

    def fingerprint(self) -> str:
        return "in memory"


class Run:
    """One repair of a planted model over given pictures."""

    def __init__(self, planted: Any, pictures: Pictures, **settings: Any) -> None:
        self.settings = RepairSettings.model_validate({"recipe": "paper", "min_gap": 1.1} | settings)
        self.progress = Progress(clean_window(len(pictures), self.settings))
        self.module = planted.module
        self.deltas = Deltas(planted.backbone, planted.module)
        self.events: list[object] = []
        preprocess = Preprocessing(SIZE, planted.backbone.mean, planted.backbone.std)
        start = Start(planted.backbone, preprocess, pictures, self.settings, "cpu", {}, len(pictures))
        prepared = Prepared(start, planted.directions, planted.module, self.deltas, self.events.append, ALONE)
        self.steps = repair_steps(prepared, pictures, self.progress)

    def take(self, count: int) -> list[StepRecord]:
        """The next steps."""
        return [next(self.steps) for _ in range(count)]

    def finish(self) -> list[StepRecord]:
        return list(self.steps)

    @property
    def warnings(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Warned)]

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.module.state_dict().items()}


def another(planted: Any) -> Any:
    """The same planted model in a module of its own."""
    return replace(planted, module=deepcopy(planted.module))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether tensors of the same names are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
