"""Files of small models of timm's, and how to open them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from timm_samples import KINDS, NAMES, made

from sinder_cli import Backbone, ModelRequest
from sinder_cli.backbone.opening import open_backbone
from sinder_cli.backbone.registry import installed_plugins, load_plugin


@pytest.fixture(scope="session")
def hooks() -> Any:
    return load_plugin(installed_plugins()["timm"])


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The safetensors file of a small model, as timm saves it without its classifier."""
    folder = tmp_path_factory.mktemp("timm")

    def path_of(kind: str) -> Path:
        path = folder / f"{kind}.safetensors"
        if not path.exists():
            save_file(made(NAMES[kind]).state_dict(), path)
        return path

    return path_of


@pytest.fixture
def describe(hooks: Any, stored: Callable[[str], Path]) -> Callable[..., Backbone]:
    """Open a small model of a kind, from its file or another."""

    def opened(kind: str, weights: Path | None = None, **options: Any) -> Backbone:
        request = ModelRequest(f"timm/{NAMES.get(kind, kind)}", weights or stored(kind), **options)
        return open_backbone(hooks, request)

    return opened
