"""Whatever an encoder is nested in, and under whichever names: nothing of it may be missing, and nothing left over."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_samples import SAMPLES
from in_turn import unseen
from safetensors.torch import load_file, save_file
from sinder_plugins.hf.checkpoint import as_stored, encoder, is_fused, require_whole
from sinder_plugins.hf.config import read_config
from sinder_plugins.hf.families import FAMILIES
from torch import Tensor

from sinder_cli import Backbone, BadInputError, ModelRequest, UsageError, Weights, api
from sinder_cli.backbone.opening import require_loadable
from sinder_cli.defects.prediction import predict

Saved = Callable[[str], Path]
Opened = Callable[..., Backbone]


def copied(folder: Path, target: Path, *, weights: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A folder like another, with other weights, or other entries in its `config.json`."""
    target.mkdir(exist_ok=True)
    config = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    save_file(weights or load_file(folder / "model.safetensors"), target / "model.safetensors")
    return target


@pytest.mark.parametrize("name", SAMPLES)
def test_the_encoder_is_found_and_the_rest_is_counted(name: str, saved: Saved, opened: Opened) -> None:
    backbone = opened(saved(name))
    assert len(backbone.weights.ignored) == SAMPLES[name].ignored
    assert (backbone.depth, backbone.width, backbone.patch_size) == (3, 32, 8)
    stored = load_file(saved(name) / "model.safetensors")
    assert len(backbone.weights.names) + SAMPLES[name].ignored == len(stored)
    require_loadable(backbone)


@pytest.mark.parametrize("name", SAMPLES)
def test_directions_come_from_the_weights_alone(name: str, saved: Saved, opened: Opened) -> None:
    directions = predict(opened(saved(name))).directions()
    assert directions.shape == (3, 32)
    assert torch.allclose(directions.norm(dim=1), torch.ones(3), atol=1e-5)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_names_of_the_modules_are_understood_as_well(
    name: str, saved: Saved, opened: Opened, tmp_path: Path
) -> None:
    """`save_pretrained` writes the names from before transformers 5; a state dict has those of the modules."""
    weights = SAMPLES[name].made().state_dict()
    folder = copied(
        saved(name), tmp_path / "new", weights={key: tensor.contiguous() for key, tensor in weights.items()}
    )
    old, new = opened(saved(name)), opened(folder)
    assert torch.allclose(predict(old).directions(), predict(new).directions(), atol=1e-5)


@pytest.mark.parametrize("name", ["DINOv2", "DINOv2 with SwiGLU", "ViT classifier", "CLIP with its text", "DINOv3"])
def test_shards_are_the_same_model(name: str, saved: Saved, opened: Opened, tmp_path: Path) -> None:
    model: Any = SAMPLES[name].made()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    one, many = opened(saved(name)), opened(tmp_path / "sharded")
    assert one.weights.fingerprint() == many.weights.fingerprint()


@pytest.mark.parametrize("name", SAMPLES)
def test_every_role_of_the_map_is_filled(name: str, saved: Saved, opened: Opened) -> None:
    backbone = opened(saved(name))
    layers, config = backbone.layers, SAMPLES[name].configured()
    sizes = getattr(config, "vision_config", config)
    assert layers.stem is not None
    assert {block.attention.heads for block in layers.blocks} == {2}
    assert {block.mlp.norm.eps for block in layers.blocks} == {sizes.layer_norm_eps}
    assert (layers.stem.cls is not None) is backbone.has_cls
    assert (layers.norm is None) is bool(getattr(sizes, "use_mean_pooling", False))
    named = {reference["name"] for reference in _references(layers.model_dump())}
    left = {re.sub(r"\.\d+\.", ".#.", other) for other in backbone.weights.names if other not in named}
    unmapped = ("relative_position_bias", "distillation_token", "register_tokens")  # of registers, where there are none
    assert all(any(part in other for part in unmapped) for other in left), left


def _references(record: Any) -> list[dict[str, Any]]:
    if isinstance(record, dict):
        if record.keys() == {"name", "rows"}:
            return [record]
        return [found for part in record.values() for found in _references(part)]
    return [found for part in record for found in _references(part)] if isinstance(record, list | tuple) else []


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_config_json_leaves_out_is_what_the_library_assumes(kind: str) -> None:
    family = FAMILIES[kind]
    usual = getattr(transformers, family.configuration)()
    assert usual.model_type == kind
    known = {name: value for name, value in family.defaults.items() if hasattr(usual, name)}
    assert known == {name: getattr(usual, name) for name in known}
    assert family.defaults.keys() - known.keys() <= {"image_size"}  # SigLIP 2 has none


