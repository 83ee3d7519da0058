"""Checkpoints that the paper's own code saves: with a loose key, and with factors in the place of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sinder_plugins.dinov2.checkpoints import without_leftovers
from sinder_plugins.dinov2.config import OFFICIAL, Config, tensor_shapes
from torch import Tensor

from sinder_cli import Backbone, BadInputError, MemoryTensors, Weights
from sinder_cli.backbone.opening import load_module
from sinder_cli.events import Noted

Describe = Callable[..., Backbone]
Draw = Callable[[Config], dict[str, Tensor]]
LINEAR = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "mlp.fc1", "mlp.fc2")


@pytest.fixture
def gated(drawn: Draw) -> dict[str, Tensor]:
    """A small model built as the ViT-g is: SwiGLU, no registers."""
    return drawn(Config(width=128, depth=3, hidden=344, mlp="SwiGLU", grid=5))


def released(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the file that the authors released."""
    return tensors | {"reg_token": torch.zeros(1, 0, tensors["norm.bias"].shape[0])}


def training(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a state dict that is saved before the factors are multiplied: bias first, ε not 0."""
    generator = torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if not layer.endswith(LINEAR) or kind == "bias":
            state.setdefault(name, tensor)
            continue
        state[f"{layer}.bias"] = tensors[f"{layer}.bias"]
        parts = zip(("_q", "_k", "_v"), tensor.chunk(3), strict=True) if layer.endswith("qkv") else [("", tensor)]
        for suffix, part in parts:
            u, s, vt = torch.linalg.svd(part, full_matrices=False)
            epsilon = torch.randn(s.shape, generator=generator) * 0.1
            factors = {"U": u, "S": s - epsilon, "Vt": vt, "epsilon": epsilon}
            state |= {f"{layer}.{factor}{suffix}": value for factor, value in factors.items()}
    return state


def test_the_released_layout_loads_without_its_loose_key(
    tmp_path: Path, describe: Describe, gated: dict[str, Tensor]
) -> None:
    torch.save(released(gated), tmp_path / "sinder.pth")
    events: list[object] = []
    backbone = describe(tmp_path / "sinder.pth", emit=events.append)
    assert backbone.weights.names == list(gated)
    assert backbone.weights.ignored == ("reg_token",)
    assert [event.text for event in events if isinstance(event, Noted)] == [
        f"{tmp_path / 'sinder.pth'}: matched {len(gated)} tensors, 1 outside it ignored (reg_token)"
    ]
    loaded = load_module(backbone).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in gated.items())


def test_it_fits_its_official_name(describe: Describe) -> None:
    shapes = tensor_shapes(OFFICIAL["dinov2_vitg14"]) | {"reg_token": (1, 4, 1536)}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert describe(tensors, model="dinov2_vitg14").depth == 40


@pytest.mark.parametrize("wrapper", [None, "model"])
def test_factors_are_multiplied(
    tmp_path: Path, describe: Describe, gated: dict[str, Tensor], wrapper: str | None
) -> None:
    state = released(training(gated))
    assert "blocks.2.mlp.w3.weight" not in state
    torch.save({wrapper: state} if wrapper else state, tmp_path / "training.pth")
    backbone = describe(tmp_path / "training.pth")
    assert backbone.weights.names == list(gated)
    assert [backbone.weights.output_name(name) for name in gated] == list(gated)
    assert {name: backbone.weights.shape(name) for name in gated} == {name: tuple(t.shape) for name, t in gated.items()}
    loaded = load_module(backbone).state_dict()
    for name, tensor in gated.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=1e-5)
        if not name.endswith("weight") or "norm" in name or name.startswith("patch"):
            assert torch.equal(loaded[name], tensor)


def test_the_product_is_that_of_the_definition(gated: dict[str, Tensor]) -> None:
    state = training(gated)
    weights = without_leftovers(Weights.of(MemoryTensors("memory", state)))
    at = "blocks.1.attn.qkv"
    expected = torch.cat(
        [
            state[f"{at}.U_{part}"]
            @ torch.diag(state[f"{at}.S_{part}"] + state[f"{at}.epsilon_{part}"])
            @ state[f"{at}.Vt_{part}"]
            for part in "qkv"
        ]
    )
    torch.testing.assert_close(weights.read([f"{at}.weight"])[f"{at}.weight"], expected, rtol=0, atol=1e-6)


def test_plain_models_have_factors_too(describe: Describe, tensors: dict[str, Tensor]) -> None:
    loaded = load_module(describe(training(tensors))).state_dict()
    torch.testing.assert_close(loaded["blocks.0.mlp.fc1.weight"], tensors["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("lost", ["mlp.w3.epsilon", "attn.qkv.Vt_k", "attn.proj.U"])
def test_a_factor_that_is_missing_is_named(describe: Describe, gated: dict[str, Tensor], lost: str) -> None:
    state = training(gated)
    del state[f"blocks.1.{lost}"]
    layer = f"blocks.1.{lost.rpartition('.')[0]}"
    with pytest.raises(BadInputError, match=rf"it lacks factors of {layer}\.weight: blocks\.1\.{lost}"):
        describe(state)


def test_factors_that_do_not_fit_are_named(describe: Describe, gated: dict[str, Tensor]) -> None:
    state = training(gated)
    state["blocks.0.attn.proj.S"] = torch.zeros(7)
    with pytest.raises(BadInputError, match=r"the factors of blocks\.0\.attn\.proj\.weight do not fit"):
        describe(state)


@pytest.mark.parametrize("name", ["blocks.0.attn.reg_token", "singular_defects.0", "tail.weight"])
def test_every_other_key_is_refused_as_ever(describe: Describe, gated: dict[str, Tensor], name: str) -> None:
    with pytest.raises(BadInputError, match=f"1 unexpected: {name}"):
        describe(released(gated) | {name: torch.zeros(3)})
