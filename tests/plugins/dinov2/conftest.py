"""Small DINOv2 checkpoints with every tensor random, LayerScale and norms included, so that a mix-up shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from export_models import random_tensors
from sinder_plugins.dinov2.config import Config
from torch import Tensor

from sinder_cli import Backbone, MemoryTensors, ModelRequest
from sinder_cli.backbone.opening import open_backbone
from sinder_cli.backbone.registry import installed_plugins, load_plugin

TINY = {
    "plain": Config(width=128, depth=3, hidden=512, grid=5),
    "gated": Config(width=128, depth=3, hidden=344, mlp="SwiGLU", grid=5),
    "plain with registers": Config(width=128, depth=3, hidden=512, grid=5, registers=4),
    "gated with registers": Config(width=128, depth=3, hidden=344, mlp="SwiGLU", grid=5, registers=2),
}


@pytest.fixture(scope="session")
def hooks() -> Any:
    return load_plugin(installed_plugins()["dinov2"])


@pytest.fixture(params=list(TINY.values()), ids=list(TINY))
def config(request: pytest.FixtureRequest) -> Config:
    tiny: Config = request.param
    return tiny


@pytest.fixture
def tiny() -> Config:
    return TINY["plain"]


@pytest.fixture
def drawn() -> Callable[[Config], dict[str, Tensor]]:
    """Draw the tensors of a configuration."""
    return random_tensors


@pytest.fixture
def tensors(tiny: Config) -> dict[str, Tensor]:
    """The tensors of the plain tiny model."""
    return random_tensors(tiny)


@pytest.fixture
def describe(hooks: Any) -> Callable[..., Backbone]:
    """Open tensors in memory, or a file, as a model."""

    def opened(weights: dict[str, Tensor] | Path, model: str = "dinov2_custom", **options: Any) -> Backbone:
        if isinstance(weights, Path):
            return open_backbone(hooks, ModelRequest(model, weights, **options))
        return open_backbone(Described(hooks, MemoryTensors("memory", weights)), ModelRequest(model, **options))

    return opened


class Described:
    """The plugin's hooks, but with weights that come from the test."""

    def __init__(self, hooks: Any, source: MemoryTensors) -> None:
        self.sinder_weights = lambda request: source  # noqa: ARG005 - the hook's keyword
        self.sinder_backbone = hooks.sinder_backbone
