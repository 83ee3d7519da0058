"""What the layer map says that a block computes, for tokens that are all equal: attention mixes nothing then.

    attention(x) = γ₁ ⊙ (W_o · norm(W_v LN(x) + b_v) + b_o)
    mlp(x)       = γ₂ ⊙ (W_down · norm(φ(W_up LN(x) + b_up)) + b_down)

Gated, the hidden layer is φ(W_gate LN(x) + b_gate) ⊙ (W_up LN(x) + b_up); sub-layers beside each other add up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sinder_cli.backbone.contract import GatedMlpMap, NormMap
from sinder_cli.backbone.weights import BlockTensors
from sinder_cli.defects.gaussian import ACTIVATIONS

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["attention", "mlp"]


def sublayer(block: BlockTensors, part: Part, x: Tensor) -> Tensor:
    """What a sub-layer, and those beside it, add to tokens x `[…, N]`, by the map."""
    total = x.new_zeros(x.shape)
    for branch in block.branches:
        hidden = _values(branch, x) if part == "attention" else _hidden(branch, x)
        inner = branch.map.attention.inner_norm if part == "attention" else branch.map.mlp.inner_norm
        if inner is not None:
            hidden = _normed(hidden, inner, branch, f"{part}.inner_norm")
        y = _linear(hidden, branch, "attention.output" if part == "attention" else "mlp.down")
        scale = branch.get(f"{part}.scale")
        total = total + (y if scale is None else y * scale)
    return total


def _values(block: BlockTensors, x: Tensor) -> Tensor:
    return _linear(_normed(x, block.map.attention.norm, block, "attention.norm"), block, "attention.value")


def _hidden(block: BlockTensors, x: Tensor) -> Tensor:
    phi = block.map.mlp.activation
    function = ACTIVATIONS[phi] if isinstance(phi, str) else phi
    read = _normed(x, block.map.mlp.norm, block, "mlp.norm")
    up = _linear(read, block, "mlp.up")
    return function(_linear(read, block, "mlp.gate")) * up if isinstance(block.map.mlp, GatedMlpMap) else function(up)


def _linear(x: Tensor, block: BlockTensors, role: str) -> Tensor:
    y = x @ block[role].T
    bias = block.get(f"{role}_bias")
    return y if bias is None else y + bias


def _normed(x: Tensor, norm: NormMap, block: BlockTensors, role: str) -> Tensor:
    if norm.kind == "layernorm":
        x = x - x.mean(dim=-1, keepdim=True)
    y = x * (x.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt()
    weight, bias = block.get(f"{role}.weight"), block.get(f"{role}.bias")
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
