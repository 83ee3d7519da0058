"""What the plugin offers, and what it refuses and why: by name, by block, and over all of timm's registry."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from sinder_plugins.timm.architecture import architecture, create
from sinder_plugins.timm.blocks import InexpressibleError, Part, activation, block_map
from timm.layers import Attention, GELUTanh, GlobalResponseNormMlp, GroupNorm1, PReLU
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block, ParallelScalingBlock
from timm_samples import made
from torch import nn

from sinder_cli import Backbone, ModelRequest, UsageError, api

Describe = Callable[..., Backbone]


def test_every_listed_model_is_what_its_listing_says(hooks: Any) -> None:
    *known, form = hooks.sinder_listing()
    assert form.name == "timm/NAME"
    assert len(known) >= 5
    for listing in known:
        name = listing.name.removeprefix("timm/")
        assert timm.models.is_model_pretrained(name)
        described = architecture(name)
        assert listing.parameters == sum(parameter.numel() for parameter in described.module.parameters())
        assert listing.patch_size == described.patch_size
        assert listing.prefix_tokens == described.module.num_prefix_tokens
        assert listing.requires == ("timm",)


def test_listing_imports_neither_torch_nor_timm() -> None:
    script = "import sys; from sinder_plugins import timm; assert timm.sinder_listing(); "
    script += "assert 'torch' not in sys.modules; assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("vit_small_patch14_dinov3", "vit_small_patch16_dinov3"),
        ("vit_small_patch14_dinov2.lvd", "vit_small_patch14_dinov2.lvd142m"),
    ],
)
def test_an_unknown_name_is_refused_with_near_names(asked: str, near: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown model 'timm/{asked}'.*did you mean.*timm/{near}"):
        api.open_model(ModelRequest(f"timm/{asked}"))


def test_a_renamed_model_is_found_and_a_removed_one_unknown(hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = "vit_small_patch16_224_dino", "vit_small_patch16_224.dino"
    assert timm.models.get_deprecated_models()[old] == new
    asked: list[str] = []
    monkeypatch.setattr("sinder_plugins.timm.hub.pretrained_file", lambda name, _: asked.append(name))
    hooks.sinder_weights(request=ModelRequest(f"timm/{old}"))
    assert asked == [new]
    monkeypatch.setattr(timm.models, "get_deprecated_models", lambda: {"vit_small_patch16_224": None})
    with pytest.raises(UsageError, match="unknown model"):
        hooks.sinder_weights(request=ModelRequest("timm/vit_small_patch16_224"))


def test_other_heads_than_timms_are_refused(describe: Describe) -> None:
    assert describe("plain", heads=4).layers.blocks[0].attention.heads == 4
    with pytest.raises(UsageError, match=r"cannot use 8 heads: timm/small_plain has 4"):
        describe("plain", heads=8)


REFUSED = {
    "vit_base_patch16_rpn_224": r"blocks\.0 is ResPostBlock, which normalizes after its sub-layers",
    "eva02_enormous_patch14_clip_224": r"blocks\.0 is EvaBlockPostNorm, which normalizes after its sub-layers",
    "vit_dpwee_patch16_reg1_gap_256": r"blocks\.0 is DiffParallelScalingBlock, whose attention is the difference",
    "vit_dlittle_patch16_reg1_gap_256": r"blocks\.0\.attn is DiffAttention, none of Attention",
    "vit_base_r50_s16_224": r"patch_embed is HybridEmbed, not a projection of single patches",
    "vit_5b_patch16_sapiens2": r"blocks\.\d+\.attn shares values between heads \(\d+ value heads for \d+ heads\)",
    "swin_tiny_patch4_window7_224": r"SwinTransformerBlock, and its width grows from 96 to 768",
    "convnext_tiny": r"stages\.0\.blocks\.0 is ConvNeXtBlock, which convolves",
    "naflexvit_base_patch16_gap": r"blocks\.0 is Block, and NaFlexVit is neither timm's VisionTransformer nor its Eva",
    "beit_base_patch16_224": r"and Beit is neither",
    "resnet18": r"BasicBlock, which convolves",
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_indescribable_model_is_refused_before_any_download(name: str, hooks: Any) -> None:
    with pytest.raises(UsageError, match=rf"cannot describe timm/{name}: .*{REFUSED[name]}") as refused:
        hooks.sinder_weights(request=ModelRequest(f"timm/{name}"))
    assert "\n" not in str(refused.value)


N = 16


def refusal(block: nn.Module) -> str:
    with pytest.raises(InexpressibleError) as refused:
        block_map(Part("blocks.0", block))
    return str(refused.value)


class SparseExperts(nn.Module):
    """An MLP that sends each token to one of several experts."""

    def __init__(self, in_features: int, **_: Any) -> None:
        super().__init__()
        self.router = nn.Linear(in_features, 4)


class SquaredReLU(nn.Module):
    """An activation that nobody told to be elementwise."""


def test_parts_of_unknown_classes_are_refused_by_name() -> None:
    block = partial(Block, N, 2)
    assert "blocks.0.mlp is SparseExperts, none of Mlp, GluMlp, SwiGLU" in refusal(block(mlp_layer=SparseExperts))
    assert "blocks.0.mlp is GlobalResponseNormMlp" in refusal(block(mlp_layer=without_norm(GlobalResponseNormMlp)))
    assert "blocks.0.norm1 is GroupNorm1, neither LayerNorm nor RMSNorm" in refusal(block(norm_layer=GroupNorm1))
    assert "blocks.0.mlp.act is PReLU, which is not known to be elementwise" in refusal(block(act_layer=PReLU))
    assert "blocks.0.mlp.act is SquaredReLU" in refusal(block(act_layer=SquaredReLU))
    assert "blocks.0 is Linear, none of Block, ParallelScalingBlock" in refusal(nn.Linear(2, 2))


def without_norm(mlp: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda **options: mlp(**{name: value for name, value in options.items() if name != "norm_layer"})


def test_a_gate_behind_the_values_is_refused() -> None:
    block = Block(N, 2)
    block.attn = Attention(N, 2, gated=True)
    wanted = "blocks.0.attn multiplies its values by a gate that depends on the token"
    assert refusal(block) == wanted
    assert refusal(EvaBlock(N, 2, gated_attn=True)) == wanted


def test_one_output_of_attention_and_mlp_is_refused() -> None:
    assert "blocks.0.out_proj is a single output projection of attention and MLP" in refusal(
        ParallelScalingBlock(N, 2, fuse_out_proj=True)
    )


def test_a_patch_of_two_sides_is_refused() -> None:
    timm.models.register_model(flat_patches)
    with pytest.raises(UsageError, match=r"patch_embed takes 16×8 patches of 3 channels"):
        architecture("flat_patches")


def flat_patches(pretrained: bool = False, **options: Any) -> nn.Module:
    model: nn.Module = timm.models.model_entrypoint("test_vit")(pretrained, **(options | {"patch_size": (16, 8)}))
    return model


@pytest.mark.parametrize(
    ("function", "named"),
    [(nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (GELUTanh(), "gelu_tanh"), (nn.SiLU(), "silu")],
)
def test_known_activations_have_their_names(function: nn.Module, named: str) -> None:
    assert activation(Part("act", function)) == named


def test_an_elementwise_activation_without_a_name_is_handed_over() -> None:
    hard = nn.Hardswish()
    block = block_map(Part("blocks.0", Block(N, 2, act_layer=nn.Hardswish)))
    assert activation(Part("act", hard)) is hard
    assert isinstance(block.mlp.activation, nn.Hardswish)


FAMILIES = ("vision_transformer", "eva", "deit", "vision_transformer_hybrid", "vitamin")
REASONS = (
    "which normalizes after its sub-layers",
    "not a projection of single patches",
    "shares values between heads",
    "is DiffAttention",
    "whose attention is the difference of two",
)


def shallow(name: str, **options: Any) -> nn.Module:
    """The module of two blocks, for the sake of time, unless its blocks differ."""
    try:
        return create(name, depth=2, **options)
    except AssertionError:
        return create(name, **options)


def outcome(name: str) -> str:
    """`described`, or the reason for which a name is refused."""
    try:
        described = architecture(name)
    except UsageError as error:
        return next((reason for reason in REASONS if reason in str(error)), str(error))
    assert described.layers.width == described.module.embed_dim
    assert described.image_size >= 5 * described.patch_size
    return "described"


def test_every_transformer_of_timm_is_described_or_refused_with_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinder_plugins.timm.architecture.create", shallow)
    names = [name for family in FAMILIES for name in timm.list_models(module=family)]
    counts = Counter(outcome(name) for name in names)
    with capsys.disabled():
        print(f"\ntimm {timm.__version__}: {dict(counts)}")
    assert counts["described"] >= 230
    assert set(counts) == {"described", *REASONS}


def test_a_module_is_described_without_memory_as_timm_builds_it(describe: Describe) -> None:
    described = architecture("vit_7b_patch16_dinov3")
    assert {tensor.device.type for tensor in described.module.state_dict().values()} == {"meta"}
    assert described.shapes["blocks.39.mlp.fc1_g.weight"] == (8192, 4096)
    backbone, twin = describe("plain"), made("small_plain")
    assert list(backbone.build().state_dict()) == list(twin.state_dict())
    assert torch.get_default_device().type == "cpu"
    assert create("small_plain").pretrained_cfg == twin.pretrained_cfg
