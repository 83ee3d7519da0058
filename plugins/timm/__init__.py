"""Vision transformers of timm: every pre-norm `VisionTransformer`, and the `Eva` family, as `timm/NAME`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli import (
    Backbone,
    Listing,
    ModelRequest,
    UnavailableError,
    UsageError,
    Weights,
    define_torchvision_operators,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import nn

SINDER_API = 1

PREFIX = "timm/"
WELL_KNOWN = (Listing("timm/vit_large_patch14_dinov2.lvd142m", "DINOv2 as timm has it", 304_368_640, 14, 1, ("timm",)),)


@hookimpl
def sinder_listing() -> Sequence[Listing]:
    """A few of timm's names, and the form of all others."""
    form = Listing("timm/NAME", "any pre-norm VisionTransformer or Eva of timm's, by timm's name", requires=("timm",))
    return [*WELL_KNOWN, form]


@hookimpl
def sinder_weights(request: ModelRequest) -> Path:
    """The pretrained file that timm knows for `request.model`, downloaded once; none for what would be refused."""
    name = _timm_name(request)
    from .architecture import architecture
    from .hub import pretrained_file

    architecture(name)  # what cannot be described is not worth a download
    return pretrained_file(name, request)


@hookimpl
def sinder_backbone(request: ModelRequest, weights: Weights) -> Backbone:
    """Describe timm's module of this name as these weights fill it."""
    name = _timm_name(request)
    fused = _fused(request)
    from .architecture import architecture, attention_switch, block_runner, create, embed
    from .checkpoints import backbone_weights

    described = architecture(name)
    module, cfg = described.module, described.module.pretrained_cfg
    _require_heads(request, described.layers.blocks[0].attention.heads)

    def build() -> nn.Module:
        return attention_switch(create(name, dynamic_img_size=True), fused)

    return Backbone(
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
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        license=None if request.weights else cfg.get("license"),
    )


def _timm_name(request: ModelRequest) -> str:
    """timm's own name of the model. Raises `UnavailableError` without timm, `UsageError` for a name unknown to it."""
    define_torchvision_operators()
    try:
        import timm
    except Exception as error:  # a torchvision for another torch fails in many ways
        why = f"timm cannot be imported ({type(error).__name__}: {error})"
        raise UnavailableError(f"cannot use {request.model}", why, "install sinder-cli[timm]") from error
    name = request.model.removeprefix(PREFIX)
    known = timm.is_model(name) and (name == timm.models.get_arch_name(name) or timm.get_pretrained_cfg(name))
    if not known:
        import difflib

        near = difflib.get_close_matches(name, timm.list_models(pretrained=True), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(PREFIX + other for other in near)}?" if near else "see timm.list_models()"
        raise UsageError(f"unknown model {request.model!r}", f"timm {timm.__version__} has no such name", hint)
    return name


def _fused(request: ModelRequest) -> bool:
    if request.attention == "xformers":
        why = "timm has PyTorch's fused attention and its own, step by step"
        raise UsageError("cannot use xformers attention with timm", why, "use --attention sdpa or eager")
    return request.attention != "eager"


def _require_heads(request: ModelRequest, heads: int | None) -> None:
    if request.heads not in (None, heads):
        why = f"{request.model} has {heads}"
        raise UsageError(f"cannot use {request.heads} heads", why, "leave --heads out")
