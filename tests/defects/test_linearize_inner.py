"""Norms inside sub-layers, and sub-layers beside each other, against samples, autograd and sums."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sinder_cli import AttentionMap, BlockMap, GatedMlpMap, NormMap, PlainMlpMap, WeightRef
from sinder_cli.backbone.contract import Activation, linear_references, trained_references
from sinder_cli.backbone.weights import BlockTensors
from sinder_cli.defects.gaussian import ACTIVATIONS, gated_gains, hidden_moments, linear_moments, plain_gains
from sinder_cli.defects.linearize import attention_part, block_part, mlp_part, normalized

N, A, H = 24, 96, 160  # wide inside: the scale of a norm varies as 1/√(2F)
SAMPLES = 40_000


def random(*shape: int, seed: int, scale: float) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ref(name: str) -> WeightRef:
    return WeightRef(name=name)


def made_block(kind: str, gated: bool, activation: Activation = "silu") -> BlockTensors:
    """A block with norms inside both sub-layers; the outer ones change nothing but the centring."""
    tensors = {
        "attention.value": random(A, N, seed=0, scale=0.3),
        "attention.value_bias": random(A, seed=1, scale=0.5),
        "attention.output": random(N, A, seed=2, scale=0.1),
        "attention.inner_norm.weight": 1 + random(A, seed=3, scale=0.2),
        "mlp.up": random(H, N, seed=4, scale=0.3),
        "mlp.up_bias": random(H, seed=5, scale=0.5),
        "mlp.down": random(N, H, seed=6, scale=0.1),
        "mlp.inner_norm.weight": 1 + random(H, seed=7, scale=0.2),
    }
    if gated:
        tensors |= {"mlp.gate": random(H, N, seed=8, scale=0.3), "mlp.gate_bias": random(H, seed=9, scale=0.5)}
    outer = NormMap(kind="rmsnorm")

    def inner(part: str) -> NormMap:
        return NormMap.model_validate({"kind": kind, "weight": ref(f"{part}.inner_norm.weight"), "eps": 1e-6})

    attention = AttentionMap(
        norm=outer,
        value=ref("attention.value"),
        value_bias=ref("attention.value_bias"),
        output=ref("attention.output"),
        inner_norm=inner("attention"),
    )
    shared = {
        "norm": outer, "activation": activation, "up": ref("mlp.up"), "up_bias": ref("mlp.up_bias"),
        "down": ref("mlp.down"), "inner_norm": inner("mlp"),
    }  # fmt: skip
    mlp = (
        GatedMlpMap(**shared, gate=ref("mlp.gate"), gate_bias=ref("mlp.gate_bias")) if gated else PlainMlpMap(**shared)
    )
    return BlockTensors(BlockMap(attention=attention, mlp=mlp), tensors)


def normed(y: Tensor, kind: str, g: Tensor) -> Tensor:
    return (functional.layer_norm if kind == "layernorm" else functional.rms_norm)(y, y.shape[-1:], weight=g, eps=1e-6)


def attention_of(block: BlockTensors, x: Tensor, kind: str) -> Tensor:
    value = x @ block["attention.value"].T + block["attention.value_bias"]
    return normed(value, kind, block["attention.inner_norm.weight"]) @ block["attention.output"].T


def hidden_of(block: BlockTensors, x: Tensor) -> Tensor:
    up = x @ block["mlp.up"].T + block["mlp.up_bias"]
    phi = ACTIVATIONS[str(block.map.mlp.activation)]
    if isinstance(block.map.mlp, PlainMlpMap):
        return phi(up)
    return phi(x @ block["mlp.gate"].T + block["mlp.gate_bias"]) * up


def mlp_of(block: BlockTensors, x: Tensor, kind: str) -> Tensor:
    return normed(hidden_of(block, x), kind, block["mlp.inner_norm.weight"]) @ block["mlp.down"].T


def mean_jacobian(function: object, outputs: int) -> Tensor:
    """E[∂f/∂x] over x ~ N(0, I), one row of the output at a time, by autograd."""
    x = random(SAMPLES, N, seed=100, scale=1.0).requires_grad_()
    y = function(x)  # type: ignore[operator]
    rows = [torch.autograd.grad(y[:, k].sum(), x, retain_graph=True)[0].mean(dim=0) for k in range(outputs)]
    return torch.stack(rows)


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_a_norm_between_value_and_output_is_folded_in(kind: str) -> None:
    block = made_block(kind, gated=False)
    expected = mean_jacobian(lambda x: attention_of(block, x, kind), N)
    assert difference(attention_part(block), expected) < 0.05
    without = BlockTensors(
        block.map.model_copy(update={"attention": block.map.attention.model_copy(update={"inner_norm": None})}),
        block.by_role,
    )
    assert difference(attention_part(without), expected) > 0.2


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_norm_of_the_hidden_layer_is_folded_in(kind: str, gated: bool) -> None:
    block = made_block(kind, gated)
    expected = mean_jacobian(lambda x: mlp_of(block, x, kind), N)
    assert difference(mlp_part(block), expected) < 0.1  # the scale moves with x, the more so with few features
    direction = torch.linalg.svd(mlp_part(block))[0][:, 0]
    assert abs(torch.linalg.svd(expected)[0][:, 0] @ direction) > 0.99


@pytest.mark.parametrize("activation", ["gelu", "silu", "quick_gelu", "relu"])
@pytest.mark.parametrize("gated", [False, True])
def test_moments_of_hidden_units_are_those_of_samples(activation: Activation, gated: bool) -> None:
    block = made_block("layernorm", gated, activation)
    hidden = hidden_of(block, random(SAMPLES, N, seed=11, scale=1.0))
    first = block["mlp.gate" if gated else "mlp.up"], block["mlp.gate_bias" if gated else "mlp.up_bias"]
    second = (block["mlp.up"], block["mlp.up_bias"]) if gated else ()
    mean, square = hidden_moments(ACTIVATIONS[activation], *first, *second)
    noise = 5 * hidden.std(dim=0) / SAMPLES**0.5
    assert ((hidden.mean(dim=0) - mean).abs() < noise).all()
    assert (((hidden**2).mean(dim=0) - square).abs() < 5 * (hidden**2).std(dim=0) / SAMPLES**0.5).all()


def test_a_unit_without_weights_has_the_moments_of_its_bias() -> None:
    W1, W2, b1, b2 = (
        torch.zeros(A, N),
        random(A, N, seed=0, scale=0.3),
        random(A, seed=1, scale=1.0),
        random(A, seed=2, scale=1.0),
    )
    phi = ACTIVATIONS["gelu"](b1)
    plain, gated = (hidden_moments(ACTIVATIONS["gelu"], W1, b1, *gate) for gate in ((), (W2, b2)))
    torch.testing.assert_close(torch.stack(plain), torch.stack([phi, phi**2]), rtol=1e-6, atol=1e-6)
    of_up = b2**2 + (W2**2).sum(dim=1)
    torch.testing.assert_close(torch.stack(gated), torch.stack([phi * b2, phi**2 * of_up]), rtol=1e-6, atol=1e-6)


def test_moments_of_a_linear_layer_are_those_of_samples() -> None:
    W, b = random(A, N, seed=0, scale=0.3), random(A, seed=1, scale=0.5)
    y = random(SAMPLES, N, seed=11, scale=1.0) @ W.T + b
    mean, square = linear_moments(W, b)
    assert torch.equal(mean, b)
    assert (((y**2).mean(dim=0) - square).abs() < 5 * (y**2).std(dim=0) / SAMPLES**0.5).all()


def with_beside(block: BlockTensors, beside: BlockTensors) -> BlockTensors:
    both = block.by_role | {f"beside.{role}": tensor for role, tensor in beside.by_role.items()}
    return replace(block, map=block.map.model_copy(update={"beside": beside.map}), by_role=both)


def test_sub_layers_beside_each_other_add_up() -> None:
    first, second = made_block("layernorm", gated=False), made_block("rmsnorm", gated=True)
    both = with_beside(first, second)
    A, C = attention_part(first) + attention_part(second), mlp_part(first) + mlp_part(second)
    torch.testing.assert_close(attention_part(both), A)
    torch.testing.assert_close(mlp_part(both), C)
    identity = torch.eye(N, dtype=torch.float64)
    torch.testing.assert_close(block_part(attention_part(both), mlp_part(both), False), (identity + C) @ (identity + A))


def test_all_weights_of_sub_layers_beside_each_other_are_trained() -> None:
    block = with_beside(made_block("layernorm", gated=False), made_block("rmsnorm", gated=True)).map
    own = ["attention.value", "attention.output", "mlp.up", "mlp.down"]
    assert list(trained_references(block)) == [
        *own,
        "beside.attention.value", "beside.attention.output",
        "beside.mlp.gate", "beside.mlp.up", "beside.mlp.down",
    ]  # fmt: skip
    assert len(linear_references(block)) == 9


def test_a_folded_layernorms_scale_leaves_out_what_all_features_share() -> None:
    shared = random(1, N, seed=20, scale=0.8)  # so large that the variance over features is half of the mean square
    M, b = shared + random(A, N, seed=21, scale=0.8), random(A, seed=22, scale=0.5)
    y = torch.randn(SAMPLES, N, generator=torch.Generator().manual_seed(23), dtype=torch.float64) @ M.T + b
    scale = y.var(dim=1, unbiased=False).mean().sqrt()
    found = normalized(M, linear_moments(M, b), NormMap(kind="layernorm", eps=0.0), None)
    torch.testing.assert_close(found * scale, M - M.mean(dim=0), rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("gained", [False, True])
def test_a_folded_norm_of_linear_features_is_the_explicit_product(kind: str, gained: bool) -> None:
    M, b = 0.2 + random(7, 5, seed=24, scale=0.5), 0.4 + random(7, seed=25, scale=0.5)
    g = random(7, seed=26, scale=1.0) if gained else None
    eps, rows = 0.3, range(7)
    square = sum(float(M[k] @ M[k] + b[k] ** 2) for k in rows) / 7
    along, middle = sum(M[k] for k in rows) / 7, sum(float(b[k]) for k in rows) / 7
    if kind == "layernorm":
        square -= float(along @ along) + middle**2
    shared = along if kind == "layernorm" else torch.zeros(5)
    expected = [(M[k] - shared) * (1.0 if g is None else float(g[k])) / (square + eps) ** 0.5 for k in rows]
    norm = NormMap.model_validate({"kind": kind, "eps": eps})
    torch.testing.assert_close(normalized(M, linear_moments(M, b), norm, g), torch.stack(expected))


@pytest.mark.parametrize("biased", [False, True])
def test_moments_and_gains_of_float32_weights_are_those_in_float64(biased: bool) -> None:
    W1, W2 = (random(A, N, seed=seed, scale=0.3).float() for seed in (0, 1))
    b1, b2 = ((random(A, seed=seed, scale=0.5).float() if biased else None) for seed in (2, 3))
    given = (W1, b1, W2, b2)
    exact = [None if each is None else each.double() for each in given]
    phi = ACTIVATIONS["silu"]
    for function, count, dtype in (
        (linear_moments, 2, torch.float64), (partial(hidden_moments, phi), 2, torch.float64),
        (partial(hidden_moments, phi), 4, torch.float64), (partial(gated_gains, phi), 4, torch.float32),
    ):  # fmt: skip
        for found, expected in zip(function(*given[:count]), function(*exact[:count]), strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    gains = plain_gains(phi, W1, b1)
    assert gains.dtype == torch.float32
    torch.testing.assert_close(gains.double(), plain_gains(phi, *exact[:2]), rtol=1e-5, atol=1e-6)
