"""The closed forms of the linearization against quadrature, samples, loops and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.integrate import quad
from scipy.special import expit, ndtr
from scipy.stats import norm as gaussian
from torch import Tensor

from sinder_cli import AttentionMap, BlockMap, GatedMlpMap, MemoryTensors, NormMap, PlainMlpMap, WeightRef, Weights
from sinder_cli.backbone.contract import Activation
from sinder_cli.backbone.weights import BlockTensors, read_block
from sinder_cli.defects.gaussian import ACTIVATIONS, gated_gains, plain_gains
from sinder_cli.defects.linearize import attention_part, block_part, mean_hidden_jacobian, mlp_part

N, A, H = 6, 4, 10
ROOT_2_OVER_PI = math.sqrt(2 / math.pi)


def gelu_tanh_derivative(x: float) -> float:
    t = math.tanh(ROOT_2_OVER_PI * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * ROOT_2_OVER_PI * (1 + 3 * 0.044715 * x**2)


def quick_gelu_derivative(x: float) -> float:
    p = float(expit(1.702 * x))
    return p + 1.702 * x * p * (1 - p)


def silu_derivative(x: float) -> float:
    p = float(expit(x))
    return p + x * p * (1 - p)


DERIVATIVES: dict[str, Callable[[float], float]] = {
    "gelu": lambda x: float(ndtr(x) + x * gaussian.pdf(x)),
    "gelu_tanh": gelu_tanh_derivative,
    "quick_gelu": quick_gelu_derivative,
    "silu": silu_derivative,
    "relu": lambda x: float(x > 0),
    "leaky_relu": lambda x: 1.0 if x > 0 else 0.01,
    "tanh": lambda x: 1 - math.tanh(x) ** 2,
    "sigmoid": lambda x: float(expit(x) * (1 - expit(x))),
    "softplus": lambda x: float(expit(x)),
}
KINKED = {"relu", "leaky_relu"}


def mean_derivative(name: str, b: float, s: float) -> float:
    """E[φ'(b + s z)] by adaptive quadrature, told where the kink is."""
    derivative = DERIVATIVES[name]
    kink = min(max(-b / s, -9.9), 9.9)
    value, _ = quad(lambda z: derivative(b + s * z) * gaussian.pdf(z), -10, 10, points=[kink, 0.0], limit=200)
    return float(value)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ref(name: str) -> WeightRef:
    return WeightRef(name=name)


def norm_map(part: str, kind: str, gain: bool = True) -> NormMap:
    return NormMap.model_validate({"kind": kind, "weight": ref(f"{part}.norm.weight") if gain else None})


def made_block(
    norm: str = "layernorm",
    gated: bool = False,
    scaled: bool = True,
    biased: bool = True,
    activation: object = "gelu",
    parallel: bool = False,
) -> BlockTensors:
    """A block with every tensor random, float64."""
    sizes = {
        "attention.norm.weight": (N,), "attention.value": (A, N), "attention.output": (N, A),
        "mlp.norm.weight": (N,), "mlp.up": (H, N), "mlp.down": (N, H),
    }  # fmt: skip
    sizes |= {"mlp.gate": (H, N)} if gated else {}
    sizes |= {"attention.scale": (N,), "mlp.scale": (N,)} if scaled else {}
    sizes |= {"mlp.up_bias": (H,)} if biased else {}
    sizes |= {"mlp.gate_bias": (H,)} if biased and gated else {}
    tensors = {role: random(*shape, seed=seed, scale=0.7) for seed, (role, shape) in enumerate(sizes.items())}

    def held(role: str) -> WeightRef | None:
        return ref(role) if role in tensors else None

    attention = AttentionMap(
        norm=norm_map("attention", norm),
        value=ref("attention.value"),
        output=ref("attention.output"),
        scale=held("attention.scale"),
    )
    shared = {
        "norm": norm_map("mlp", norm), "activation": activation, "up": ref("mlp.up"), "down": ref("mlp.down"),
        "up_bias": held("mlp.up_bias"), "scale": held("mlp.scale"),
    }  # fmt: skip
    mlp = (
        GatedMlpMap(**shared, gate=ref("mlp.gate"), gate_bias=held("mlp.gate_bias")) if gated else PlainMlpMap(**shared)
    )
    return BlockTensors(BlockMap(attention=attention, mlp=mlp, parallel=parallel), tensors)


def mlp_function(block: BlockTensors) -> Callable[[Tensor], Tensor]:
    """`x [M, N]` → the MLP without its norm and scale, `[M, N]`."""
    tensors = block.by_role
    phi = ACTIVATIONS[block.map.mlp.activation]
    zero = torch.zeros(H, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        up = x @ tensors["mlp.up"].T + tensors.get("mlp.up_bias", zero)
        if "mlp.gate" not in tensors:
            return phi(up) @ tensors["mlp.down"].T
        gate = x @ tensors["mlp.gate"].T + tensors.get("mlp.gate_bias", zero)
        return (phi(gate) * up) @ tensors["mlp.down"].T

    return run


def mean_jacobian(block: BlockTensors) -> Tensor:
    return block["mlp.down"] @ mean_hidden_jacobian(block)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_every_named_activation_has_a_function_and_an_oracle_here() -> None:
    assert set(ACTIVATIONS) == set(Activation.__args__) == set(DERIVATIVES)  # type: ignore[attr-defined]


def test_plain_gains_of_the_exact_gelu_follow_its_closed_form() -> None:
    W1 = random(50, N, seed=1) * torch.logspace(-2, 1, 50, dtype=torch.float64)[:, None]
    b1 = random(50, seed=2, scale=2.0)
    s2 = (W1**2).sum(dim=1).numpy()
    b = b1.numpy()
    expected = ndtr(b / np.sqrt(1 + s2)) + b / (1 + s2) * gaussian.pdf(b, scale=np.sqrt(1 + s2))
    np.testing.assert_allclose(plain_gains(ACTIVATIONS["gelu"], W1, b1).numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", sorted(DERIVATIVES))
def test_a_plain_gain_is_the_mean_derivative_of_the_activation(name: str) -> None:
    b = torch.tensor([-3.0, -0.7, 0.0, 0.4, 2.5], dtype=torch.float64)
    W1 = random(5, N, seed=3, scale=0.6)
    expected = [mean_derivative(name, b[k].item(), W1[k].norm().item()) for k in range(5)]
    tolerance = 1e-3 if name in KINKED else 1e-7
    assert plain_gains(ACTIVATIONS[name], W1, b).tolist() == pytest.approx(expected, abs=tolerance)


def test_gains_without_a_bias_are_those_of_a_zero_bias() -> None:
    W1, W2, zero = random(H, N), random(H, N, seed=1), torch.zeros(H, dtype=torch.float64)
    phi = ACTIVATIONS["silu"]
    assert torch.equal(plain_gains(phi, W1, None), plain_gains(phi, W1, zero))
    for left, right in zip(gated_gains(phi, W1, None, W2, None), gated_gains(phi, W1, zero, W2, zero), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("s", [0.0, 1e-12, 1e-6])
def test_a_unit_of_tiny_weights_is_linear_around_its_bias(s: float) -> None:
    b = torch.tensor([-1.0, 0.0, 0.3, 1.0], dtype=torch.float64)
    W1, W2 = torch.full((4, 1), s, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)
    slopes = [DERIVATIVES["gelu"](bias) for bias in b.tolist()]
    assert plain_gains(ACTIVATIONS["gelu"], W1, b).tolist() == pytest.approx(slopes, abs=1e-6)
    alpha, beta = gated_gains(ACTIVATIONS["gelu"], W1, b, W2, 2 * torch.ones_like(b))
    assert (alpha * s).tolist() == pytest.approx([2 * slope * s for slope in slopes], abs=1e-5)
    assert beta.tolist() == pytest.approx(ACTIVATIONS["gelu"](b).tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "quick_gelu", "silu", "tanh", "sigmoid", "softplus"])
def test_gated_gains_are_the_mean_factors_over_both_correlated_projections(name: str) -> None:
    W1, W2 = random(4, N, seed=4, scale=0.4), random(4, N, seed=5, scale=0.5)
    b1, b2 = random(4, seed=6), random(4, seed=7)
    alpha, beta = gated_gains(ACTIVATIONS[name], W1, b1, W2, b2)
    z, weight = hermegauss(100)
    weight = weight / weight.sum()
    derivative = np.vectorize(DERIVATIVES[name])
    for k in range(4):
        # a = b₁ + L₁₁z, c = b₂ + L₂₁z + L₂₂z' with the Cholesky factor L of their covariance
        both = torch.stack([W1[k], W2[k]])
        L = np.linalg.cholesky((both @ both.T).numpy())
        a = b1[k].item() + L[0, 0] * z
        c = b2[k].item() + L[1, 0] * z[:, None] + L[1, 1] * z[None, :]
        mean_alpha = np.einsum("i,j,i,ij->", weight, weight, derivative(a), c)
        phi = ACTIVATIONS[name](torch.from_numpy(a)).numpy()
        assert alpha[k].item() == pytest.approx(mean_alpha, abs=1e-6)
        assert beta[k].item() == pytest.approx((weight * phi).sum(), abs=1e-6)


@pytest.mark.parametrize("s", [0.1, 1.0, 30.0])
def test_relu_gains_are_accurate_to_a_thousandth(s: float) -> None:
    b = torch.linspace(-3 * s, 3 * s, 61, dtype=torch.float64)
    W1 = torch.full((61, 1), s, dtype=torch.float64)
    W2 = torch.full((61, 1), 0.5, dtype=torch.float64)
    u = b.numpy() / s
    phi = ACTIVATIONS["relu"]
    np.testing.assert_allclose(plain_gains(phi, W1, b).numpy(), ndtr(u), atol=1e-3)
    alpha, beta = gated_gains(phi, W1, b, W2, torch.ones_like(b))
    # E[φ'(a)(1 + ρ(a − b))] with ρ = 0.5/s, and the mean of a rectified Gaussian
    np.testing.assert_allclose(alpha.numpy(), ndtr(u) + 0.5 * gaussian.pdf(u), atol=1e-3)
    np.testing.assert_allclose(beta.numpy() / s, u * ndtr(u) + gaussian.pdf(u), atol=1e-3)


@pytest.mark.parametrize("b", [-300.0, -120.0, 0.0, 77.0])
def test_the_gain_of_a_steep_silu_is_accurate(b: float) -> None:
    W1 = torch.full((1, 1), 100.0, dtype=torch.float64)
    found = plain_gains(ACTIVATIONS["silu"], W1, torch.tensor([b], dtype=torch.float64)).item()
    assert found == pytest.approx(mean_derivative("silu", b, 100.0), abs=1e-3)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "biases"])
def test_the_mean_jacobian_is_the_mean_of_autograds_jacobians(gated: bool, biased: bool) -> None:
    block = made_block(gated=gated, biased=biased, activation="silu" if gated else "gelu")
    run = mlp_function(block)
    x = random(10_000, N, seed=20)
    x = torch.cat([x, -x])  # odd errors cancel

    def jacobian(point: Tensor) -> Tensor:
        return torch.func.jacrev(lambda p: run(p[None])[0])(point)

    sampled = torch.func.vmap(jacobian, chunk_size=20_000)(x).mean(dim=0)
    assert relative_error(mean_jacobian(block), sampled) < 0.03


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "biases"])
def test_the_papers_sampled_solution_approaches_the_closed_form(gated: bool, biased: bool) -> None:
    block = made_block(gated=gated, biased=biased, activation="silu" if gated else "gelu")
    run, exact = mlp_function(block), mean_jacobian(block)

    def error(samples: int) -> float:
        errors = []
        for repetition in range(6):
            x = random(samples, N, seed=100 + repetition)
            solution = torch.linalg.lstsq(x, run(x)).solution.T  # y ≈ J x
            errors.append(relative_error(solution, exact) ** 2)
        return math.sqrt(sum(errors) / len(errors))

    few, many = error(2_000), error(32_000)
    assert many < 0.03
    assert 3.0 < few / many < 5.3  # √16 = 4


