"""What the plugin offers: names, parameter counts, tensor names, and no torch before it is needed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sinder_plugins.dinov2 import official_url
from sinder_plugins.dinov2.config import OFFICIAL, Config, parameter_count, tensor_shapes
from sinder_plugins.dinov2.module import VisionTransformer

from sinder_cli import ModelRequest, UsageError, api, attention_kernel


def built(config: Config, heads: int = 2) -> VisionTransformer:
    with torch.device("meta"):
        return VisionTransformer(config, heads, attention_kernel())


def stored_shapes(module: VisionTransformer) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()]


def test_the_listing_names_the_eight_official_models_and_the_custom(hooks: Any) -> None:
    sizes = ["dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14"]
    names = [listing.name for listing in hooks.sinder_listing()]
    assert names == [*sizes, *(f"{size}_reg" for size in sizes), "dinov2_custom"]


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_listed_parameter_count_is_that_of_the_built_module(hooks: Any, name: str) -> None:
    listing = next(listing for listing in hooks.sinder_listing() if listing.name == name)
    module = built(OFFICIAL[name])
    assert listing.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert listing.patch_size == 14
    assert listing.prefix_tokens == (5 if name.endswith("_reg") else 1)


def test_parameter_counts_are_the_published_ones() -> None:
    millions = {
        name: round(parameter_count(config) / 1e6, 2) for name, config in OFFICIAL.items() if "_reg" not in name
    }
    assert millions == {
        "dinov2_vits14": 22.06,
        "dinov2_vitb14": 86.58,
        "dinov2_vitl14": 304.37,
        "dinov2_vitg14": 1136.48,
    }


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_plain_data_of_a_model_is_its_state_dict(name: str) -> None:
    assert list(tensor_shapes(OFFICIAL[name]).items()) == stored_shapes(built(OFFICIAL[name]))


@pytest.mark.parametrize("part", ["layer_scale", "qkv_bias", "proj_bias", "mlp_bias", "mask_token"])
def test_plain_data_and_module_agree_where_a_part_is_absent(config: Config, part: str) -> None:
    without = replace(config, **{part: False})
    assert list(tensor_shapes(without).items()) == stored_shapes(built(without))
    assert len(tensor_shapes(without)) < len(tensor_shapes(config))


def test_the_names_are_the_official_ones_in_the_official_order() -> None:
    config = Config(width=64, depth=1, hidden=176, mlp="SwiGLU", registers=4, grid=2)
    assert list(tensor_shapes(config)) == [
        "cls_token",
        "pos_embed",
        "register_tokens",
        "mask_token",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "blocks.0.norm1.weight",
        "blocks.0.norm1.bias",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.qkv.bias",
        "blocks.0.attn.proj.weight",
        "blocks.0.attn.proj.bias",
        "blocks.0.ls1.gamma",
        "blocks.0.norm2.weight",
        "blocks.0.norm2.bias",
        "blocks.0.mlp.w12.weight",
        "blocks.0.mlp.w12.bias",
        "blocks.0.mlp.w3.weight",
        "blocks.0.mlp.w3.bias",
        "blocks.0.ls2.gamma",
        "norm.weight",
        "norm.bias",
    ]


def test_official_checkpoints_are_where_torch_hub_finds_them() -> None:
    base = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitg14"
    assert official_url("dinov2_vitg14") == f"{base}/dinov2_vitg14_pretrain.pth"
    assert official_url("dinov2_vitg14_reg") == f"{base}/dinov2_vitg14_reg4_pretrain.pth"


@pytest.mark.parametrize(
    ("asked", "near"), [("dinov2_vitg", "dinov2_vitg14"), ("dinov2_vits14_registers", "dinov2_vits14_reg")]
)
def test_an_unknown_name_is_refused_with_near_names(asked: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"unknown model '{asked}'.*did you mean.*{near}"):
        api.open_model(ModelRequest(asked))


def test_an_unknown_name_is_refused_even_when_weights_are_given() -> None:
    with pytest.raises(UsageError, match="unknown model"):
        api.open_model(ModelRequest("dinov2_vitg", Path("any.pth")))


def test_a_custom_model_needs_weights(hooks: Any) -> None:
    with pytest.raises(UsageError, match="--weights"):
        hooks.sinder_weights(request=ModelRequest("dinov2_custom"))


def test_listing_and_describing_import_no_torch() -> None:
    script = """
import sys
from types import SimpleNamespace
from sinder_cli import ModelRequest, TensorInfo, Weights
from sinder_plugins import dinov2
assert dinov2.sinder_listing()
shapes = dinov2.tensor_shapes(dinov2.OFFICIAL["dinov2_vitg14"])
infos = {name: TensorInfo(shape, None) for name, shape in shapes.items()}
weights = Weights.of(SimpleNamespace(label="none", infos=infos))
assert dinov2.sinder_backbone(ModelRequest("dinov2_vitg14"), weights).depth == 40
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
