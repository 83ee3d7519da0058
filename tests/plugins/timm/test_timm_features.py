"""The features are timm's own, and each block is what its layer map says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm_samples import made
from torch import Tensor, nn

from sinder_cli import AttentionMap, Backbone, BlockMap, GatedMlpMap, NormMap, UnavailableError, UsageError, WeightRef
from sinder_cli.backbone.device import AttentionName
from sinder_cli.backbone.opening import load_module
from sinder_cli.defects.gaussian import ACTIVATIONS

Describe = Callable[..., Backbone]
Stored = Callable[[str], Path]

TOLERANCE = 1e-5


def images(backbone: Backbone, rows: int, columns: int, count: int = 2) -> Tensor:
    P = backbone.patch_size
    return torch.randn(count, 3, rows * P, columns * P, generator=torch.Generator().manual_seed(1))


def hidden_states(backbone: Backbone, batch: Tensor) -> list[Tensor]:
    """The residual stream `[B, T, N]` before, between and after the blocks, and last the normalized tokens."""
    module = load_module(backbone)
    x, context = backbone.embed(module, batch)
    states = [x]
    for index in range(backbone.depth):
        states.append(backbone.run_block(module, index, states[-1], context))
    return [*states, backbone.finish(module, states[-1])]


def timm_states(path: Path, kind: str, batch: Tensor, **options: Any) -> list[Tensor]:
    """The same as timm's own `forward_features` goes through them."""
    module = timm.create_model(f"small_{kind}", num_classes=0, **options).eval()
    module.load_state_dict(load_file(path), strict=True)
    states: list[Tensor] = []
    module.blocks[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    for block in module.blocks:
        block.register_forward_hook(lambda _, __, output: states.append(output))
    with torch.no_grad():
        normalized = module.forward_features(batch)
    return [*states, normalized]


def relative_error(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape
    return ((x - y).norm() / y.norm()).item()


def test_every_hidden_state_equals_that_of_timm_at_native_size(kind: str, describe: Describe, stored: Stored) -> None:
    backbone = describe(kind)
    batch = images(backbone, 5, 5)
    ours, theirs = hidden_states(backbone, batch), timm_states(stored(kind), kind, batch)
    assert len(ours) == backbone.depth + 2
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine, other) <= TOLERANCE


def test_every_hidden_state_equals_that_of_timm_at_another_size(kind: str, describe: Describe, stored: Stored) -> None:
    backbone = describe(kind)
    batch = images(backbone, 7, 4)
    ours, theirs = hidden_states(backbone, batch), timm_states(stored(kind), kind, batch, dynamic_img_size=True)
    assert ours[0].shape[1] == backbone.prefix_tokens + 28
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine, other) <= TOLERANCE


def test_the_last_tokens_are_those_of_timms_own_intermediates(describe: Describe, stored: Stored) -> None:
    backbone = describe("registers")
    batch = images(backbone, 5, 5)
    module = timm.create_model("small_registers", num_classes=0).eval()
    module.load_state_dict(load_file(stored("registers")))
    patches, prefix = module.forward_intermediates(
        batch, 1, norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )[0]
    assert relative_error(hidden_states(backbone, batch)[-1], torch.cat([prefix, patches], dim=1)) <= TOLERANCE


def test_an_image_that_breaks_a_patch_is_refused(describe: Describe) -> None:
    backbone = describe("plain")
    with pytest.raises(UnavailableError, match="80 × 81 px"):
        backbone.embed(load_module(backbone), torch.zeros(1, 3, 80, 81))


@pytest.mark.parametrize(("attention", "fused"), [("auto", True), ("sdpa", True), ("eager", False)])
@pytest.mark.parametrize("kind", ["plain", "scaling", "dinov3"])
def test_an_attention_kernel_may_be_chosen(
    kind: str, describe: Describe, attention: AttentionName, fused: bool
) -> None:
    backbone = describe(kind, attention=attention)
    switches = [part.fused_attn for part in backbone.build().modules() if hasattr(part, "fused_attn")]
    assert switches == [fused] * backbone.depth
    batch = images(backbone, 5, 5)
    assert relative_error(hidden_states(backbone, batch)[-1], hidden_states(describe(kind), batch)[-1]) <= TOLERANCE


def test_xformers_is_refused_since_timm_does_not_know_it(describe: Describe) -> None:
    with pytest.raises(UsageError, match=r"cannot use xformers attention with timm.*--attention sdpa"):
        describe("plain", attention="xformers")


