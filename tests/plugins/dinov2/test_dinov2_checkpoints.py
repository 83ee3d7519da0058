"""Which checkpoints are accepted, under which names, and how the others are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from in_turn import unseen
from safetensors.torch import save_file
from sinder_plugins.dinov2 import sinder_backbone
from sinder_plugins.dinov2.checkpoints import infer_config
from sinder_plugins.dinov2.config import OFFICIAL, Config, tensor_shapes
from torch import Tensor

from sinder_cli import Backbone, BadInputError, MemoryTensors, ModelRequest, TensorInfo, UsageError, Weights
from sinder_cli.backbone import weights as weights_module
from sinder_cli.backbone.opening import load_module
from sinder_cli.events import Noted

Describe = Callable[..., Backbone]
Draw = Callable[[Config], dict[str, Tensor]]


class Shapes:
    """A checkpoint of which only names and shapes exist, for models that are too large to draw."""

    label = "shapes"

    def __init__(self, config: Config) -> None:
        self.infos = {name: TensorInfo(shape, torch.float32) for name, shape in tensor_shapes(config).items()}

    def read(self, names: object) -> dict[str, Tensor]:
        raise AssertionError(f"describing a model must not read {names}")


def chunked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that training with two chunks of two blocks leaves: the second chunk counts on from the first."""

    def name_of(name: str) -> str:
        if not name.startswith("blocks."):
            return name
        _, index, rest = name.split(".", 2)
        return f"blocks.{int(index) // 2}.{index}.{rest}"

    return {name_of(name): tensor for name, tensor in tensors.items()}


# What is read off a checkpoint


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_model_is_described_from_names_and_shapes_alone(name: str) -> None:
    config = OFFICIAL[name]
    backbone = sinder_backbone(ModelRequest(name), Weights.of(Shapes(config)))
    assert (backbone.depth, backbone.width) == (config.depth, config.width)
    assert (backbone.patch_size, backbone.image_size) == (14, 518)
    assert backbone.prefix_tokens == (5 if name.endswith("_reg") else 1)
    assert backbone.has_cls


@pytest.mark.parametrize("part", ["", "layer_scale", "qkv_bias", "proj_bias", "mlp_bias", "mask_token"])
@pytest.mark.parametrize("sizes", [{}, {"patch": 8, "grid": 3}, {"registers": 1, "hidden": 72}])
def test_the_configuration_is_read_off_the_tensors(config: Config, part: str, sizes: dict[str, int]) -> None:
    config = replace(config, **sizes, **({part: False} if part else {}))
    assert infer_config(Weights.of(Shapes(config))) == config


def test_a_custom_model_takes_its_image_size_from_its_grid(tiny: Config) -> None:
    config = replace(tiny, patch=8, grid=3)
    backbone = sinder_backbone(ModelRequest("dinov2_custom"), Weights.of(Shapes(config)))
    assert (backbone.patch_size, backbone.image_size) == (8, 24)


# Wrapped and renamed checkpoints


def test_a_chunked_checkpoint_is_accepted_and_its_names_restored(
    describe: Describe, tensors: dict[str, Tensor]
) -> None:
    backbone = describe(chunked(tensors))
    assert backbone.weights.names == list(tensors)
    assert backbone.weights.output_name("blocks.2.norm1.weight") == "blocks.1.2.norm1.weight"
    assert [backbone.weights.output_name(name) for name in backbone.weights.names] == list(chunked(tensors))
    assert torch.equal(load_module(backbone).state_dict()["blocks.2.mlp.fc1.bias"], tensors["blocks.2.mlp.fc1.bias"])


def test_a_block_stored_both_chunked_and_not_is_refused(describe: Describe, tensors: dict[str, Tensor]) -> None:
    tensors["blocks.0.1.norm1.weight"] = tensors["blocks.1.norm1.weight"]
    with pytest.raises(BadInputError, match=r"blocks\.1\.norm1\.weight and blocks\.0\.1\.norm1\.weight both mean"):
        describe(tensors)


def test_a_head_is_left_out_and_counted(describe: Describe, tensors: dict[str, Tensor]) -> None:
    backbone = describe(tensors | {"head.weight": torch.ones(2, 128), "linear_head.bias": torch.ones(2)})
    assert backbone.weights.ignored == ("head.weight", "linear_head.bias")
    assert backbone.weights.names == list(tensors)


