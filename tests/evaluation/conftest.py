"""A small DINOv2 with random weights, and images of several shapes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from planted_dinov2 import random_tensors
from safetensors.torch import save_file
from sinder_plugins.dinov2.config import Config

SMALL = Config(width=64, depth=3, hidden=128, grid=6, registers=1)
SHAPES = ((90, 84), (84, 120), (100, 100), (130, 85), (84, 84))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are slower on several threads of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights for `dinov2_custom`, in which one hidden unit fires on a few tokens and writes a large direction."""
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    tensors = random_tensors(SMALL)
    up, bias, down = (tensors[f"blocks.1.mlp.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight"))
    up[0] *= 5 / up[0].norm()
    bias[0] = -8.0
    down[:, 0] = 60 * torch.eye(64)[3]
    save_file(tensors, path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five smooth random images."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, (width, height) in enumerate(SHAPES):
        draw = np.random.default_rng(index)
        coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder
