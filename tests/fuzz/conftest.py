"""How many rounds the fuzz runs (`make fuzz`: many), and small files that are whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sinder_plugins.dinov2.config import Config, tensor_shapes
from torch import Tensor


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-rounds", type=int, default=1, help="Repeat random damage so many times, otherwise seeded.")


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> range:
    """The numbers that random damage is seeded by; one, where the whole suite runs."""
    return range(request.config.getoption("--fuzz-rounds", default=1))


@pytest.fixture(scope="session")
def tensors() -> dict[str, Tensor]:
    """A DINOv2 of two blocks, every tensor random."""
    torch.manual_seed(0)
    shapes = tensor_shapes(Config(width=64, depth=2, hidden=128, grid=4))
    return {name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def whole(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a safetensors file."""
    path = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    save_file(tensors, path)
    return path
