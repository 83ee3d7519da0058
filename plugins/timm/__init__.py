"""Vision transformers of timm: every pre-norm `VisionTransformer`, and the `Eva` family, as `timm/NAME`.

The backbone is timm's model of the name with `num_classes=0`: only the classifier of a checkpoint is left out. An
attention pool, or the norm after a pool, is part of it and stays unchanged in a repair; the final norm is that of
timm's `forward_features`, so that a model with its norm after the pool has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sinder_cli as sinder

if TYPE_CHECKING:
    from torch import nn

SINDER_API = 1

PREFIX = "timm/"
REQUIRES = ("timm",)
WELL_KNOWN = (  # timm's name, summary, parameters, patch, prefix tokens
    ("vit_large_patch14_dinov2.lvd142m", "DINOv2, 24 blocks of width 1024", 304_367_616, 14, 1),
    ("vit_large_patch14_reg4_dinov2.lvd142m", "DINOv2, 24 blocks of width 1024, 4 registers", 304_370_688, 14, 5),
    ("vit_large_patch16_dinov3.lvd1689m", "DINOv3, 24 blocks of width 1024, 4 registers", 303_079_424, 16, 5),
    ("vit_base_patch16_clip_224.openai", "CLIP, 12 blocks of width 768", 85_799_424, 16, 1),
    ("eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", "EVA-02, 24 blocks of width 1024", 304_055_232, 14, 1),
)


@sinder.hookimpl
def sinder_listing() -> Sequence[sinder.Listing]:
    """List a few of timm's names, and the form of all others."""
    known = [sinder.Listing(f"{PREFIX}{row[0]}", *row[1:], REQUIRES) for row in WELL_KNOWN]
    return [*known, sinder.Listing(f"{PREFIX}NAME", "any pre-norm VisionTransformer or Eva of timm", requires=REQUIRES)]


@sinder.hookimpl
def sinder_weights(request: sinder.ModelRequest) -> Path:
    """Return timm's pretrained file for `request.model`, downloaded once; refuse an unusable model before that."""
    name = _timm_name(request)
    from .architecture import architecture
    from .hub import pretrained_file

    architecture(name)  # raises before the download if the model cannot be described
    return pretrained_file(name, request)


@sinder.hookimpl
def sinder_backbone(request: sinder.ModelRequest, weights: sinder.Weights) -> sinder.Backbone:
    """Describe timm's module of this name with these weights."""
    name = _timm_name(request)
    fused = _fused(request)
    from .architecture import architecture, attention_switch, block_runner, create, embed
    from .checkpoints import backbone_weights
    from .hub import hub_config

    described = architecture(name)
    module, cfg = described.module, described.module.pretrained_cfg
    _require_heads(request, described.layers.blocks[0].attention.heads)

    def build() -> nn.Module:
        return attention_switch(create(name, dynamic_img_size=True), fused)

    return sinder.Backbone(
        name=request.model,
        layers=described.layers,
        weights=backbone_weights(name, described, weights),
        patch_size=described.patch_size,
        prefix_tokens=module.num_prefix_tokens,
        has_cls=module.cls_token is not None,
        image_size=described.image_size,
        build=build,
        embed=embed,
        run_block=block_runner(module),
        finish=lambda module, tokens: module.norm(tokens),
        forward=lambda module, images: module.forward_features(images),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        sidecars={"config.json": hub_config(name, module)},
        license=None if request.weights else cfg.get("license"),
    )


def _timm_name(request: sinder.ModelRequest) -> str:
    """Return timm's own name of the model. Raises `UnavailableError` without timm, `UsageError` for an unknown name."""
    name = request.model.removeprefix(PREFIX)
    sinder.define_torchvision_operators()
    try:
        import timm
    except Exception as error:  # a torchvision built for another torch fails in many ways
        why = f"timm cannot be imported ({type(error).__name__}: {error})"
        raise sinder.UnavailableError(f"cannot use {request.model}", why, "install sinder-cli[timm]") from error
    current = timm.models.get_deprecated_models().get(name, name)  # None for a name removed without a successor
    if current is None or not timm.is_model(current) or not _is_tagged(timm, current):
        names = [*timm.list_models(), *timm.list_models(pretrained=True)]  # without tags, and with them
        near = get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(PREFIX + other for other in near)}?" if near else "see timm.list_models()"
        raise sinder.UsageError(f"unknown model {request.model!r}", f"timm {timm.__version__} has no such name", hint)
    return str(current)


def _is_tagged(timm: Any, name: str) -> bool:
    """Return True if timm knows the tag of a name, which selects pretrained weights, or if there is no tag."""
    return "." not in name or bool(timm.list_models(name, include_tags=True))


def _fused(request: sinder.ModelRequest) -> bool:
    if request.attention == "xformers":
        why = "timm has only PyTorch's fused attention and an unfused one of its own"
        raise sinder.UsageError("cannot use xformers attention with timm", why, "use --attention sdpa or eager")
    return request.attention != "eager"


def _require_heads(request: sinder.ModelRequest, heads: int | None) -> None:
    if request.heads not in (None, heads):
        why = f"{request.model} has {heads}"
        raise sinder.UsageError(f"cannot use {request.heads} heads", why, "leave --heads out")
