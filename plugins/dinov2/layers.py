"""The layer map of DINOv2: the role of each tensor."""

from __future__ import annotations

from sinder_cli import (
    AttentionMap,
    BlockMap,
    GatedMlpMap,
    LayerMap,
    NormMap,
    PlainMlpMap,
    PositionMap,
    StemMap,
    WeightRef,
)

from .config import Config


def layer_map(config: Config, heads: int) -> LayerMap:
    """Return the layer map of the whole model; the position embedding has one row for cls and none for registers."""
    return LayerMap(
        width=config.width,
        blocks=tuple(_block(config, heads, f"blocks.{index}") for index in range(config.depth)),
        position=PositionMap(weight=WeightRef(name="pos_embed"), prefix=1),
        stem=StemMap(
            patch=WeightRef(name="patch_embed.proj.weight"),
            patch_bias=WeightRef(name="patch_embed.proj.bias"),
            cls=WeightRef(name="cls_token"),
            registers=_optional("register_tokens" if config.registers else None),
            mask=_optional("mask_token" if config.mask_token else None),
        ),
        norm=_norm("norm"),
    )


def _block(config: Config, heads: int, block: str) -> BlockMap:
    return BlockMap(attention=_attention(config, heads, block), mlp=_mlp(config, block))


def _attention(config: Config, heads: int, block: str) -> AttentionMap:
    N = config.width
    qkv, bias = f"{block}.attn.qkv.weight", f"{block}.attn.qkv.bias" if config.qkv_bias else None
    query, key, value = (0, N), (N, 2 * N), (2 * N, 3 * N)
    return AttentionMap(
        norm=_norm(f"{block}.norm1"),
        query=WeightRef(name=qkv, rows=query),
        key=WeightRef(name=qkv, rows=key),
        value=WeightRef(name=qkv, rows=value),
        output=WeightRef(name=f"{block}.attn.proj.weight"),
        query_bias=_optional(bias, query),
        key_bias=_optional(bias, key),
        value_bias=_optional(bias, value),
        output_bias=_optional(f"{block}.attn.proj.bias" if config.proj_bias else None),
        scale=_optional(f"{block}.ls1.gamma" if config.layer_scale else None),
        heads=heads,
    )


def _mlp(config: Config, block: str) -> PlainMlpMap | GatedMlpMap:
    H = config.hidden
    norm = _norm(f"{block}.norm2")
    scale = _optional(f"{block}.ls2.gamma" if config.layer_scale else None)
    first, last = ("w12", "w3") if config.mlp == "SwiGLU" else ("fc1", "fc2")
    first_weight, last_weight = f"{block}.mlp.{first}.weight", WeightRef(name=f"{block}.mlp.{last}.weight")
    first_bias, last_bias = (f"{block}.mlp.{layer}.bias" if config.mlp_bias else None for layer in (first, last))
    if config.mlp == "SwiGLU":
        gate, up = (0, H), (H, 2 * H)
        return GatedMlpMap(
            norm=norm,
            activation="silu",
            gate=WeightRef(name=first_weight, rows=gate),
            gate_bias=_optional(first_bias, gate),
            up=WeightRef(name=first_weight, rows=up),
            up_bias=_optional(first_bias, up),
            down=last_weight,
            down_bias=_optional(last_bias),
            scale=scale,
        )
    return PlainMlpMap(
        norm=norm,
        activation="gelu",
        up=WeightRef(name=first_weight),
        up_bias=_optional(first_bias),
        down=last_weight,
        down_bias=_optional(last_bias),
        scale=scale,
    )


def _norm(name: str) -> NormMap:
    return NormMap(weight=WeightRef(name=f"{name}.weight"), bias=WeightRef(name=f"{name}.bias"))


def _optional(name: str | None, rows: tuple[int, int] | None = None) -> WeightRef | None:
    return None if name is None else WeightRef(name=name, rows=rows)
