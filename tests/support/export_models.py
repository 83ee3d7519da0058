"""Small models in the official format."""

from __future__ import annotations

import torch
from sinder_plugins.dinov2.config import Config, tensor_shapes
from torch import Tensor

CUSTOM = "dinov2_custom"
PLAIN = Config(width=128, depth=3, hidden=512, grid=6)
GATED = Config(width=128, depth=2, hidden=344, mlp="SwiGLU", grid=6, registers=4)


def random_tensors(config: Config, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor random, LayerScale and norms included, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(config).items()}
    for name, tensor in drawn.items():
        if "norm" in name and name.endswith("weight"):
            tensor.mul_(0.2).add_(1)
        elif name.endswith("weight"):
            tensor.mul_(tensor[0].numel() ** -0.5)
    return drawn
