"""Hidden units under Gaussian inputs: their mean gains and moments for x ~ N(0, I), by quadrature.

Shapes: N width, H hidden width. A unit is φ(a), or φ(a) · c when gated, with a = w₁x + b₁ and c = w₂x + b₂.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.backbone.contract import Activation

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


def activation(named: Activation | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the function of an activation that a map gives by name or as a function."""
    return ACTIVATIONS[named] if isinstance(named, str) else named


# The trapezoid rule against the normal density converges geometrically for smooth functions, as Gauss–Hermite does,
# and unlike it stays accurate to 1e-4 for kinked or very steep ones (ReLU; a trigger neuron's SiLU).
QUADRATURE_REACH = 8.0  # standard deviations; the density beyond is 5e-15
QUADRATURE_NODES = 401
MIN_SCALE = 1e-6  # below this s_k a unit counts as linear around its bias: no 0/0 for a unit padded with zeros


def plain_gains(phi: Callable[[Tensor], Tensor], W1: Tensor, b1: Tensor | None) -> Tensor:
    """Compute d_k = E[φ'(h_k)], h_k ~ N(b_k, s_k²), s_k = ‖w_k‖; equal to E[z φ(b_k + s_k z)]/s_k. `[H, N]` → `[H]`."""
    s = W1.norm(dim=1).double().clamp_min(MIN_SCALE)
    _, z_phi, _ = _gaussian_moments(phi, _bias(b1, W1), s)
    return (z_phi / s).to(W1.dtype)


def gated_gains(
    phi: Callable[[Tensor], Tensor], W1: Tensor, b1: Tensor | None, W2: Tensor, b2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the factors (α, β), each `[H]`, of row k of the mean Jacobian α_k w₁ + β_k w₂ of φ(a) ⊙ c.

    α = E[φ'(a)·(b₂ + ρ(a − b₁))] = b₂ E[zφ]/s + ρ E[(z² − 1)φ] by parts, ρ = ⟨w₁, w₂⟩/‖w₁‖²; β = E[φ(a)].
    """
    s = W1.norm(dim=1).double().clamp_min(MIN_SCALE)
    rho = (W1 * W2).sum(dim=1).double() / s**2
    phi_, z_phi, z2_phi = _gaussian_moments(phi, _bias(b1, W1), s)
    alpha = _bias(b2, W2) * z_phi / s + rho * (z2_phi - phi_)
    return alpha.to(W1.dtype), phi_.to(W1.dtype)


def hidden_moments(
    phi: Callable[[Tensor], Tensor], W1: Tensor, b1: Tensor | None, W2: Tensor | None = None, b2: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute E[h_k] and E[h_k²] of the hidden units, each `[H]`, in float64; gated if there is a W₂.

    Given a = b₁ + s z, c is b₂ + t z plus an independent remainder of variance ‖w₂‖² − t², t = ⟨w₁, w₂⟩/s.
    """
    s = W1.norm(dim=1).double().clamp_min(MIN_SCALE)
    b = _bias(b1, W1)
    first, z_first, _ = _gaussian_moments(phi, b, s)
    m0, m1, m2 = _gaussian_moments(lambda a: phi(a) ** 2, b, s)
    if W2 is None:
        return first, m0
    t, c = (W1.double() * W2.double()).sum(dim=1) / s, _bias(b2, W2)
    rest = (W2.double().norm(dim=1) ** 2 - t**2).clamp_min(0)
    return c * first + t * z_first, (c**2 + rest) * m0 + 2 * c * t * m1 + t**2 * m2


def linear_moments(W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute E[y_k] and E[y_k²] of y = Wx + b, each `[H]`, in float64."""
    mean = _bias(b, W)
    return mean, mean**2 + W.double().norm(dim=1) ** 2


def _gaussian_moments(phi: Callable[[Tensor], Tensor], b: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute E[φ], E[zφ] and E[z²φ] of φ(b + s z) over z ~ N(0, 1), each `[H]`, in float64."""
    z = torch.linspace(-QUADRATURE_REACH, QUADRATURE_REACH, QUADRATURE_NODES, dtype=torch.float64, device=b.device)
    density = torch.exp(-0.5 * z**2)
    p = density / density.sum()
    values = phi(torch.addcmul(b[:, None], s[:, None], z[None, :]))  # [H, nodes]
    moments = values @ torch.stack([p, z * p, z**2 * p], dim=1)  # [H, 3]
    return moments[:, 0], moments[:, 1], moments[:, 2]


def _bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.double()
