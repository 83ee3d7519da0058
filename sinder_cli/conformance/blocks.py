"""Checks that each block computes what its map says, and that its linearization is autograd's mean Jacobian.

One sub-layer is checked at a time: with the last weight and bias of the other at zero, a block is x + sub-layer(x).
The tokens of an MLP are independent then. Those of attention are made equal, as mixing equal values changes nothing:

    attention(x) = γ₁ ⊙ (W_o · norm(W_v LN(x) + b_v) + b_o)
    mlp(x)       = γ₂ ⊙ (W_down · norm(φ(W_up LN(x) + b_up)) + b_down)

Gated, the hidden layer is φ(W_gate LN(x) + b_gate) ⊙ (W_up LN(x) + b_up); parallel sub-layers are added.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch

from sinder_cli.backbone.contract import BlockMap, GatedMlpMap, NormMap, WeightRef
from sinder_cli.backbone.weights import BlockTensors, read_block
from sinder_cli.conformance.subject import GRID, Candidate, NonconformityError, altered, gaussian, relative_error
from sinder_cli.defects.gaussian import activation
from sinder_cli.defects.linearize import attention_part, mlp_part
from sinder_cli.events import Emit, tracked

if TYPE_CHECKING:
    from torch import Tensor


Part = Literal["attention", "mlp"]


def sublayer(block: BlockTensors, part: Part, x: Tensor) -> Tensor:
    """Compute what a sub-layer, and those parallel to it, add to tokens x `[…, N]` by the map."""
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
    function = activation(block.map.mlp.activation)
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


PARTS: tuple[Part, ...] = ("attention", "mlp")
EXACT = 5e-5  # relative error of one sub-layer in float32; gelu differs by 2e-4 from its tanh form
ROUNDING = 2.0**-23  # relative to x, to which the block adds: it exceeds the output of a sub-layer of tiny scale
PROBES = 4  # directions w of the rows wᵀA and wᵀC that are compared
ROUNDS = (1, 4, 16)  # × FIRST samples: the mean of rarely active neurons needs more samples
FIRST_TOKENS = 1024  # samples of an MLP
FIRST_IMAGES = 64  # samples of attention, each an image of equal tokens
AT_ONCE = 32  # images
NORM_BIAS = 4.0  # / N: error by the scale of a norm in front, and by its derivative x̂x̂ᵀ/N, both O(1/N)
INNER_BIAS = 0.1  # the same for a norm inside, whose features are not Gaussian
ERRORS = 2.0  # standard errors of ‖mean − expected‖, which hardly varies with hundreds of features


def blocks_follow_the_map(subject: Candidate, emit: Emit) -> str:
    """Check that each sub-layer adds what the map's formula says: right tensors, rows, activation, scale, biases."""
    worst = 0.0
    for index, block in _blocks(subject, emit, "blocks against their map"):
        tensors = read_block(subject.backbone.weights, block)
        for part in PARTS:
            with _alone(subject, block, part):
                x, context = _inputs(subject, part, 2, seed=index)
                with torch.no_grad():
                    found = subject.backbone.run_block(subject.module, index, x, context) - x
                    expected = sublayer(tensors, part, x)
                    error = relative_error(found, expected)
                    rounding = ROUNDING * float(x.norm() / expected.norm().clamp_min(1e-30))
            if not error <= EXACT + rounding:
                raise NonconformityError(f"block {index}, {part}: the map's formula is off by {error:.1e}")
            worst = max(worst, error)
    return f"relative error {worst:.1e}"


def linearization_agrees(subject: Candidate, emit: Emit) -> str:
    """Check that wᵀA and wᵀC of each block, in closed form, are autograd's mean over Gaussian inputs, for random w."""
    worst = 0.0
    for index, block in _blocks(subject, emit, "linearization against autograd"):
        tensors = _plain_norms(read_block(subject.backbone.weights, block))
        for part in PARTS:
            closed = attention_part(tensors) if part == "attention" else mlp_part(tensors)
            with _alone(subject, block, part, plain_norms=True):
                off = _difference(subject, index, block, part, closed)
            found = f"{off.error:.1%} off with {off.allowed:.1%} allowed"
            if not off.error <= off.allowed:
                raise NonconformityError(f"block {index}, {part}: autograd's mean Jacobian is {found}")
            worst = max(worst, off.error)
    return f"at most {worst:.1%} off, with {PROBES} directions per block"


@dataclass(frozen=True)
class _Difference:
    """The error of the worst probe, and the allowed one, relative to the root mean square of single gradients."""

    error: float
    allowed: float


