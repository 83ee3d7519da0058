"""Description of timm's transformer of a name: made without memory, with a layer map from its structure."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sinder_cli import LayerMap, PositionMap, StemMap, UsageError

from .blocks import InexpressibleError, Part, block_map, optional_norm

REMEDY = "choose a plain pre-norm ViT of timm's"


@dataclass(frozen=True)
class Architecture:
    """Facts about a model that are known without its weights; `module` is on the meta device."""

    module: VisionTransformer | Eva
    layers: LayerMap
    patch_size: int
    image_size: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}

    @property
    def classifiers(self) -> tuple[str, ...]:
        """The layers after the features, which a checkpoint may contain and the module lacks."""
        named = self.module.pretrained_cfg.get("classifier") or "head"
        return (named,) if isinstance(named, str) else tuple(named)


def create(name: str, **options: Any) -> nn.Module:
    """Return timm's module of a name, without its classifier, on torch's current device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about deprecated names of timm
        module: nn.Module = timm.create_model(name, num_classes=0, **options)
        return module


def architecture(name: str) -> Architecture:
    """Describe timm's model of a name. Raises `UsageError` for a model that no layer map can describe."""
    with torch.device("meta"):
        module = _any_size(name)
    try:
        return _described(module)
    except InexpressibleError as error:
        raise UsageError(f"cannot describe timm/{name}", str(error), REMEDY) from error


def _any_size(name: str) -> nn.Module:
    """Return the module for images of any size, or without that option if the model does not accept it."""
    try:
        return create(name, dynamic_img_size=True)
    except TypeError:
        return create(name)


def _described(module: nn.Module) -> Architecture:
    if not isinstance(module, VisionTransformer | Eva):
        raise InexpressibleError(structure(module))
    root = Part("", module)
    patch = _patch_size(module.patch_embed)
    blocks = tuple(block_map(Part(f"blocks.{index}", block)) for index, block in enumerate(module.blocks))
    prefix = 0 if module.no_embed_class else module.num_prefix_tokens
    layers = LayerMap(
        width=module.embed_dim,
        blocks=blocks,
        position=PositionMap(weight=root.tensor("pos_embed"), prefix=prefix) if root.has("pos_embed") else None,
        stem=_stem(root),
        norm=optional_norm(root, "norm"),
    )
    return Architecture(module, layers, patch, _whole_patches(min(module.patch_embed.img_size), patch))


def _stem(root: Part) -> StemMap | None:
    """Return the parts of the stem; None if it has a norm or a token for which a map has no field."""
    if root["patch_embed"].has("norm") or root.has("dist_token"):
        return None
    return StemMap(
        patch=root.tensor("patch_embed.proj.weight"),
        patch_bias=root["patch_embed.proj"].optional("bias"),
        cls=root.optional("cls_token"),
        registers=root.optional("reg_token"),
        norm=optional_norm(root, "norm_pre"),
    )


def _patch_size(stem: Any) -> int:
    """Return the side of a patch. Raises `InexpressibleError` unless the stem convolves single square RGB patches."""
    if type(stem) is not PatchEmbed:
        raise InexpressibleError(f"patch_embed is {type(stem).__name__}, not a projection of single patches")
    height, width = stem.patch_size
    if height != width or stem.proj.in_channels != 3:
        raise InexpressibleError(f"patch_embed takes {height}×{width} patches of {stem.proj.in_channels} channels")
    return int(height)


def _whole_patches(size: int, patch: int) -> int:
    return size - size % patch


def attention_switch(module: nn.Module, fused: bool) -> nn.Module:
    """Let every attention of a module run in PyTorch's fused kernel, or as separate operations; return the module."""
    switches: list[Any] = [part for part in module.modules() if hasattr(part, "fused_attn")]
    for part in switches:
        part.fused_attn = fused
    return module


def embed(module: VisionTransformer | Eva, images: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Return the tokens `[B, T, N]` before the first block of images `[B, 3, H, W]`, and the rotary embedding or None.

    Raises `ValueError` for an image that is not made of whole patches.
    """
    patch, sizes = module.patch_embed.patch_size[0], images.shape[-2:]
    if any(size % patch for size in sizes):
        raise ValueError(f"an image of {sizes[0]} × {sizes[1]} px is not made of patches of {patch} px")
    tokens = module._pos_embed(module.patch_embed(images))
    tokens, rope = tokens if isinstance(module, Eva) else (tokens, None)
    return module.norm_pre(tokens), rope


def block_runner(module: VisionTransformer | Eva) -> Callable[[Any, int, torch.Tensor, Any], torch.Tensor]:
    """Return a function that runs one block of a module; a mixed rotary embedding has a part for each block."""
    if isinstance(module, VisionTransformer):
        return lambda module, index, tokens, _: module.blocks[index](tokens)
    if module.rope_mixed:
        return lambda module, index, tokens, rope: module.blocks[index](tokens, rope=rope[index])
    return lambda module, index, tokens, rope: module.blocks[index](tokens, rope=rope)


def structure(module: nn.Module) -> str:
    """Return a phrase with block and reason, for a module that is neither VisionTransformer nor Eva."""
    block = _first_block(module)
    named = f"{block[0]} is {type(block[1]).__name__}" if block else f"it is {type(module).__name__}"
    return f"{named}, {_reason(module, block[1] if block else module)}"


def _first_block(module: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the first module with parameters whose class name ends in `Block` or `Layer`, with its name."""
    blocks = ((name, part) for name, part in module.named_modules() if type(part).__name__.endswith(("Block", "Layer")))
    return next(((name, part) for name, part in blocks if any(True for _ in part.parameters())), None)


def _reason(module: nn.Module, block: nn.Module) -> str:
    if any(isinstance(part, nn.Conv1d | nn.Conv2d) for part in block.modules()):
        return "which convolves: a layer map describes only attention and MLP"
    widths = [int(stage["num_chs"]) for stage in getattr(module, "feature_info", ())]
    if widths and widths[0] != widths[-1]:
        return (
            f"and its width grows from {widths[0]} to {widths[-1]}: a hierarchical model has no single residual stream"
        )
    return f"and {type(module).__name__} is neither timm's VisionTransformer nor its Eva"
