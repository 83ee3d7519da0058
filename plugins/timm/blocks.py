"""Layer maps of the blocks of timm's transformers.

A norm between value and output (`attn.norm`), or after the hidden layer (`mlp.norm`), is linear except for its scale,
as LayerNorm is: y ↦ g ⊙ (y − mean y) / s(y) + b. The map has it as `inner_norm` of the sub-layer, and the linearization
includes it as the matrix diag(g) (I − 11ᵀ/F) / s, with one s for all tokens: the root of the mean of s(y)² over
Gaussian inputs. A gate in that place depends on the token in another way, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import eva, vision_transformer
from torch import nn

from sinder_cli import AttentionMap, BlockMap, PlainMlpMap, WeightRef

from .parts import InexpressibleError, Part, activation, attention_fields, mlp_map, norm_map


def block_map(part: Part) -> BlockMap:
    """Return the map of one block by its class. Raises `InexpressibleError`, which names what no map can describe."""
    kind = type(part.module)
    if kind in BLOCKS:
        return BLOCKS[kind](part)
    others = f"none of {', '.join(known.__name__ for known in BLOCKS)}"
    raise InexpressibleError(f"{part.kind}, {REASONS.get(kind.__name__, others)}")


def _block(part: Part) -> BlockMap:
    return BlockMap(
        attention=AttentionMap(
            norm=norm_map(part["norm1"]), scale=_layer_scale(part, "ls1"), **attention_fields(part["attn"])
        ),
        mlp=mlp_map(part["mlp"], norm_map(part["norm2"]), _layer_scale(part, "ls2")),
    )


def _eva_block(part: Part) -> BlockMap:
    return BlockMap(
        attention=AttentionMap(
            norm=norm_map(part["norm1"]), scale=part.optional("gamma_1"), **attention_fields(part["attn"])
        ),
        mlp=mlp_map(part["mlp"], norm_map(part["norm2"]), part.optional("gamma_2")),
    )


def _things_block(part: Part) -> BlockMap:
    """Return the map of a block with several attentions side by side, then several MLPs side by side."""
    count: Any = part.module
    beside: BlockMap | None = None
    for index in reversed(range(count.num_parallel)):
        attention, mlp = part[f"attns.{index}"], part[f"ffns.{index}"]
        beside = BlockMap(
            attention=AttentionMap(
                norm=norm_map(attention["norm"]),
                scale=_layer_scale(attention, "ls"),
                **attention_fields(attention["attn"]),
            ),
            mlp=mlp_map(mlp["mlp"], norm_map(mlp["norm"]), _layer_scale(mlp, "ls")),
            beside=beside,
        )
    if beside is None:
        raise InexpressibleError(f"{part.kind} without sub-layers")
    return beside


def _scaling_block(part: Part) -> BlockMap:
    """Return the map of attention and MLP in parallel after one norm.

    One projection holds the hidden layer, queries, keys and values.
    """
    block: Any = part.module
    if part.has("out_proj"):
        raise InexpressibleError(f"{part.name}.out_proj is a single output projection of attention and MLP")
    hidden, *widths = block.in_split
    query, key, value = ((start, start + width) for start, width in zip(_starts(hidden, widths), widths, strict=True))
    in_proj, norm, scale = part["in_proj"], norm_map(part["in_norm"]), _layer_scale(part, "ls")
    attention = AttentionMap(
        norm=norm,
        query=in_proj.tensor("weight", query),
        key=in_proj.tensor("weight", key),
        value=in_proj.tensor("weight", value),
        query_bias=in_proj.optional("bias", query),
        key_bias=in_proj.optional("bias", key),
        value_bias=in_proj.optional("bias", value),
        output=part.tensor("attn_out_proj.weight"),
        output_bias=part["attn_out_proj"].optional("bias"),
        scale=scale,
        heads=block.num_heads,
    )
    mlp = PlainMlpMap(
        norm=norm,
        activation=activation(part["mlp_act"]),
        up=in_proj.tensor("weight", (0, hidden)),
        up_bias=part.optional("mlp_bias") or in_proj.optional("bias", (0, hidden)),
        down=part.tensor("mlp_out_proj.weight"),
        down_bias=part["mlp_out_proj"].optional("bias"),
        scale=scale,
    )
    return BlockMap(attention=attention, mlp=mlp, parallel=True)


def _starts(first: int, widths: list[int]) -> list[int]:
    return [first + sum(widths[:index]) for index in range(len(widths))]


def _layer_scale(part: Part, child: str) -> WeightRef | None:
    return part.tensor(f"{child}.gamma") if part.has(child) else None


BLOCKS: dict[type[nn.Module], Callable[[Part], BlockMap]] = {
    vision_transformer.Block: _block,
    vision_transformer.ParallelScalingBlock: _scaling_block,
    vision_transformer.ParallelThingsBlock: _things_block,
    eva.EvaBlock: _eva_block,
}

POST_NORM = "which normalizes after its sub-layers: only pre-norm blocks can be linearized"
REASONS = {  # by class name, since not every release of timm has all of these classes
    "ResPostBlock": POST_NORM,
    "EvaBlockPostNorm": POST_NORM,
    "DiffParallelScalingBlock": "whose attention is the difference of two, normalized by head",
}
