"""The linear part of a block, in closed form (SINDER, section 3; DESIGN: population solution by Stein's lemma).

    A = diag(γ₁) W_o W_v diag(g₁) P        attention, token mixing and LayerNorm's per-token scale dropped
    C = diag(γ₂) J diag(g₂) P              MLP, J = E[∂f/∂x] for x ~ N(0, I), the best linear map of f
    E = (I + C)(I + A)                     a block; I + A + C when both sub-layers run in parallel

P = I − 11ᵀ/N for LayerNorm, P = I for RMSNorm. Shapes: N width, A inner width of attention, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from sinder_cli.backbone.blocks import BlockTensors
from sinder_cli.backbone.layermap import GatedMlpMap, NormMap

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
}

# The trapezoid rule against the normal density converges geometrically for smooth functions, as Gauss–Hermite does,
# and unlike it stays accurate to 1e-4 for kinked or very steep ones (ReLU; a trigger neuron's SiLU).
QUADRATURE_REACH = 8.0  # standard deviations; the density beyond is 5e-15
QUADRATURE_NODES = 401
MIN_SCALE = 1e-6  # under this s_k a unit counts as linear around its bias: no 0/0 for one padded with zeros


def attention_part(block: BlockTensors) -> Tensor:
    """A of one block, `[N, N]`."""
    A = block["attention.output"] @ block["attention.value"]
    return _around(A, block, "attention", block.map.attention.norm)


def mlp_part(block: BlockTensors) -> Tensor:
    """C of one block, `[N, N]`."""
    C = block["mlp.down"] @ mean_hidden_jacobian(block)
    return _around(C, block, "mlp", block.map.mlp.norm)


def block_part(attention: Tensor, mlp: Tensor, parallel: bool) -> Tensor:
    """E of one block from its A and C, all `[N, N]`."""
    if parallel:
        return plus_identity(attention + mlp)
    # (I + C)(I + A) = I + A + C + CA; one product
    return plus_identity((attention + mlp).addmm_(mlp, attention))


def plus_identity(matrix: Tensor) -> Tensor:
    """I + M, a new matrix."""
    total = matrix.clone()
    total.diagonal().add_(1.0)
    return total


def mean_hidden_jacobian(block: BlockTensors) -> Tensor:
    """E[∂hidden/∂x] for x ~ N(0, I), `[H, N]`; the hidden layer is φ(W₁x+b₁), or φ(W₁x+b₁) ⊙ (W₂x+b₂) when gated."""
    mlp = block.map.mlp
    phi = ACTIVATIONS[mlp.activation] if isinstance(mlp.activation, str) else mlp.activation
    if isinstance(mlp, GatedMlpMap):
        W1, W2 = block["mlp.gate"], block["mlp.up"]
        alpha, beta = gated_gains(phi, W1, block.get("mlp.gate_bias"), W2, block.get("mlp.up_bias"))
        return (alpha[:, None] * W1).addcmul_(beta[:, None], W2)
    W1 = block["mlp.up"]
    return plain_gains(phi, W1, block.get("mlp.up_bias"))[:, None] * W1


def plain_gains(phi: Callable[[Tensor], Tensor], W1: Tensor, b1: Tensor | None) -> Tensor:
    """d_k = E[φ'(h_k)], h_k ~ N(b_k, s_k²), s_k = ‖w_k‖; equal to E[z φ(b_k + s_k z)]/s_k. `[H, N]` → `[H]`."""
    s = W1.norm(dim=1).double().clamp_min(MIN_SCALE)
    _, z_phi, _ = _gaussian_moments(phi, _bias(b1, W1), s)
    return (z_phi / s).to(W1.dtype)


def gated_gains(
    phi: Callable[[Tensor], Tensor], W1: Tensor, b1: Tensor | None, W2: Tensor, b2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The factors (α, β), each `[H]`, of row k of the mean Jacobian α_k w₁ + β_k w₂ of φ(a) ⊙ c.

    α = E[φ'(a)·(b₂ + ρ(a − b₁))] = b₂ E[zφ]/s + ρ E[(z² − 1)φ] by parts, ρ = ⟨w₁, w₂⟩/‖w₁‖²; β = E[φ(a)].
    """
    s = W1.norm(dim=1).double().clamp_min(MIN_SCALE)
    rho = (W1 * W2).sum(dim=1).double() / s**2
    phi_, z_phi, z2_phi = _gaussian_moments(phi, _bias(b1, W1), s)
    alpha = _bias(b2, W2) * z_phi / s + rho * (z2_phi - phi_)
    return alpha.to(W1.dtype), phi_.to(W1.dtype)


def _gaussian_moments(phi: Callable[[Tensor], Tensor], b: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E[φ], E[zφ] and E[z²φ] of φ(b + s z) over z ~ N(0, 1), each `[H]`, in float64."""
    z = torch.linspace(-QUADRATURE_REACH, QUADRATURE_REACH, QUADRATURE_NODES, dtype=torch.float64, device=b.device)
    density = torch.exp(-0.5 * z**2)
    p = density / density.sum()
    values = phi(torch.addcmul(b[:, None], s[:, None], z[None, :]))  # [H, nodes]
    moments = values @ torch.stack([p, z * p, z**2 * p], dim=1)  # [H, 3]
    return moments[:, 0], moments[:, 1], moments[:, 2]


def _bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.double()


def _around(inner: Tensor, block: BlockTensors, part: str, norm: NormMap) -> Tensor:
    """diag(γ) · inner · diag(g) · P, in place."""
    g, gamma = block.get(f"{part}.norm.weight"), block.get(f"{part}.scale")
    if g is not None:
        inner *= g[None, :]
    if norm.kind == "layernorm":
        inner -= inner.mean(dim=1, keepdim=True)  # M (I − 11ᵀ/N)
    if gamma is not None:
        inner *= gamma[:, None]
    return inner