class BlockByMap:
    """One block computed from nothing but its layer map and the file: slow, and without timm's modules."""

    def __init__(self, backbone: Backbone, index: int) -> None:
        self.weights, self.map = backbone.weights, backbone.layers.blocks[index]

    def tensor(self, ref: WeightRef | None, absent: float = 0.0) -> Tensor:
        if ref is None:
            return torch.tensor(absent, dtype=torch.float64)
        stored = self.weights.read([ref.name])[ref.name].double()
        return stored if ref.rows is None else stored[slice(*ref.rows)]

    def normalized(self, x: Tensor, norm: NormMap | None) -> Tensor:
        if norm is None:
            return x
        centred = x - x.mean(dim=-1, keepdim=True) if norm.kind == "layernorm" else x
        scale = (centred.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt()
        return self.tensor(norm.weight, 1.0) * centred * scale + self.tensor(norm.bias)

    def attention(self, m: AttentionMap, x: Tensor) -> Tensor:
        x = self.normalized(x, m.norm)
        value = x @ self.tensor(m.value).T + self.tensor(m.value_bias)
        mixed = self.mixed(m, x, value)
        inner = self.normalized(mixed, m.inner_norm) @ self.tensor(m.output).T + self.tensor(m.output_bias)
        return self.tensor(m.scale, 1.0) * inner

    def mixed(self, m: AttentionMap, x: Tensor, value: Tensor) -> Tensor:
        if x.shape[1] == 1:  # a single token attends to itself
            return value
        assert m.heads is not None
        assert m.query is not None
        assert m.key is not None
        q = (x @ self.tensor(m.query).T + self.tensor(m.query_bias)).chunk(m.heads, dim=-1)
        k = (x @ self.tensor(m.key).T + self.tensor(m.key_bias)).chunk(m.heads, dim=-1)
        v = value.chunk(m.heads, dim=-1)
        scores = [(q[h] @ k[h].mT / q[h].shape[-1] ** 0.5).softmax(dim=-1) for h in range(m.heads)]
        return torch.cat([score @ v[h] for h, score in enumerate(scores)], dim=-1)

    def mlp(self, m: Any, x: Tensor) -> Tensor:
        x = self.normalized(x, m.norm)
        phi = ACTIVATIONS[m.activation] if isinstance(m.activation, str) else m.activation
        hidden = x @ self.tensor(m.up).T + self.tensor(m.up_bias)
        if isinstance(m, GatedMlpMap):
            hidden = phi(x @ self.tensor(m.gate).T + self.tensor(m.gate_bias)) * hidden
        else:
            hidden = phi(hidden)
        down = self.normalized(hidden, m.inner_norm) @ self.tensor(m.down).T + self.tensor(m.down_bias)
        return self.tensor(m.scale, 1.0) * down

    def __call__(self, x: Tensor) -> Tensor:
        branches: tuple[BlockMap, ...] = self.map.branches
        attended = x + sum(self.attention(branch.attention, x) for branch in branches)
        return attended + sum(self.mlp(branch.mlp, x if self.map.parallel else attended) for branch in branches)


def test_a_one_token_block_is_what_the_map_says(kind: str, describe: Describe) -> None:
    backbone = describe(kind)
    module: Any = load_module(backbone)
    x = torch.randn(2, 1, backbone.width, generator=torch.Generator().manual_seed(2))
    for index in range(backbone.depth):  # without the rotation that a query and key may get
        wanted = BlockByMap(backbone, index)(x.double())
        assert relative_error(module.blocks[index](x).double(), wanted) <= TOLERANCE


@pytest.mark.parametrize("kind", ["plain", "no_bias", "things", "scaling_mlp_bias", "beit3", "eva", "eva02_clip"])
def test_queries_keys_and_heads_are_what_the_layer_map_says(kind: str, describe: Describe) -> None:
    backbone = describe(kind)
    block: Any = load_module(backbone)
    block = block.blocks[0]
    x = torch.randn(2, 6, backbone.width, generator=torch.Generator().manual_seed(2))
    for part in ("q_norm", "k_norm"):  # which no layer map tells, since they only steer
        if hasattr(block, part):
            setattr(block, part, nn.Identity())
    assert relative_error(block(x).double(), BlockByMap(backbone, 0)(x.double())) <= TOLERANCE


def test_the_map_names_stem_positions_and_final_norm(describe: Describe) -> None:
    layers = describe("clip").layers
    assert layers.stem is not None
    assert layers.stem.norm is not None
    assert layers.norm is not None
    assert (layers.stem.patch.name, layers.stem.patch_bias) == ("patch_embed.proj.weight", None)
    assert (str(layers.stem.cls), layers.stem.registers) == ("cls_token", None)
    assert (str(layers.stem.norm.weight), str(layers.norm.weight)) == ("norm_pre.weight", "norm.weight")
    registers = describe("registers").layers.stem
    assert registers is not None
    assert str(registers.registers) == "reg_token"


def test_a_stem_that_a_map_cannot_say_is_left_out(describe: Describe) -> None:
    assert describe("swiglu").layers.stem is None  # a norm in front of the positions
    assert describe("distilled").layers.stem is None  # a second class token


@pytest.mark.parametrize(
    ("kind", "prefix", "has_cls", "rows"),
    [("plain", 1, True, 1), ("no_cls", 0, False, 0), ("distilled", 2, True, 2), ("registers", 5, True, 0)],
)
def test_prefix_tokens_and_their_rows_of_positions_are_counted(
    describe: Describe, kind: str, prefix: int, has_cls: bool, rows: int
) -> None:
    backbone = describe(kind)
    assert (backbone.prefix_tokens, backbone.has_cls) == (prefix, has_cls)
    assert backbone.layers.position is not None
    assert backbone.layers.position.prefix == rows


@pytest.mark.parametrize("kind", ["no_positions", "dinov3"])
def test_a_model_without_learned_positions_has_no_map_of_them(describe: Describe, kind: str) -> None:
    assert describe(kind).layers.position is None


def test_the_norm_behind_a_pool_is_no_final_norm(describe: Describe) -> None:
    backbone = describe("no_cls")
    assert backbone.layers.norm is None
    assert "fc_norm.weight" in backbone.weights
    assert "attn_pool.latent" in describe("pooled").weights


def test_normalization_and_size_are_those_of_timms_own_configuration(describe: Describe) -> None:
    backbone = describe("clip")
    cfg = made("small_clip").pretrained_cfg
    assert (backbone.mean, backbone.std) == (cfg["mean"], cfg["std"])
    assert backbone.mean != describe("plain").mean
    assert (backbone.image_size, backbone.patch_size) == (80, 16)
