"""The linear part of a block, in closed form (SINDER, section 3; DESIGN: population solution by Stein's lemma).

    A = diag(γ₁) W_o W_v diag(g₁) P        attention, token mixing and LayerNorm's per-token scale dropped
    C = diag(γ₂) J diag(g₂) P              MLP, J = E[∂f/∂x] for x ~ N(0, I), the best linear map of f
    E = (I + C)(I + A)                     a block; I + A + C when both sub-layers run in parallel

P = I − 11ᵀ/N for LayerNorm, P = I for RMSNorm. Shapes: N width, A inner width of attention, H hidden width. The A of
parallel branches are added, and so are their C.

A norm inside a sub-layer, between value and output or between hidden and down, is linear up to its scale: y ↦
g ⊙ P y / s(y) + b. It is folded in as the matrix diag(g) P / s with one s, the root of the mean of s(y)² over
x ~ N(0, I); with hundreds of features s(y) hardly varies. In front of a sub-layer s is 1 by the choice of x.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sinder_cli.backbone.contract import GatedMlpMap, NormMap
from sinder_cli.backbone.weights import BlockTensors
from sinder_cli.defects.gaussian import activation, gated_gains, hidden_moments, linear_moments, plain_gains

if TYPE_CHECKING:
    from torch import Tensor


def attention_part(block: BlockTensors) -> Tensor:
    """Compute A of one block, `[N, N]`: the sum over its branches."""
    return _total(_attention_part(branch) for branch in block.branches)


def mlp_part(block: BlockTensors) -> Tensor:
    """Compute C of one block, `[N, N]`: the sum over its branches."""
    return _total(_mlp_part(branch) for branch in block.branches)


def _attention_part(block: BlockTensors) -> Tensor:
    W = block["attention.value"]
    if (inner := block.map.attention.inner_norm) is not None:
        moments = linear_moments(W, block.get("attention.value_bias"))
        W = normalized(W, moments, inner, block.get("attention.inner_norm.weight"))
    return _around(block["attention.output"] @ W, block, "attention", block.map.attention.norm)


def _mlp_part(block: BlockTensors) -> Tensor:
    J = mean_hidden_jacobian(block)
    if (inner := block.map.mlp.inner_norm) is not None:
        W2 = block.get("mlp.up") if isinstance(block.map.mlp, GatedMlpMap) else None
        moments = hidden_moments(activation(block.map.mlp.activation), *_gate(block), W2, block.get("mlp.up_bias"))
        J = normalized(J, moments, inner, block.get("mlp.inner_norm.weight"))
    return _around(block["mlp.down"] @ J, block, "mlp", block.map.mlp.norm)


def normalized(M: Tensor, moments: tuple[Tensor, Tensor], norm: NormMap, g: Tensor | None) -> Tensor:
    """Compute diag(g) P M / s: a norm over F features folded into their linear part M `[F, N]`.

    `moments` are E[y] and E[y²], `[F]` each. s² is the mean of the variance over features, or of their mean square for
    RMSNorm. Exact for linear features. For others the mean over features m varies by more than its linear part, which
    gives only Var m ≈ ‖Mᵀ1/F‖².
    """
    mean, square = moments
    variance = square.mean()
    if norm.kind == "layernorm":
        along = M.mean(dim=0, keepdim=True)  # [1, N]
        variance = variance - mean.mean() ** 2 - (along.double() ** 2).sum()
        M = M - along
    M = M * (variance + norm.eps).rsqrt().to(M.dtype)
    return M if g is None else M * g[:, None]


def _total(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total += part
    return total


def block_part(attention: Tensor, mlp: Tensor, parallel: bool) -> Tensor:
    """Compute E of one block from its A and C, all `[N, N]`."""
    if parallel:
        return plus_identity(attention + mlp)
    # (I + C)(I + A) = I + A + C + CA; one product
    return plus_identity((attention + mlp).addmm_(mlp, attention))


def plus_identity(matrix: Tensor) -> Tensor:
    """Return I + M as a new matrix."""
    total = matrix.clone()
    total.diagonal().add_(1.0)
    return total


def mean_hidden_jacobian(block: BlockTensors) -> Tensor:
    """Compute E[∂hidden/∂x] for x ~ N(0, I), `[H, N]`; hidden is φ(W₁x+b₁), or φ(W₁x+b₁) ⊙ (W₂x+b₂) when gated."""
    phi, W1, b1 = activation(block.map.mlp.activation), *_gate(block)
    if isinstance(block.map.mlp, GatedMlpMap):
        W2 = block["mlp.up"]
        alpha, beta = gated_gains(phi, W1, b1, W2, block.get("mlp.up_bias"))
        return (alpha[:, None] * W1).addcmul_(beta[:, None], W2)
    return plain_gains(phi, W1, b1)[:, None] * W1


def _gate(block: BlockTensors) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of the layer that φ is applied to."""
    role = "mlp.gate" if isinstance(block.map.mlp, GatedMlpMap) else "mlp.up"
    return block[role], block.get(f"{role}_bias")


def _around(inner: Tensor, block: BlockTensors, part: str, norm: NormMap) -> Tensor:
    """Compute diag(γ) · inner · diag(g) · P, in place."""
    g, gamma = block.get(f"{part}.norm.weight"), block.get(f"{part}.scale")
    if g is not None:
        inner *= g[None, :]
    if norm.kind == "layernorm":
        inner -= inner.mean(dim=1, keepdim=True)  # M (I − 11ᵀ/N)
    if gamma is not None:
        inner *= gamma[:, None]
    return inner