@pytest.mark.parametrize("name", ["CLIP with its text", "SigLIP with its text"])
def test_a_tower_may_leave_out_its_type_and_its_sizes(name: str, saved: Saved, opened: Opened, tmp_path: Path) -> None:
    vision = json.loads((saved(name) / "config.json").read_text())["vision_config"]
    for usual in ("model_type", "hidden_act", "layer_norm_eps", "num_channels", "attention_dropout"):
        vision.pop(usual, None)
    folder = copied(saved(name), tmp_path / "terse", vision_config=vision)
    assert opened(folder).layers == opened(saved(name)).layers


def test_a_missing_surplus_or_misshaped_tensor_is_named(saved: Saved, opened: Opened, tmp_path: Path) -> None:
    weights = load_file(saved("ViT") / "model.safetensors")
    name = "encoder.layer.1.attention.attention.key.bias"
    changed = {
        "1 missing: layers.1.attention.k_proj.bias": {key: value for key, value in weights.items() if key != name},
        "1 unexpected: layers.1.more": weights | {"encoder.layer.1.more": torch.ones(1)},
        r"1 mis-shaped: layers.1.attention.k_proj.bias \(8 for 32\)": weights | {name: torch.ones(8)},
        "16 missing: layers.2.layernorm_": {key: value for key, value in weights.items() if "layer.2." not in key},
    }
    for number, (why, tensors) in enumerate(changed.items()):
        with pytest.raises(BadInputError, match=why):
            opened(copied(saved("ViT"), tmp_path / str(number), weights=tensors))


def test_a_wrong_size_in_config_json_is_found_before_building(saved: Saved, opened: Opened, tmp_path: Path) -> None:
    for key, value in {"hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 4, "image_size": 48}.items():
        folder = copied(saved("ViT"), tmp_path / key, **{key: value})
        with pytest.raises(BadInputError, match="do not fit hf/"):
            opened(folder)


def test_heads_are_those_of_config_json(saved: Saved, opened: Opened) -> None:
    assert opened(saved("DINOv2"), heads=2).depth == 3
    with pytest.raises(UsageError, match=r"cannot use 4 heads for .*: its config\.json says 2"):
        opened(saved("DINOv2"), heads=4)


def test_xformers_is_refused_before_it_is_needed(saved: Saved, opened: Opened) -> None:
    with pytest.raises(UsageError, match="cannot use xformers attention"):
        opened(saved("DINOv2"), attention="xformers")


@pytest.mark.parametrize("name", ["DINOv2", "DINOv2 with SwiGLU", "DINOv2 with registers"])
def test_the_official_file_of_the_weights_gives_the_same_directions(
    name: str, saved: Saved, opened: Opened, tmp_path: Path
) -> None:
    ours = opened(saved(name))
    save_file(official(ours), tmp_path / "official.safetensors")
    request = ModelRequest("dinov2_custom", tmp_path / "official.safetensors", heads=2)
    for one, other in zip(predict(ours).directions(), predict(api.open_model(request)).directions(), strict=True):
        assert math.degrees(2 * math.asin(float((one - other).norm()) / 2)) <= 0.01


def official(backbone: Backbone) -> dict[str, Tensor]:
    """The encoder's tensors under the names of DINOv2's own code, projections fused."""
    tensors = backbone.weights.read(backbone.weights.names)
    renamed = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.register_tokens": "register_tokens",
        "embeddings.mask_token": "mask_token",
        "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
        "encoder.layer.": "blocks.",
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "mlp.weights_in": "mlp.w12",
        "mlp.weights_out": "mlp.w3",
        "layernorm.": "norm.",
    }
    converted = {}
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        for old, new in (renamed | {"attention.q_proj": "attn.qkv"}).items():
            name = name.replace(old, new)
        converted[name] = tensor
    return converted


@pytest.mark.parametrize("name", SAMPLES)
def test_each_tensor_is_used_or_named_or_the_file_refused(name: str, saved: Saved) -> None:
    folder = saved(name)
    described = read_config((folder / "config.json").read_text(), "file")

    def read(weights: Weights) -> Weights:
        found = encoder(weights, described)
        config = as_stored(described, found)
        require_whole(config, is_fused(config, found), found, "file")
        return found

    tensors = load_file(folder / "model.safetensors")
    later = {key: tensor for key, tensor in tensors.items() if re.search(r"\blayers?\.[12]\.", key)}
    tried, missed = unseen(tensors, read, beside=later)
    assert tried >= 3 * 15
    assert missed == []
