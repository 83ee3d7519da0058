"""DINOv2: the eight official models, and any checkpoint of the same architecture as `dinov2_custom`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import sinder_cli as sinder

from .config import HEAD_WIDTH, OFFICIAL, Config, differences, parameter_count, tensor_shapes

if TYPE_CHECKING:
    from torch import nn

SINDER_API = 1

CUSTOM = "dinov2_custom"
LICENSE = "apache-2.0"  # of the official weights
BASE_URL = "https://dl.fbaipublicfiles.com/dinov2"


@sinder.hookimpl
def sinder_listing() -> Sequence[sinder.Listing]:
    """List the official models with and without registers, and `dinov2_custom`."""
    official = [
        sinder.Listing(name, _summary(config), parameter_count(config), config.patch, 1 + config.registers)
        for name, config in OFFICIAL.items()
    ]
    return [
        *official,
        sinder.Listing(CUSTOM, "any DINOv2 checkpoint, given with --weights; its sizes are read from it"),
    ]


@sinder.hookimpl
def sinder_weights(request: sinder.ModelRequest) -> Path:
    """Return the official checkpoint of `request.model`, downloaded once."""
    if request.model == CUSTOM:
        raise sinder.UsageError(
            f"no weights for {CUSTOM}", "it has no official checkpoint", "name a file with --weights"
        )
    return sinder.download(official_url(request.model), request.emit)


@sinder.hookimpl
def sinder_backbone(request: sinder.ModelRequest, weights: sinder.Weights) -> sinder.Backbone:
    """Describe the transformer in a checkpoint; for an official name it must be exactly that model."""
    from .checkpoints import canonical, hub_source, infer_config
    from .layers import layer_map

    weights = canonical(weights)
    config = infer_config(weights)
    if request.model in OFFICIAL:
        _require_official(request.model, config, weights)
    sinder.require_matching(tensor_shapes(config), weights, request.model)
    heads = _heads(request, config)

    def build() -> nn.Module:
        from .module import VisionTransformer

        return VisionTransformer(config, heads, sinder.attention_kernel(request.attention))

    return sinder.Backbone(
        name=request.model,
        layers=layer_map(config, heads),
        weights=weights,
        patch_size=config.patch,
        prefix_tokens=1 + config.registers,
        has_cls=True,
        image_size=config.grid * config.patch,
        build=build,
        embed=lambda module, images: (module.embed(images), None),
        run_block=lambda module, index, tokens, _: module.blocks[index](tokens),
        finish=lambda module, tokens: module.norm(tokens),
        forward=lambda module, images: module(images),
        license=LICENSE if request.model in OFFICIAL else None,
        hub_source=lambda: hub_source(config, heads),
    )


def official_url(model: str) -> str:
    """Return the URL of the checkpoint of an official model."""
    plain = model.removesuffix("_reg")
    registers = OFFICIAL[model].registers
    return f"{BASE_URL}/{plain}/{plain}{f'_reg{registers}' if registers else ''}_pretrain.pth"


def _summary(config: Config) -> str:
    registers = f", {config.registers} registers" if config.registers else ""
    return f"DINOv2, {config.depth} blocks of width {config.width}, {config.mlp} MLP{registers}"


def _require_official(model: str, found: Config, weights: sinder.Weights) -> None:
    """Raise `BadInputError` if the weights have another architecture than the model, naming it if it is official."""
    differing = differences(found, OFFICIAL[model])
    if not differing:
        return
    owner = next((name for name, config in OFFICIAL.items() if config == found), None)
    if owner:
        sizes = {"width": f"width {found.width}", "depth": f"depth {found.depth}"}
        telling = [
            size for name, size in (sizes | {"registers": f"{found.registers} registers"}).items() if name in differing
        ]
        why, remedy = f"it is {owner}, with {_listed(telling)}", f"name the model {owner}"
    else:
        why, remedy = f"it has {_listed(list(differing.values()))}", f"{CUSTOM} takes such checkpoints"
    raise sinder.BadInputError(f"weights {weights.source.label} do not fit {model}", why, remedy)


def _heads(request: sinder.ModelRequest, config: Config) -> int:
    """Return the number of attention heads, which no tensor shows: the user's, or width / 64 as in official models."""
    usual, odd = divmod(config.width, HEAD_WIDTH)
    heads = usual if request.heads is None else request.heads
    if request.model in OFFICIAL and heads != usual:
        raise sinder.UsageError(f"cannot use {heads} heads", f"{request.model} has {usual}", "leave --heads out")
    if request.heads is None and odd:
        why = f"width {config.width} is no multiple of {HEAD_WIDTH}"
        raise sinder.UsageError(f"cannot tell the number of heads of {request.model}", why, "give --heads")
    if heads < 1 or config.width % heads:
        raise sinder.UsageError(
            f"cannot use {heads} heads", f"they do not divide width {config.width}", "give other --heads"
        )
    return heads


def _listed(phrases: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