def test_gate_and_up_that_are_stored_apart_become_one(
    describe: Describe, drawn: Callable[[Config], dict[str, Tensor]]
) -> None:
    tensors = drawn(Config(width=128, depth=3, hidden=344, mlp="SwiGLU", grid=5))
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".w12." in name:
            apart[name.replace("w12", "w1")], apart[name.replace("w12", "w2")] = tensor.chunk(2)
        else:
            apart[name] = tensor
    backbone = describe({f"teacher.backbone.{name}": tensor for name, tensor in apart.items()})
    assert backbone.weights.names == list(tensors)
    for name, tensor in backbone.weights.read(tensors).items():
        assert torch.equal(tensor, tensors[name]), name
    assert [backbone.weights.output_name(name) for name in tensors] == list(tensors)
    torch.testing.assert_close(load_module(backbone).state_dict(), tensors)
    del apart["blocks.1.mlp.w2.bias"]
    with pytest.raises(
        BadInputError, match=r"blocks\.1\.mlp\.w2\.bias is missing or does not match blocks\.1\.mlp\.w1\.bias"
    ):
        describe(apart)


def test_a_dinov3_is_told_by_its_usable_name(describe: Describe, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(BadInputError, match=r"it is a DINOv3; name the model timm/vit_SIZE_patch14_dinov3, or .*_qkvb"):
        describe(tensors | {"storage_tokens": torch.ones(1, 4, 128)})


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "teacher"])
def test_a_backbone_nested_beside_other_tensors_is_found(
    tmp_path: Path, describe: Describe, tensors: dict[str, Tensor], wrapper: str
) -> None:
    inner = {f"backbone.{name}": tensor for name, tensor in chunked(tensors).items()}
    heads = {"dino_head.mlp.0.weight": torch.ones(2, 2), "dino_head.mlp.0.bias": torch.ones(2)}
    torch.save({wrapper: inner | heads, "iteration": 12}, tmp_path / "nested.pth")
    events: list[object] = []

    backbone = describe(tmp_path / "nested.pth", emit=events.append)

    assert backbone.weights.names == list(tensors)
    assert backbone.weights.ignored == tuple(f"{wrapper}.{name}" for name in heads)
    assert [event.text for event in events if isinstance(event, Noted)] == [
        f"{tmp_path / 'nested.pth'}: matched {len(tensors)} tensors under '{wrapper}.backbone.', 2 outside it ignored"
        f" ({', '.join(backbone.weights.ignored)})"
    ]
    assert backbone.weights.output_name("blocks.0.norm1.weight") == "blocks.0.0.norm1.weight"
    loaded = load_module(backbone).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_of_a_student_and_a_teacher_the_teacher_is_meant(
    tmp_path: Path, describe: Describe, tensors: dict[str, Tensor]
) -> None:
    student = {f"backbone.{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}
    teacher = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"student": student, "teacher": teacher}, tmp_path / "training.pth")
    loaded = load_module(describe(tmp_path / "training.pth")).state_dict()
    assert torch.equal(loaded["cls_token"], tensors["cls_token"])


def test_a_safetensors_file_loads_like_a_torch_file(
    tmp_path: Path, describe: Describe, tensors: dict[str, Tensor]
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "model.pth")
    one, other = (load_module(describe(tmp_path / f"model.{suffix}")) for suffix in ("safetensors", "pth"))
    assert all(torch.equal(one.state_dict()[name], other.state_dict()[name]) for name in tensors)