def _difference(subject: Candidate, index: int, block: BlockMap, part: Part, closed: Tensor) -> _Difference:
    """Measure the difference, with more samples until it is small enough or the last round is over."""
    w = gaussian(PROBES, subject.backbone.width, seed=index)
    expected = w @ closed  # [K, N]
    total, squares, count = torch.zeros_like(expected).double(), torch.zeros(PROBES, dtype=torch.float64), 0
    for rounds in ROUNDS:
        for gradients in _gradients(subject, index, part, w, rounds, count):
            total += gradients.sum(dim=1)
            squares += gradients.square().sum(dim=(1, 2))
            count += gradients.shape[1]
        mean, square = total / count, squares / count  # [K, N], [K]
        scale = square.sqrt().clamp_min(1e-30)
        noise = ((square - mean.square().sum(dim=1)).clamp_min(0) / count).sqrt() / scale
        errors = (mean - expected).norm(dim=1) / scale
        allowed = ERRORS * noise + _bias(block, part, subject.backbone.width)
        at = int((errors - allowed).argmax())
        if errors[at] <= allowed[at] or rounds == ROUNDS[-1]:
            return _Difference(float(errors[at]), float(allowed[at]))
    raise AssertionError("there are no rounds")


def _gradients(subject: Candidate, index: int, part: Part, w: Tensor, rounds: int, seed: int) -> Iterator[Tensor]:
    """Yield ∂(w · sub-layer)/∂x at each sample, for every probe: `[K, samples, N]` in float64, in portions."""
    tokens = subject.backbone.prefix_tokens + prod(GRID)
    images = rounds * (FIRST_IMAGES if part == "attention" else -(-FIRST_TOKENS // tokens))
    for start in range(0, images, AT_ONCE):
        count = min(AT_ONCE, images - start)
        x, context = _inputs(subject, part, count, seed=seed + start)
        x.requires_grad_()
        y = subject.backbone.run_block(subject.module, index, x, context)
        rows = []
        for probe in w:
            (gradient,) = torch.autograd.grad(y, x, probe.expand_as(y), retain_graph=True)
            rows.append((gradient - probe).double())
        stacked = torch.stack(rows)  # [K, B, T, N]
        yield stacked.mean(dim=2) if part == "attention" else stacked.flatten(1, 2)


def _inputs(subject: Candidate, part: Part, images: int, seed: int) -> tuple[Tensor, Any]:
    """Draw Gaussian tokens `[B, T, N]` of small images, equal inside an image for attention; return the context too."""
    tokens, context = subject.embedded(subject.images(images))
    B, T, N = tokens.shape
    if part == "mlp":
        return gaussian(B, T, N, seed=seed), context
    return gaussian(B, 1, N, seed=seed).repeat(1, T, 1), context


@contextmanager
def _alone(subject: Candidate, block: BlockMap, part: Part, plain_norms: bool = False) -> Iterator[None]:
    """Silence the other sub-layer of a block inside the context; with `plain_norms`, norms in front only normalize."""
    values: list[tuple[WeightRef, float]] = []
    for branch in block.branches:
        other = (branch.mlp.down, branch.mlp.down_bias)
        if part == "mlp":
            other = (branch.attention.output, branch.attention.output_bias)
        values += [(ref, 0.0) for ref in other if ref is not None]
        norm = getattr(branch, part).norm
        if plain_norms:
            values += [(ref, number) for ref, number in ((norm.weight, 1.0), (norm.bias, 0.0)) if ref is not None]
    with altered(subject.module, values):
        yield


def _plain_norms(block: BlockTensors) -> BlockTensors:
    """Return the tensors of a block with norms in front that only normalize."""
    plain = {
        role: torch.ones_like(tensor) if role.endswith(".weight") else torch.zeros_like(tensor)
        for role, tensor in block.by_role.items()
        if role.removesuffix(".weight").removesuffix(".bias").endswith(".norm")
    }
    return replace(block, by_role=block.by_role | plain)


def _bias(block: BlockMap, part: Part, width: int) -> float:
    """Return the error by what the closed form leaves out, relative to a single gradient."""
    inner = any(getattr(branch, part).inner_norm is not None for branch in block.branches)
    return NORM_BIAS / width + (INNER_BIAS if inner else 0.0)


def _blocks(subject: Candidate, emit: Emit, phase: str) -> Iterator[tuple[int, BlockMap]]:
    blocks = subject.backbone.layers.blocks
    yield from tracked(enumerate(blocks), emit, phase, len(blocks), "blocks")
