"""The features are those of two independent twins: transformers' DINOv2, and the block as the layer map tells it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sinder_plugins.dinov2.config import OFFICIAL, Config
from sinder_plugins.dinov2.module import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu

import sinder_cli
from sinder_cli import Backbone, BlockMap, GatedMlpMap, UnavailableError, WeightRef, attention_kernel
from sinder_cli.backbone.device import AttentionName
from sinder_cli.backbone.opening import load_module

Describe = Callable[..., Backbone]
Draw = Callable[[Config], dict[str, Tensor]]

TOLERANCE = 1e-5


def images(rows: int, columns: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, 14 * rows, 14 * columns, generator=torch.Generator().manual_seed(1))


def hidden_states(backbone: Backbone, batch: Tensor) -> list[Tensor]:
    """The residual stream `[B, T, N]` before, between and after the blocks, and last the normalized tokens."""
    module = load_module(backbone)
    x, context = backbone.embed(module, batch)
    states = [x]
    for index in range(backbone.depth):
        states.append(backbone.run_block(module, index, states[-1], context))
    return [*states, backbone.finish(module, states[-1])]


def relative_error(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape
    return ((x - y).norm() / y.norm()).item()


def transformers_states(config: Config, tensors: dict[str, Tensor], batch: Tensor) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import (
            Dinov2Config,
            Dinov2Model,
            Dinov2WithRegistersConfig,
            Dinov2WithRegistersModel,
        )
    options: dict[str, Any] = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.width // 64,
        "mlp_ratio": 4,
        "patch_size": config.patch,
        "image_size": config.grid * config.patch,
        "use_swiglu_ffn": config.mlp == "SwiGLU",
    }
    model: nn.Module
    if config.registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=config.registers, **options))
    else:
        model = Dinov2Model(Dinov2Config(**options))
    model.load_state_dict(transformers_tensors(tensors), strict=True)
    with torch.no_grad():
        output = model.eval()(batch, output_hidden_states=True)
    return [*output.hidden_states, output.last_hidden_state]


def transformers_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors under the names of transformers, fused ones split."""
    renamed = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "register_tokens": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    parts = {
        "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attn.proj": ("attention.o_proj",),
        "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.w3": ("mlp.down_proj",),
    }
    converted = {}
    for name, tensor in tensors.items():
        if name in renamed:
            converted[renamed[name]] = tensor
            continue
        _, index, rest = name.split(".", 2)
        layer, kind = rest.rsplit(".", 1)
        if layer in {"ls1", "ls2"}:
            converted[f"encoder.layer.{index}.layer_scale{layer[-1]}.lambda1"] = tensor
            continue
        targets = parts.get(layer, (layer,))
        for target, part in zip(targets, tensor.chunk(len(targets)), strict=True):
            converted[f"encoder.layer.{index}.{target}.{kind}"] = part
    return converted


def test_every_hidden_state_equals_that_of_transformers_at_native_size(
    config: Config, describe: Describe, drawn: Draw
) -> None:
    tensors, batch = drawn(config), images(5, 5)
    ours, theirs = hidden_states(describe(tensors), batch), transformers_states(config, tensors, batch)
    assert len(ours) == len(theirs) == config.depth + 2
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine, other) <= TOLERANCE


@pytest.mark.parametrize(("rows", "columns"), [(7, 4), (3, 9), (1, 25)])
def test_register_models_equal_transformers_at_other_sizes(
    describe: Describe, drawn: Draw, rows: int, columns: int
) -> None:
    config = Config(width=128, depth=2, hidden=512, grid=5, registers=4)
    tensors, batch = drawn(config), images(rows, columns)
    ours, theirs = hidden_states(describe(tensors), batch), transformers_states(config, tensors, batch)
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine, other) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_an_official_model_in_full_size_equals_that_of_transformers(name: str, describe: Describe, drawn: Draw) -> None:
    config = OFFICIAL[name]
    tensors, batch = drawn(config), images(37, 37, count=1)
    ours, theirs = hidden_states(describe(tensors, name), batch), transformers_states(config, tensors, batch)
    assert len(ours) == config.depth + 2
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine, other) <= TOLERANCE