def looped_part(outer: Tensor, inner: Tensor, gain: Tensor, norm: str, gamma: Tensor | None) -> Tensor:
    """diag(γ) · outer · inner · diag(g) · P, entry by entry."""
    total = torch.zeros(N, N, dtype=torch.float64)
    for i in range(N):
        for j in range(N):
            for k in range(N):
                centring = (1.0 if k == j else 0.0) - (1.0 / N if norm == "layernorm" else 0.0)
                for a in range(outer.shape[1]):
                    total[i, j] += outer[i, a] * inner[a, k] * gain[k] * centring
            if gamma is not None:
                total[i, j] *= gamma[i]
    return total


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("scaled", [False, True], ids=["no LayerScale", "LayerScale"])
def test_the_attention_part_is_the_explicit_product(norm: str, scaled: bool) -> None:
    block = made_block(norm, scaled=scaled)
    expected = looped_part(
        block["attention.output"],
        block["attention.value"],
        block["attention.norm.weight"],
        norm,
        block.get("attention.scale"),
    )
    torch.testing.assert_close(attention_part(block), expected)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("scaled", [False, True], ids=["no LayerScale", "LayerScale"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_mlp_part_is_the_product_around_the_mean_jacobian(norm: str, scaled: bool, gated: bool) -> None:
    block = made_block(norm, gated, scaled)
    hidden = mean_hidden_jacobian(block)
    expected = looped_part(block["mlp.down"], hidden, block["mlp.norm.weight"], norm, block.get("mlp.scale"))
    torch.testing.assert_close(mlp_part(block), expected)


def test_a_norm_without_a_gain_has_a_gain_of_one() -> None:
    block = made_block()
    gainless = block.map.attention.model_copy(update={"norm": norm_map("attention", "layernorm", gain=False)})
    without = BlockTensors(
        block.map.model_copy(update={"attention": gainless}),
        {role: tensor for role, tensor in block.by_role.items() if role != "attention.norm.weight"},
    )
    ones = BlockTensors(block.map, block.by_role | {"attention.norm.weight": torch.ones(N, dtype=torch.float64)})
    torch.testing.assert_close(attention_part(without), attention_part(ones))


def test_the_parts_leave_the_tensors_of_the_block_alone() -> None:
    block = made_block(gated=True)
    before = {role: tensor.clone() for role, tensor in block.by_role.items()}
    attention_part(block)
    mlp_part(block)
    assert all(torch.equal(block[role], tensor) for role, tensor in before.items())


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_a_linear_block_has_autograds_jacobian(norm: str, parallel: bool) -> None:
    block = made_block(norm, activation=lambda x: 1.5 * x, parallel=parallel)
    t = block.by_role

    def normed(x: Tensor, part: str) -> Tensor:  # without the per-token scale, which the linearization drops
        return t[f"{part}.norm.weight"] * (x - x.mean() if norm == "layernorm" else x)

    def attention(x: Tensor) -> Tensor:
        return t["attention.scale"] * (t["attention.output"] @ (t["attention.value"] @ normed(x, "attention")))

    def mlp(x: Tensor) -> Tensor:
        return t["mlp.scale"] * (t["mlp.down"] @ (1.5 * (t["mlp.up"] @ normed(x, "mlp") + t["mlp.up_bias"])))

    def run(x: Tensor) -> Tensor:
        if parallel:
            return x + attention(x) + mlp(x)
        x = x + attention(x)
        return x + mlp(x)

    expected = torch.autograd.functional.jacobian(run, random(N, seed=30))
    torch.testing.assert_close(block_part(attention_part(block), mlp_part(block), parallel), expected)


def test_fused_and_split_projections_give_the_same_parts() -> None:
    block = made_block(gated=True)
    tensors = dict(block.by_role)
    queries_and_keys = random(2 * A, N, seed=40)
    fused = {role: tensor for role, tensor in tensors.items() if role not in ("attention.value", "mlp.gate", "mlp.up")}
    fused["qkv"] = torch.cat([queries_and_keys, tensors["attention.value"]])
    fused["w12"] = torch.cat([tensors["mlp.gate"], tensors["mlp.up"]])
    attention = block.map.attention.model_copy(update={"value": WeightRef(name="qkv", rows=(2 * A, 3 * A))})
    gate, up = WeightRef(name="w12", rows=(0, H)), WeightRef(name="w12", rows=(H, 2 * H))
    mlp = block.map.mlp.model_copy(update={"gate": gate, "up": up})
    fused_map = block.map.model_copy(update={"attention": attention, "mlp": mlp})

    split_block = read_block(Weights.of(MemoryTensors("split", tensors)), block.map, torch.float64)
    fused_block = read_block(Weights.of(MemoryTensors("fused", fused)), fused_map, torch.float64)
    assert torch.equal(attention_part(split_block), attention_part(fused_block))
    assert torch.equal(mlp_part(split_block), mlp_part(fused_block))


def test_a_block_is_read_as_float32_without_queries_and_keys() -> None:
    block = made_block()
    attention = block.map.attention.model_copy(update={"query": ref("absent.query"), "key_bias": ref("absent.key")})
    tensors = {role: tensor.half() for role, tensor in block.by_role.items()}
    read = read_block(Weights.of(MemoryTensors("half", tensors)), block.map.model_copy(update={"attention": attention}))
    assert {tensor.dtype for tensor in read.by_role.values()} == {torch.float32}
    assert set(read.by_role) == set(block.by_role)
