"""The features are timm's own, and each block is what its layer map says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from sinder_cli import Backbone
from sinder_cli.backbone.opening import load_module

Describe = Callable[..., Backbone]
Stored = Callable[[str], Path]

TOLERANCE = 1e-5


def images(backbone: Backbone, rows: int, columns: int, count: int = 2) -> Tensor:
    P = backbone.patch_size
    return torch.randn(count, 3, rows * P, columns * P, generator=torch.Generator().manual_seed(1))


def hidden_states(backbone: Backbone, batch: Tensor) -> list[Tensor]:
    """The residual stream `[B, T, N]` before, between and after the blocks, and last the normalized tokens."""
    module = load_module(backbone)
    x, context = backbone.embed(module, batch)
    states = [x]
    for index in range(backbone.depth):
        states.append(backbone.run_block(module, index, states[-1], context))
    return [*states, backbone.finish(module, states[-1])]


def timm_states(path: Path, name: str, batch: Tensor, **options: Any) -> list[Tensor]:
    """The same as timm's own `forward_features` goes through them."""
    module = timm.create_model(name, num_classes=0, **options).eval()
    module.load_state_dict(load_file(path), strict=True)
    states: list[Tensor] = []
    module.blocks[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    for block in module.blocks:
        block.register_forward_hook(lambda _, __, output: states.append(output))
    with torch.no_grad():
        normalized = module.forward_features(batch)
    return [*states, normalized]


def relative_error(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape
    return ((x - y).norm() / y.norm()).item()


def small(kind: str) -> str:
    return f"small_{kind}"


def test_every_hidden_state_equals_that_of_timm_at_the_native_size(
    kind: str, describe: Describe, stored: Stored
) -> None:
    backbone = describe(kind)
    batch = images(backbone, 5, 5)
    ours, theirs = hidden_states(backbone, batch), timm_states(stored(kind), small(kind), batch)
    assert len(ours) == backbone.depth + 2
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine, other) <= TOLERANCE
