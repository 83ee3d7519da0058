"""What the linearization makes of timm's own sub-layers with norms inside, against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sinder_cli import Backbone
from sinder_cli.backbone.opening import load_module
from sinder_cli.backbone.weights import BlockTensors, read_block
from sinder_cli.defects.linearize import attention_part, mlp_part

SAMPLES = 4096


def mean_jacobian(function: Callable[[Tensor], Tensor], width: int) -> Tensor:
    """E[∂f/∂x] over single tokens x ~ N(0, I), one row of the output at a time, by autograd."""
    x = torch.randn(SAMPLES, 1, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x.requires_grad_()
    y = function(x)
    rows = [torch.autograd.grad(y[..., k].sum(), x, retain_graph=True)[0].mean(dim=(0, 1)) for k in range(width)]
    return torch.stack(rows)


def in_front(norm: Any, jacobian: Tensor, gamma: Tensor | None) -> Tensor:
    """diag(γ) J diag(g) (I − 11ᵀ/N), the norm in front and the LayerScale behind."""
    J = jacobian * norm.weight
    J = J - J.mean(dim=1, keepdim=True)
    return J if gamma is None else gamma[:, None] * J


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def without_inner(block: BlockTensors, part: str) -> BlockTensors:
    sub_layer = getattr(block.map, part).model_copy(update={"inner_norm": None})
    return BlockTensors(block.map.model_copy(update={part: sub_layer}), block.by_role)


@pytest.mark.parametrize("kind", ["beit3", "eva02_clip"])
def test_a_norm_between_value_and_output_is_folded_in(kind: str, describe: Callable[..., Backbone]) -> None:
    backbone = describe(kind)
    module: Any = load_module(backbone)
    attention: nn.Module = module.double().blocks[1].attn
    block = read_block(backbone.weights, backbone.layers.blocks[1], torch.float64)
    expected = in_front(module.blocks[1].norm1, mean_jacobian(attention, backbone.width), None)
    assert difference(attention_part(block), expected) < 0.1  # the scale moves with x, the more so at width 64
    assert difference(attention_part(without_inner(block, "attention")), expected) > 0.2


@pytest.mark.parametrize("kind", ["beit3", "eva02", "eva02_clip"])
def test_a_norm_behind_the_hidden_layer_is_folded_in(kind: str, describe: Callable[..., Backbone]) -> None:
    backbone = describe(kind)
    module: Any = load_module(backbone)
    mlp: nn.Module = module.double().blocks[1].mlp
    block = read_block(backbone.weights, backbone.layers.blocks[1], torch.float64)
    expected = in_front(module.blocks[1].norm2, mean_jacobian(mlp, backbone.width), None)
    assert difference(mlp_part(block), expected) < 0.1
    assert difference(mlp_part(without_inner(block, "mlp")), expected) > 0.2


@pytest.mark.parametrize("kind", ["packed", "gate_last", "swiglu", "layer_scale"])
def test_an_mlp_is_linearized_to_its_mean_jacobian(kind: str, describe: Callable[..., Backbone]) -> None:
    backbone = describe(kind)
    module: Any = load_module(backbone)
    inside = module.double().blocks[1]
    block = read_block(backbone.weights, backbone.layers.blocks[1], torch.float64)
    jacobian = mean_jacobian(inside.mlp, backbone.width)
    gamma = getattr(inside.ls2, "gamma", None)
    norm = backbone.layers.blocks[1].mlp.norm.kind
    expected = in_front(inside.norm2, jacobian, gamma) if norm == "layernorm" else jacobian * inside.norm2.weight
    assert difference(mlp_part(block), expected) < 0.08  # sampled: 1/√M of noise
