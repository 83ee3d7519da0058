"""Small models of timm's, one of each kind, with every tensor random, so that a mix-up shows."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import GluMlp
from timm.models import model_entrypoint, register_model
from torch import Tensor, nn

SIZES = {"depth": 3, "embed_dim": 64, "num_heads": 4}
GATE_LAST = partial(GluMlp, act_layer=nn.GELU, gate_last=True)

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_small_patch16_224", {}),
    "no_bias": ("vit_small_patch16_224", {"qkv_bias": False, "proj_bias": False}),
    "no_cls": ("vit_small_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "no_positions": ("vit_small_patch16_224", {"pos_embed": "none"}),
    "distilled": ("deit_small_distilled_patch16_224", {}),
    "layer_scale": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "packed": ("vit_giant_patch14_reg4_dinov2", {"mlp_ratio": 5.5}),
    "gate_last": ("vit_small_patch16_224", {"mlp_layer": GATE_LAST}),
    "swiglu": ("aimv2_large_patch14_224", {}),
    "scaling": ("vit_base_patch16_xp_224", {}),
    "scaling_mlp_bias": ("vit_base_patch16_xp_224", {"qkv_bias": False, "init_values": 1e-5}),
    "things": ("vit_small_patch16_18x2_224", {"init_values": 1e-5}),
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "gap": ("vit_huge_patch14_gap_224", {}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {}),
    "pooled": ("vit_base_patch16_siglip_224", {}),
    "beit3": ("beit3_base_patch16_224", {}),
    "eva": ("eva_giant_patch14_224", {"mlp_ratio": 4}),
    "eva02": ("eva02_base_patch14_224", {}),
    "eva02_clip": ("eva02_base_patch16_clip_224", {}),
    "eva02_packed": ("eva02_small_patch14_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3_qkv_bias": ("vit_small_patch16_dinov3_qkvb", {}),
    "dinov3_swiglu": ("vit_small_plus_patch16_dinov3", {}),
    "mixed_rope": ("vit_small_patch16_rope_mixed_224", {}),
    "axial_rope": ("vit_base_patch16_rope_reg1_gap_256", {}),
    "perception": ("vit_pe_core_base_patch16_224", {}),
    "sapiens": ("vit_base_patch16_sapiens2", {"num_kv_heads": None}),
}
GRIDS = 5  # patches along a side


def registered(kind: str) -> str:
    """The name under which a small model of a kind is timm's; the same function with smaller sizes."""
    base, options = KINDS[kind]
    patch = 14 if "patch14" in base else 16
    smaller = SIZES | {"img_size": GRIDS * patch} | options

    def entry(pretrained: bool = False, **given: Any) -> nn.Module:
        model: nn.Module = model_entrypoint(base)(pretrained=pretrained, **(smaller | given))
        return model

    entry.__name__ = f"small_{kind}"
    register_model(entry)
    return entry.__name__


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    NAMES = {kind: registered(kind) for kind in KINDS}


def random_tensors(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, tensor in module.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 1 and name.endswith("weight"):  # of norms
            values = 1 + 0.2 * values
        elif tensor.ndim > 1 and name.endswith("weight"):
            values *= tensor[0].numel() ** -0.5
        drawn[name] = values
    return drawn


def made(name: str, **options: Any) -> nn.Module:
    """A module of timm's in evaluation mode, filled with random tensors."""
    module: nn.Module = timm.create_model(name, **({"num_classes": 0} | options)).eval().requires_grad_(False)
    module.load_state_dict(random_tensors(module), strict=True)
    return module