class CountedReads(MemoryTensors):
    """Tensors in memory that remember how many bytes each read asked for."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = super().read(names)
        READS.append(sum(tensor.nbytes for tensor in wanted.values()))
        return wanted


READS: list[int] = []


def test_a_model_is_loaded_in_few_reads_of_bounded_size(
    hooks: Any, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound, largest = 1 << 20, max(tensor.nbytes for tensor in tensors.values())
    monkeypatch.setattr(weights_module, "BATCH_BYTES", bound)
    READS.clear()
    backbone = hooks.sinder_backbone(
        request=ModelRequest("dinov2_custom"), weights=Weights.of(CountedReads("counted", tensors))
    )
    loaded = load_module(backbone).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert 1 < len(READS) < 6  # one read for each of the 48 tensors would list a .pth file 48 times
    assert max(READS) < bound + largest


def test_the_fingerprint_does_not_depend_on_the_size_of_reads(
    describe: Describe, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = describe(tensors).weights
    at_once = weights.fingerprint()
    monkeypatch.setattr(weights_module, "BATCH_BYTES", 1)
    assert weights.fingerprint() == at_once
    tensors["norm.bias"][3] += 1e-6
    assert weights.fingerprint() != at_once


# Files that are no checkpoints


def test_a_pickle_of_more_than_tensors_is_refused_unopened(
    tmp_path: Path, describe: Describe, tensors: dict[str, Tensor]
) -> None:
    torch.save({"model": tensors, "folder": Path("somewhere")}, tmp_path / "objects.pth")
    with pytest.raises(BadInputError, match="more than tensors") as refusal:
        describe(tmp_path / "objects.pth")
    assert refusal.value.exit_code == 65


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["model.safetensors", "model.pth", "before-1.6.pth"])
def test_a_truncated_file_is_refused_by_name(
    tmp_path: Path, describe: Describe, tensors: dict[str, Tensor], kind: str, kept: float
) -> None:
    path = tmp_path / kind
    if kind.endswith("safetensors"):
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "model.pth")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(BadInputError, match=f"cannot read weights {path}: .+; is it complete") as refusal:
        describe(path)
    assert refusal.value.exit_code == 65


@pytest.mark.parametrize(
    "content", [b"<html>not found</html>", b"hello\n", b"\x80\x02garbage", b"\x80\x02.", b"PK\x03\x04garbage"]
)
def test_a_file_that_torch_did_not_save_is_refused(tmp_path: Path, describe: Describe, content: bytes) -> None:
    path = tmp_path / "page.pth"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=f"cannot read weights {path}"):
        describe(path)


# Checkpoints that are not this model


@pytest.mark.parametrize("model", ["dinov2_custom", "dinov2_vits14"])
@pytest.mark.parametrize(
    "name", ["blocks.1.norm1.weight", "blocks.2.ls2.gamma", "blocks.0.mlp.fc1.bias", "norm.bias", "cls_token"]
)
def test_a_missing_tensor_is_refused_by_name(model: str, name: str) -> None:
    source = Shapes(OFFICIAL["dinov2_vits14"])
    del source.infos[name]
    with pytest.raises(BadInputError, match=f"1 missing: {name}"):
        sinder_backbone(ModelRequest(model), Weights.of(source))


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"])
def test_a_missing_tensor_that_tells_the_sizes_is_refused(
    describe: Describe, tensors: dict[str, Tensor], name: str
) -> None:
    del tensors[name]
    with pytest.raises(BadInputError, match=name):
        describe(tensors)


def test_a_file_without_a_first_mlp_is_refused(config: Config, describe: Describe, drawn: Draw) -> None:
    whole = drawn(config)
    with pytest.raises(BadInputError, match=r"neither blocks\.0\.mlp\.fc1\.weight nor blocks\.0\.mlp\.w12\.weight"):
        describe({name: tensor for name, tensor in whole.items() if not name.startswith("blocks.0.mlp.")})


def test_a_missing_block_is_refused_by_name(describe: Describe, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(BadInputError, match=r"blocks up to 2, but none of the tensors of blocks\.1;"):
        describe({name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.1.")})


@pytest.mark.parametrize("name", ["tail.weight", "blocks.1.attn.extra", "blocks.2.mlp.w12.weight"])
def test_an_unexpected_tensor_is_refused_by_name(describe: Describe, tensors: dict[str, Tensor], name: str) -> None:
    with pytest.raises(BadInputError, match=f"1 unexpected: {name}"):
        describe(tensors | {name: torch.ones(2)})


@pytest.mark.parametrize(
    "name", ["cls_token", "blocks.2.mlp.fc2.weight", "blocks.1.ls1.gamma", "blocks.1.mlp.fc1.weight"]
)
def test_a_misshaped_tensor_is_refused_by_name(describe: Describe, tensors: dict[str, Tensor], name: str) -> None:
    with pytest.raises(BadInputError, match=f"1 mis-shaped: {name} .7 for "):
        describe(tensors | {name: torch.ones(7)})


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("pos_embed", (1, 21, 128), "pos_embed, which is 1×21×128, is no square grid: 20 patches"),
        ("pos_embed", (1, 1, 128), "no square grid: 0 patches"),
        ("pos_embed", (26, 128), "pos_embed, which is 26×128, does not have 3 positive sizes"),
        ("pos_embed", (), "pos_embed, which is a scalar"),
        ("patch_embed.proj.weight", (128, 1, 14, 14), "patch_embed.proj.weight, which is 128×1×14×14, is no embedding"),
        ("patch_embed.proj.weight", (128, 3, 14, 16), "square RGB patches"),
        ("patch_embed.proj.weight", (0, 3, 14, 14), "does not have 4 positive sizes"),
        ("blocks.0.mlp.w12.weight", (7, 128), "blocks.0.mlp.w12.weight, which is 7×128, cannot be halved"),
        ("register_tokens", (1, 0, 128), "register_tokens, which is 1×0×128"),
    ],
)
def test_a_tensor_that_tells_no_size_is_refused_by_name(
    describe: Describe, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], why: str
) -> None:
    with pytest.raises(BadInputError, match=why):
        describe(tensors | {name: torch.ones(shape)})


@pytest.mark.parametrize(
    ("asked", "given", "why"),
    [
        (
            "dinov2_vitl14",
            "dinov2_vitb14",
            "it is dinov2_vitb14, with width 768 and depth 12; name the model dinov2_vitb14",
        ),
        ("dinov2_vits14", "dinov2_vitb14", "it is dinov2_vitb14, with width 768; name the model dinov2_vitb14"),
        ("dinov2_vitb14", "dinov2_vitb14_reg", "it is dinov2_vitb14_reg, with 4 registers; name"),
        ("dinov2_vitb14_reg", "dinov2_vitb14", "it is dinov2_vitb14, with 0 registers; name"),
        ("dinov2_vits14_reg", "dinov2_vitg14", "it is dinov2_vitg14, with width 1536, depth 40 and 0 registers; name"),
    ],
)
def test_the_file_of_another_official_model_is_refused(asked: str, given: str, why: str) -> None:
    with pytest.raises(BadInputError, match=f"weights shapes do not fit {asked}: {why}"):
        sinder_backbone(ModelRequest(asked), Weights.of(Shapes(OFFICIAL[given])))


def test_a_file_of_no_official_model_is_refused() -> None:
    given = replace(OFFICIAL["dinov2_vits14"], grid=16, layer_scale=False)
    with pytest.raises(
        BadInputError, match="grid 16 instead of 37 and layer_scale absent instead of present; dinov2_custom"
    ):
        sinder_backbone(ModelRequest("dinov2_vits14"), Weights.of(Shapes(given)))


# Heads, which no tensor shows


def test_a_custom_model_has_heads_of_width_64_unless_told(describe: Describe, tensors: dict[str, Tensor]) -> None:
    assert load_module(describe(tensors)).get_submodule("blocks.0.attn").heads == 2
    assert load_module(describe(tensors, heads=8)).get_submodule("blocks.0.attn").heads == 8


@pytest.mark.parametrize("heads", [0, 3, -2, 256])
def test_heads_that_do_not_divide_the_width_are_refused(
    describe: Describe, tensors: dict[str, Tensor], heads: int
) -> None:
    with pytest.raises(UsageError, match=f"cannot use {heads} heads: they do not divide width 128"):
        describe(tensors, heads=heads)


def test_heads_must_be_told_for_unusual_widths(describe: Describe, drawn: Draw) -> None:
    odd = drawn(Config(width=48, depth=1, hidden=96, grid=2))
    with pytest.raises(UsageError, match="width 48 is no multiple of 64; give --heads"):
        describe(odd)
    assert load_module(describe(odd, heads=3)).get_submodule("blocks.0.attn").heads == 3


def test_heads_of_an_official_model_cannot_be_changed() -> None:
    weights = Weights.of(Shapes(OFFICIAL["dinov2_vits14"]))
    assert sinder_backbone(ModelRequest("dinov2_vits14", heads=6), weights).depth == 12
    with pytest.raises(UsageError, match="cannot use 12 heads: dinov2_vits14 has 6"):
        sinder_backbone(ModelRequest("dinov2_vits14", heads=12), weights)


def test_each_tensor_is_used_or_named_or_the_file_refused(config: Config, drawn: Any) -> None:
    def read(weights: Weights) -> Weights:
        found: Weights = sinder_backbone(ModelRequest("dinov2_custom"), weights).weights
        return found

    tried, missed = unseen(drawn(config), read)
    assert tried >= 3 * 40
    assert missed == []