def cubic(t: float) -> float:
    """Keys' cubic convolution kernel with a = −0.75, PyTorch's."""
    a, t = -0.75, abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def cubic_matrix(size: int, grid: int) -> Tensor:
    """Row i samples position i of an interpolation by the official factor (size + 0.1) / grid: `[size, grid]`."""
    matrix = torch.zeros(size, grid, dtype=torch.float64)
    for i in range(size):
        place = (i + 0.5) * grid / (size + 0.1) - 0.5
        first = int(place // 1) - 1
        for j in range(first, first + 4):
            matrix[i, min(max(j, 0), grid - 1)] += cubic(place - j)
    return matrix


@pytest.mark.parametrize(("rows", "columns"), [(7, 4), (3, 9), (1, 25), (6, 6)])
def test_a_plain_model_resizes_its_positions_by_the_official_factor(
    tensors: dict[str, Tensor], describe: Describe, rows: int, columns: int
) -> None:
    cls, plane = tensors["pos_embed"][0, 0].double(), tensors["pos_embed"][0, 1:].unflatten(0, (5, 5)).double()
    resized = torch.einsum("ri,cj,ijn->rcn", cubic_matrix(rows, 5), cubic_matrix(columns, 5), plane)

    tokens = hidden_states(describe(tensors), images(rows, columns))[0]
    unplaced = hidden_states(describe(tensors | {"pos_embed": torch.zeros(1, 26, 128)}), images(rows, columns))[0]

    wanted = torch.cat([cls[None], resized.flatten(0, 1)]).expand(2, -1, -1)
    assert relative_error((tokens - unplaced).double(), wanted) <= TOLERANCE


def test_at_the_native_grid_stored_positions_are_used_as_is(config: Config, describe: Describe, drawn: Draw) -> None:
    module = load_module(describe(drawn(config)))
    assert isinstance(module, VisionTransformer)
    assert torch.equal(module.position(5, 5), drawn(config)["pos_embed"])


def test_positions_of_a_half_precision_module_are_resized_in_float32(
    config: Config, describe: Describe, drawn: Draw
) -> None:
    rounded = {name: tensor.half() for name, tensor in drawn(config).items()}
    single, half = load_module(describe(rounded)), load_module(describe(rounded)).half()
    assert isinstance(single, VisionTransformer)
    assert isinstance(half, VisionTransformer)
    assert torch.equal(half.position(7, 4), single.position(7, 4).half())


def test_an_image_that_breaks_a_patch_is_refused(tensors: dict[str, Tensor], describe: Describe) -> None:
    backbone = describe(tensors)
    with pytest.raises(UnavailableError, match="70 × 71 px"):
        backbone.embed(load_module(backbone), torch.zeros(1, 3, 70, 71))


def test_calling_the_module_runs_its_steps_in_turn(config: Config, describe: Describe, drawn: Draw) -> None:
    backbone, batch = describe(drawn(config)), images(4, 6)
    assert torch.equal(load_module(backbone)(batch), hidden_states(backbone, batch)[-1])


class BlockByMap:
    """One block computed head by head from nothing but its layer map: slow, and without the module."""

    def __init__(self, backbone: Backbone, index: int, heads: int) -> None:
        self.weights, self.map, self.heads = backbone.weights, backbone.layers.blocks[index], heads

    def tensor(self, ref: WeightRef | None) -> Tensor:
        if ref is None:
            return torch.zeros(())
        stored = self.weights.read([ref.name])[ref.name].double()
        return stored if ref.rows is None else stored[slice(*ref.rows)]

    def linear(self, x: Tensor, weight: WeightRef | None, bias: WeightRef | None) -> Tensor:
        return x @ self.tensor(weight).T + self.tensor(bias)

    def scaled(self, y: Tensor, scale: WeightRef | None) -> Tensor:
        return y if scale is None else self.tensor(scale) * y

    def normalized(self, x: Tensor, block: BlockMap, part: str) -> Tensor:
        norm = getattr(block, part).norm
        return layer_norm(x, x.shape[-1:], self.tensor(norm.weight), self.tensor(norm.bias), eps=1e-6)

    def attention(self, x: Tensor) -> Tensor:
        m = self.map.attention
        q, k, v = (
            self.linear(x, weight, bias).chunk(self.heads, dim=-1)
            for weight, bias in ((m.query, m.query_bias), (m.key, m.key_bias), (m.value, m.value_bias))
        )
        mixed = [
            (q[h] @ k[h].transpose(-2, -1) / q[h].shape[-1] ** 0.5).softmax(dim=-1) @ v[h] for h in range(self.heads)
        ]
        return self.scaled(self.linear(torch.cat(mixed, dim=-1), m.output, m.output_bias), m.scale)

    def mlp(self, x: Tensor) -> Tensor:
        m = self.map.mlp
        up = self.linear(x, m.up, m.up_bias)
        if isinstance(m, GatedMlpMap):
            assert m.activation == "silu"
            hidden = silu(self.linear(x, m.gate, m.gate_bias)) * up
        else:
            assert m.activation == "gelu"
            hidden = gelu(up)
        return self.scaled(self.linear(hidden, m.down, m.down_bias), m.scale)

    def __call__(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.normalized(x, self.map, "attention"))
        return x + self.mlp(self.normalized(x, self.map, "mlp"))


@pytest.mark.parametrize("heads", [2, 4])
def test_a_block_is_what_the_layer_map_says(config: Config, describe: Describe, drawn: Draw, heads: int) -> None:
    backbone = describe(drawn(config), heads=heads)
    states = hidden_states(backbone, images(3, 4))
    for index in range(backbone.depth):
        wanted = BlockByMap(backbone, index, heads)(states[index].double())
        assert relative_error(states[index + 1].double(), wanted) <= TOLERANCE


def test_the_epsilon_of_the_norms_shows_on_faint_tokens(config: Config, describe: Describe, drawn: Draw) -> None:
    backbone = describe(drawn(config))
    module, faint = load_module(backbone), 1e-3 * torch.randn(1, 9, 128, generator=torch.Generator().manual_seed(2))
    wanted = BlockByMap(backbone, 0, heads=2)(faint.double())
    assert relative_error(backbone.run_block(module, 0, faint, None).double(), wanted) <= TOLERANCE
    scale, shift = (backbone.weights.read([f"norm.{part}"])[f"norm.{part}"] for part in ("weight", "bias"))
    normed = layer_norm(faint, (128,), scale, shift, eps=1e-6)
    assert relative_error(backbone.finish(module, faint), normed) <= TOLERANCE


@pytest.mark.parametrize("part", ["layer_scale", "qkv_bias", "proj_bias", "mlp_bias"])
def test_a_block_without_a_part_is_what_the_map_says(
    config: Config, describe: Describe, drawn: Draw, part: str
) -> None:
    backbone = describe(drawn(replace(config, **{part: False})))
    states = hidden_states(backbone, images(3, 4))
    wanted = BlockByMap(backbone, 0, heads=2)(states[0].double())
    assert relative_error(states[1].double(), wanted) <= TOLERANCE


def test_the_position_map_has_one_row_before_the_patches(config: Config, describe: Describe, drawn: Draw) -> None:
    backbone = describe(drawn(config))
    assert backbone.layers.position is not None
    assert (backbone.layers.position.weight.name, backbone.layers.position.prefix) == ("pos_embed", 1)
    assert backbone.prefix_tokens == 1 + config.registers


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_attention_kernel_may_be_chosen(
    tensors: dict[str, Tensor], describe: Describe, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    chosen: list[str] = []

    def recorded(name: AttentionName) -> Any:
        chosen.append(name)
        return attention_kernel(name)

    monkeypatch.setattr(sinder_cli, "attention_kernel", recorded)
    ours = hidden_states(describe(tensors, attention=attention), images(3, 4))
    monkeypatch.undo()
    assert chosen == [attention]
    for mine, other in zip(ours, hidden_states(describe(tensors), images(3, 4)), strict=True):
        assert relative_error(mine, other) <= TOLERANCE
