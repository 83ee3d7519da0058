"""Configurations of DINOv2 transformers as plain data: the official sizes, and the tensors of each configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import prod
from typing import Literal

Shape = tuple[int, ...]

HEAD_WIDTH = 64  # of every official model


@dataclass(frozen=True)
class Config:
    """Sizes and parts of one model; all of them follow from the names and shapes of its tensors."""

    width: int
    depth: int
    hidden: int  # of the MLP; for SwiGLU the width of each of its two branches
    mlp: Literal["GELU", "SwiGLU"] = "GELU"
    registers: int = 0
    patch: int = 14
    grid: int = 37  # patches along one side of the position embedding: 518 px
    layer_scale: bool = True
    qkv_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    mask_token: bool = True


_SIZES = {
    "dinov2_vits14": Config(width=384, depth=12, hidden=1536),
    "dinov2_vitb14": Config(width=768, depth=12, hidden=3072),
    "dinov2_vitl14": Config(width=1024, depth=24, hidden=4096),
    "dinov2_vitg14": Config(width=1536, depth=40, hidden=4096, mlp="SwiGLU"),  # 2/3 · 4 · 1536
}
OFFICIAL = _SIZES | {f"{name}_reg": replace(config, registers=4) for name, config in _SIZES.items()}


def tensor_shapes(config: Config) -> dict[str, Shape]:
    """Return the name and shape of every tensor of the model's state dict, in the official order."""
    N = config.width
    shapes: dict[str, Shape] = {"cls_token": (1, 1, N), "pos_embed": (1, 1 + config.grid**2, N)}
    if config.registers:
        shapes["register_tokens"] = (1, config.registers, N)
    if config.mask_token:
        shapes["mask_token"] = (1, N)
    shapes |= _affine("patch_embed.proj", (N, 3, config.patch, config.patch))
    block = _block_shapes(config)
    for index in range(config.depth):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    return shapes | _affine("norm", (N,))


def parameter_count(config: Config) -> int:
    """Return the number of parameters, counting all tensors of the state dict."""
    return sum(prod(shape) for shape in tensor_shapes(config).values())


def differences(found: Config, expected: Config) -> dict[str, str]:
    """Return the differences by field, such as `{"width": "width 768 instead of 1024"}`."""
    pairs = {field.name: (getattr(found, field.name), getattr(expected, field.name)) for field in fields(Config)}
    return {name: f"{name} {_word(a)} instead of {_word(b)}" for name, (a, b) in pairs.items() if a != b}


def _block_shapes(config: Config) -> dict[str, Shape]:
    N, H = config.width, config.hidden
    scale: dict[str, Shape] = {"gamma": (N,)} if config.layer_scale else {}
    if config.mlp == "SwiGLU":
        mlp = _affine("mlp.w12", (2 * H, N), config.mlp_bias) | _affine("mlp.w3", (N, H), config.mlp_bias)
    else:
        mlp = _affine("mlp.fc1", (H, N), config.mlp_bias) | _affine("mlp.fc2", (N, H), config.mlp_bias)
    return {
        **_affine("norm1", (N,)),
        **_affine("attn.qkv", (3 * N, N), config.qkv_bias),
        **_affine("attn.proj", (N, N), config.proj_bias),
        **{f"ls1.{name}": shape for name, shape in scale.items()},
        **_affine("norm2", (N,)),
        **mlp,
        **{f"ls2.{name}": shape for name, shape in scale.items()},
    }


def _affine(name: str, weight: Shape, bias: bool = True) -> dict[str, Shape]:
    return {f"{name}.weight": weight} | ({f"{name}.bias": weight[:1]} if bias else {})


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "present" if value else "absent"
    return str(value)
