"""Checkpoints of timm's own names are read as they are; official ones go through timm's own functions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from in_turn import unseen
from safetensors.torch import save_file
from sinder_plugins.dinov2.config import Config, tensor_shapes
from sinder_plugins.timm.architecture import architecture
from sinder_plugins.timm.checkpoints import backbone_weights
from timm.models import _builder
from timm_samples import NAMES, made, random_tensors
from torch import Tensor

from sinder_cli import Backbone, BadInputError, ModelRequest, Weights, api
from sinder_cli.backbone.opening import load_module
from sinder_cli.defects.prediction import predict

Describe = Callable[..., Backbone]
Tensors = dict[str, Tensor]


def small(kind: str, **options: Any) -> Tensors:
    return random_tensors(made(f"small_{kind}", **options))


def renamed(tensors: Tensors, *swaps: tuple[str, str]) -> Tensors:
    """Tensors under other names, each swap applied in turn."""
    names = {name: name for name in tensors}
    for old, new in swaps:
        names = {name: re.sub(old, new, current) for name, current in names.items()}
    return {names[name]: tensor for name, tensor in tensors.items()}


def saved(path: Path, stored: dict[str, Any]) -> Path:
    torch.save(stored, path)
    return path


def holds(backbone: Backbone, wanted: Tensors) -> None:
    assert sorted(backbone.weights.names) == sorted(wanted)
    for name, tensor in backbone.weights.read(wanted).items():
        assert torch.equal(tensor, wanted[name]), name
    load_module(backbone)


def was_converted(backbone: Backbone) -> bool:
    return backbone.weights.source.label.endswith(", converted by timm")


def test_timms_own_names_are_read_lazily_without_the_classifier(describe: Describe, tmp_path: Path) -> None:
    tensors = small("plain", num_classes=7)
    save_file(tensors, tmp_path / "whole.safetensors")
    backbone = describe("plain", tmp_path / "whole.safetensors")
    assert sorted(backbone.weights.ignored) == ["head.bias", "head.weight"]
    assert not was_converted(backbone)
    holds(backbone, {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")})


def test_both_classifiers_of_a_distilled_model_are_ignored(describe: Describe, tmp_path: Path) -> None:
    save_file(small("distilled", num_classes=7), tmp_path / "whole.safetensors")
    ignored = describe("distilled", tmp_path / "whole.safetensors").weights.ignored
    assert sorted(ignored) == ["head.bias", "head.weight", "head_dist.bias", "head_dist.weight"]


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "state_dict_ema"])
def test_a_training_checkpoint_of_timms_is_read_lazily(describe: Describe, tmp_path: Path, wrapper: str) -> None:
    tensors = small("plain")
    backbone = describe("plain", saved(tmp_path / "run.pth", {wrapper: tensors, "epoch": 3}))
    assert not was_converted(backbone)
    holds(backbone, tensors)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("dinov2", Config(width=64, depth=3, hidden=256, grid=5)),
        ("registers", Config(width=64, depth=3, hidden=256, grid=5, registers=4)),
        ("packed", Config(width=64, depth=3, hidden=176, mlp="SwiGLU", grid=5, registers=4)),
    ],
)
def test_an_official_dinov2_is_the_same_to_timm_and_dinov2(
    describe: Describe, tmp_path: Path, kind: str, config: Config
) -> None:
    generator = torch.Generator().manual_seed(0)
    official = {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(config).items()}
    for name, tensor in official.items():
        if tensor.ndim > 1 and name.endswith("weight"):
            tensor.mul_(tensor[0].numel() ** -0.5)
    path = saved(tmp_path / "official.pth", official)
    ours = api.open_model(ModelRequest("dinov2_custom", path, heads=4))
    theirs = describe(kind, path)
    assert was_converted(theirs)

    batch = torch.randn(2, 3, 70, 70, generator=generator)
    (x, context), (y, other) = ours.embed(load_module(ours), batch), theirs.embed(load_module(theirs), batch)
    torch.testing.assert_close(x, y)
    for index in range(config.depth):
        x = ours.run_block(load_module(ours), index, x, context)
        y = theirs.run_block(load_module(theirs), index, y, other)
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)

    stages = ("attention", "mlp", "block", "cumulative")
    mine, his = predict(ours, stages), predict(theirs, stages)
    for stage in stages:
        chords = (mine.directions(stage) - his.directions(stage)).double().norm(dim=-1)  # about the angles
        assert (torch.rad2deg(chords) <= 0.01).all()


PERIODS = 100.0 ** (torch.arange(4) / 4)  # of heads of 16 features


def test_a_dinov3_of_other_angles_than_the_model_is_refused(describe: Describe, tmp_path: Path) -> None:
    swaps = ((r"^reg_token", "storage_tokens"), (r"gamma_1$", "ls1.gamma"), (r"gamma_2$", "ls2.gamma"))
    official = renamed(small("dinov3"), *swaps) | {"rope_embed.periods": 1.5 * PERIODS}
    with pytest.raises(BadInputError, match=r"its rope_embed\.periods differ from those of this model"):
        describe("dinov3", saved(tmp_path / "official.pth", official))


def test_an_official_dinov3_is_converted_and_nothing_is_printed(
    describe: Describe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = small("dinov3")
    official = renamed(
        tensors, (r"^reg_token", "storage_tokens"), (r"gamma_1$", "ls1.gamma"), (r"gamma_2$", "ls2.gamma")
    )
    unused = {f"blocks.{i}.attn.qkv.{part}": torch.zeros(192) for i in range(3) for part in ("bias", "bias_mask")}
    unused |= {"mask_token": torch.zeros(1, 64), "rope_embed.periods": PERIODS.bfloat16()}
    backbone = describe("dinov3", saved(tmp_path / "official.pth", official | unused))
    assert was_converted(backbone)
    holds(backbone, tensors)
    assert capsys.readouterr().out == ""


def test_a_converted_teacher_is_taken_and_its_student_is_known(describe: Describe, tmp_path: Path) -> None:
    tensors = small("dinov3")
    official = renamed(
        tensors, (r"^reg_token", "storage_tokens"), (r"gamma_1$", "ls1.gamma"), (r"gamma_2$", "ls2.gamma")
    )
    student = {f"student.backbone.{name}": torch.zeros_like(tensor) for name, tensor in official.items()}
    teacher = {f"teacher.backbone.{name}": tensor for name, tensor in official.items()}
    path = saved(tmp_path / "both.pth", student | teacher)
    for backbone in (describe("dinov3", path), describe("dinov3", path, branch="teacher")):
        assert was_converted(backbone)
        holds(backbone, tensors)
        assert (backbone.weights.prefix, backbone.weights.others) == ("teacher.backbone.", ("student.backbone.",))


def test_positions_of_an_oblong_grid_are_refused_with_their_sizes(describe: Describe, tmp_path: Path) -> None:
    save_file(small("plain") | {"pos_embed": torch.ones(1, 100, 64)}, tmp_path / "oblong.safetensors")
    with pytest.raises(BadInputError, match="pos_embed is 1×100×64, and the model's is 1×26×64"):
        describe("plain", tmp_path / "oblong.safetensors")


def test_a_dinov3_with_biases_gets_those_of_queries_and_values(describe: Describe, tmp_path: Path) -> None:
    tensors = small("dinov3_qkv_bias")
    official = {
        name: tensor
        for name, tensor in renamed(tensors, (r"^reg_token", "storage_tokens"), (r"gamma_(\d)$", r"ls\1.gamma")).items()
        if "_bias" not in name
    }
    for index in range(3):
        q, v = (tensors[f"blocks.{index}.attn.{part}_bias"] for part in "qv")
        official[f"blocks.{index}.attn.qkv.bias"] = torch.cat([q, torch.zeros(64), v])
    holds(describe("dinov3_qkv_bias", saved(tmp_path / "official.pth", official)), tensors)


CLIP = (
    (r"^patch_embed\.proj", "conv1"),
    (r"^pos_embed", "positional_embedding"),
    (r"^cls_token", "class_embedding"),
    (r"^norm_pre", "ln_pre"),
    (r"^norm\.", "ln_post."),
    (r"^blocks", "transformer.resblocks"),
    (r"norm(\d)", r"ln_\1"),
    (r"qkv\.", "in_proj_"),
    (r"attn\.proj", "attn.out_proj"),
    (r"fc1", "c_fc"),
    (r"fc2", "c_proj"),
    (r"^", "visual."),
)


def test_an_official_clip_is_converted_without_text_and_projection(describe: Describe, tmp_path: Path) -> None:
    tensors = small("clip")
    official = renamed(tensors, *CLIP)
    official["visual.class_embedding"] = official["visual.class_embedding"][0, 0]
    official["visual.positional_embedding"] = official["visual.positional_embedding"][0]
    official |= {"visual.proj": torch.zeros(64, 32), "token_embedding.weight": torch.zeros(9, 32)}
    backbone = describe("clip", saved(tmp_path / "official.pt", official))
    assert sorted(backbone.weights.ignored) == ["head.bias", "head.weight", "token_embedding.weight"]
    holds(backbone, tensors)


def test_a_vision_tower_of_timms_in_openclip_is_read_lazily(describe: Describe, tmp_path: Path) -> None:
    tensors = small("pooled")
    nested = {f"visual.trunk.{name}": tensor for name, tensor in tensors.items()}
    save_file(nested | {"text.token_embedding.weight": torch.zeros(9, 32)}, tmp_path / "open_clip.safetensors")
    backbone = describe("pooled", tmp_path / "open_clip.safetensors")
    assert not was_converted(backbone)
    assert backbone.weights.ignored == ("text.token_embedding.weight",)
    holds(backbone, tensors)


def test_the_encoder_of_an_official_ijepa_is_converted(describe: Describe, tmp_path: Path) -> None:
    tensors = small("gap")
    encoder = {f"module.{name}": tensor for name, tensor in tensors.items()}
    other = {name: torch.zeros_like(tensor) for name, tensor in encoder.items()}
    path = saved(tmp_path / "official.pth", {"encoder": other, "predictor": {}, "target_encoder": encoder, "epoch": 3})
    holds(describe("gap", path), tensors)  # the average over the training, as of every file of several backbones
    holds(describe("gap", path, branch="encoder"), {name: torch.zeros_like(each) for name, each in tensors.items()})
    holds(describe("gap", saved(tmp_path / "alone.pth", {"encoder": encoder})), tensors)


def test_an_official_deit3_is_converted(describe: Describe, tmp_path: Path) -> None:
    tensors = small("layer_scale")
    official = {"model": renamed(tensors, (r"ls(\d)\.gamma", r"gamma_\1"))}
    holds(describe("layer_scale", saved(tmp_path / "official.pth", official)), tensors)


def test_an_official_eva02_is_converted(describe: Describe, tmp_path: Path) -> None:
    tensors = small("eva02")
    official = renamed(
        tensors,
        (r"mlp\.norm", "mlp.ffn_ln"),
        (r"fc1_g", "w1"),
        (r"fc1_x", "w2"),
        (r"fc2", "w3"),
        (r"q_proj\.bias", "q_bias"),
        (r"v_proj\.bias", "v_bias"),
    )
    official["rope.freqs_cos"] = torch.zeros(25, 16)
    holds(describe("eva02", saved(tmp_path / "official.pth", {"module": official})), tensors)


def test_positions_of_another_size_are_refused_and_never_resampled(describe: Describe, tmp_path: Path) -> None:
    save_file(small("plain", img_size=112), tmp_path / "larger.safetensors")
    with pytest.raises(BadInputError, match=r"pos_embed is 1×50×64, and the model's is 1×26×64; name the model"):
        describe("plain", tmp_path / "larger.safetensors")


def test_patches_of_another_size_are_refused_and_never_resampled(describe: Describe, tmp_path: Path) -> None:
    tensors = small("plain") | {"patch_embed.proj.weight": torch.randn(64, 3, 8, 8)}
    save_file(tensors, tmp_path / "finer.safetensors")
    with pytest.raises(BadInputError, match=r"patch_embed\.proj\.weight is 64×3×8×8, and the model's is 64×3×16×16"):
        describe("plain", tmp_path / "finer.safetensors")


def test_a_file_without_registers_brings_out_the_name_without_them(tmp_path: Path) -> None:
    module = timm.create_model("vit_small_patch14_dinov2", num_classes=0, depth=1)
    stored = module.state_dict() | {"mask_token": torch.zeros(1, 384)}  # as the official file has it
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "plain.safetensors")
    with pytest.raises(BadInputError, match=r"name the model timm/vit_small_patch14_dinov2$"):
        api.open_model(ModelRequest("timm/vit_small_patch14_reg4_dinov2", tmp_path / "plain.safetensors"))


def test_a_file_with_registers_brings_out_the_name_with_them(tmp_path: Path) -> None:
    module = timm.create_model("vit_small_patch14_dinov2", num_classes=0, depth=1)
    stored = module.state_dict() | {"mask_token": torch.zeros(1, 384), "register_tokens": torch.ones(1, 4, 384)}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "registers.safetensors")
    with pytest.raises(BadInputError, match=r"name the model timm/vit_small_patch14_reg4_dinov2$"):
        api.open_model(ModelRequest("timm/vit_small_patch14_dinov2", tmp_path / "registers.safetensors"))


def test_the_name_that_fits_the_stored_sizes_is_said(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = timm.create_model("vit_tiny_patch16_384", num_classes=0)
    stored = {name: torch.zeros(tensor.shape) for name, tensor in module.state_dict().items()}
    path = tmp_path / "larger.safetensors"
    save_file(stored, path)
    with pytest.raises(BadInputError, match=r"name the model timm/vit_tiny_patch16_384$"):
        api.open_model(ModelRequest("timm/vit_tiny_patch16_224", path))


def test_biases_without_a_place_in_the_model_are_not_dropped(describe: Describe, tmp_path: Path) -> None:
    official = renamed(
        small("dinov3"), (r"^reg_token", "storage_tokens"), (r"gamma_1$", "ls1.gamma"), (r"gamma_2$", "ls2.gamma")
    )
    biases = {f"blocks.{i}.attn.qkv.bias": torch.randn(192) for i in range(3)}
    with pytest.raises(BadInputError, match=r"no place for blocks\.0\.attn\.qkv\.bias and 2 more, which are not zero"):
        describe("dinov3", saved(tmp_path / "official.pth", official | biases))


def test_biases_of_keys_are_dropped_only_where_they_are_zero(describe: Describe, tmp_path: Path) -> None:
    tensors = small("dinov3_qkv_bias")
    official = {
        name: tensor
        for name, tensor in renamed(tensors, (r"^reg_token", "storage_tokens"), (r"gamma_(\d)$", r"ls\1.gamma")).items()
        if "_bias" not in name
    }
    official |= {f"blocks.{i}.attn.qkv.bias": torch.randn(192) for i in range(3)}
    with pytest.raises(BadInputError, match=r"64 of the 192 numbers of blocks\.0\.attn\.qkv\.bias, which are not zero"):
        describe("dinov3_qkv_bias", saved(tmp_path / "official.pth", official))


def test_clip_trained_in_parallel_is_seen_through(describe: Describe, tmp_path: Path) -> None:
    tensors = small("clip")
    official = renamed(tensors, *CLIP)
    official["visual.class_embedding"] = official["visual.class_embedding"][0, 0]
    official["visual.positional_embedding"] = official["visual.positional_embedding"][0]
    for stored in (
        {"state_dict": {f"module.{name}": tensor for name, tensor in official.items()}, "epoch": 3},
        {f"model.{name}": tensor for name, tensor in official.items()},
        {"model": {f"_orig_mod.module.{name}": tensor for name, tensor in official.items()}},
    ):
        holds(describe("clip", saved(tmp_path / "official.pt", stored)), tensors)


def test_a_missing_and_a_strange_tensor_are_counted_and_named(describe: Describe, tmp_path: Path) -> None:
    tensors = small("plain")
    del tensors["blocks.1.attn.proj.weight"]
    save_file(tensors | {"decoder.weight": torch.zeros(2)}, tmp_path / "odd.safetensors")
    problem = r"1 missing: blocks\.1\.attn\.proj\.weight, 1 unexpected: decoder\.weight"
    with pytest.raises(BadInputError, match=problem):
        describe("plain", tmp_path / "odd.safetensors")


def test_the_weights_of_another_width_are_refused_by_shape(describe: Describe, tmp_path: Path) -> None:
    save_file(small("plain", embed_dim=32), tmp_path / "narrow.safetensors")
    with pytest.raises(BadInputError, match=r"0 tensors match, \d+ mis-shaped: .* \(32 for 64\)"):
        describe("plain", tmp_path / "narrow.safetensors")


def test_what_timms_function_cannot_convert_is_refused(describe: Describe, tmp_path: Path) -> None:
    tensors = small("dinov2") | {"pos_embed": torch.zeros(7)}
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(BadInputError, match="pos_embed is 7, and the model's is 1×26×64"):
        describe("dinov2", tmp_path / "odd.safetensors")


def test_a_file_of_something_else_is_refused(describe: Describe, tmp_path: Path) -> None:
    save_file({"layer.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInputError, match=r"do not fit timm/small_plain.*1 unexpected: layer\.weight"):
        describe("plain", tmp_path / "other.safetensors")


def test_timms_loader_is_restored_after_it_gave_a_function_away(describe: Describe, tmp_path: Path) -> None:
    own = _builder.load_pretrained
    describe("layer_scale", saved(tmp_path / "it.pth", renamed(small("layer_scale"), (r"ls(\d)\.gamma", r"gamma_\1"))))
    assert _builder.load_pretrained is own
    assert timm.create_model("small_plain", num_classes=0) is not None


def test_each_tensor_is_used_or_named_or_the_file_refused(kind: str) -> None:
    """The stem, the first block and the norm of every kind, by timm's own names; all blocks would take long."""
    described = architecture(NAMES[kind])
    tensors = random_tensors(made(NAMES[kind]))
    rest = {name: tensor for name, tensor in tensors.items() if name.startswith(("blocks.1.", "blocks.2."))}

    def read(weights: Weights) -> Weights:
        return backbone_weights(NAMES[kind], described, weights)

    tried, missed = unseen(tensors, read, beside=rest)
    assert tried >= 3 * 12
    assert missed == []
