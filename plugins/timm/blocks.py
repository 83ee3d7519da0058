"""The blocks that timm builds transformers of, and their parts, each as a layer map describes it.

A class that is in none of the tables is refused: what it computes is not known. A norm between value and output
(`attn.norm`), or behind the hidden layer (`mlp.norm`), is linear up to its scale, as LayerNorm is:
y ↦ g ⊙ (y − mean y) / s(y) + b. It goes into the map as the sub-layer's `inner_norm`, and the linearization folds it in
as the matrix diag(g) (I − 11ᵀ/F) / s, with one s for all tokens: the root of the mean of s(y)² over Gaussian inputs. A
gate there depends on the token in another way, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import timm.layers as layers
from timm.models import eva, vision_transformer
from timm.models.eva import EvaAttention
from torch import nn

from sinder_cli import AttentionMap, BlockMap, GatedMlpMap, NormMap, PlainMlpMap, WeightRef

Rows = tuple[int, int]


class InexpressibleError(Exception):
    """A layer map cannot describe a part; the message names the part and the reason."""


@dataclass(frozen=True)
class Part:
    """A module with its path, so that its tensors get the same names as in the state dict."""

    name: str
    module: nn.Module

    def __getitem__(self, child: str) -> Part:
        return Part(self._named(child), self.module.get_submodule(child))

    @property
    def kind(self) -> str:
        """Path and class for messages: `blocks.0.attn is DiffAttention`."""
        return f"{self.name} is {type(self.module).__name__}"

    def has(self, child: str) -> bool:
        """Return True if there is such a part or tensor, and it is not `nn.Identity`."""
        found = getattr(self.module, child, None)
        return found is not None and not isinstance(found, nn.Identity)

    def tensor(self, name: str, rows: Rows | None = None) -> WeightRef:
        return WeightRef(name=self._named(name), rows=rows)

    def optional(self, name: str, rows: Rows | None = None) -> WeightRef | None:
        return self.tensor(name, rows) if self.has(name) else None

    def _named(self, child: str) -> str:
        return f"{self.name}.{child}" if self.name else child


ATTENTIONS = (layers.Attention, layers.AttentionRope, EvaAttention)

NORMS = {
    nn.LayerNorm: "layernorm",
    layers.LayerNorm: "layernorm",
    layers.LayerNormFp32: "layernorm",
    nn.RMSNorm: "rmsnorm",
    layers.RmsNorm: "rmsnorm",
    layers.RmsNormFp32: "rmsnorm",
}

ACTIVATIONS = {
    layers.GELU: "gelu",
    layers.GELUTanh: "gelu_tanh",
    layers.QuickGELU: "quick_gelu",
    nn.SiLU: "silu",
    layers.Swish: "silu",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    layers.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    layers.Tanh: "tanh",
}
ELEMENTWISE = (  # functions without weights and without a name in a layer map, which then holds the function itself
    nn.CELU, nn.ELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU6,
    nn.SELU, nn.Softplus, nn.Softsign, layers.HardMish, layers.HardSigmoid, layers.HardSwish, layers.Mish,
)  # fmt: skip


def _listed(kinds: Iterable[type]) -> str:
    return ", ".join(kind.__name__ for kind in kinds)


def norm_map(part: Part) -> NormMap:
    """Return the map of a LayerNorm or RMSNorm. Raises `InexpressibleError` for another class."""
    kind = NORMS.get(type(part.module))
    if kind is None:
        raise InexpressibleError(f"{part.kind}, neither LayerNorm nor RMSNorm")
    norm: Any = part.module
    return NormMap.model_validate(
        {"kind": kind, "weight": part.optional("weight"), "bias": part.optional("bias"), "eps": norm.eps}
    )


def optional_norm(part: Part, child: str) -> NormMap | None:
    return norm_map(part[child]) if part.has(child) else None


def activation(part: Part) -> str | Callable[..., Any]:
    """Return the name of an activation, or the function itself if a layer map has no name for it."""
    function = part.module
    if type(function) is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    if type(function) in ACTIVATIONS:
        return ACTIVATIONS[type(function)]
    if type(function) in ELEMENTWISE:
        return function
    raise InexpressibleError(f"{part.kind}, which is not known to be elementwise")


def attention_fields(part: Part) -> dict[str, Any]:
    """Return the fields of an `AttentionMap`, except norm and scale.

    Norms of queries and keys are left out, since they affect only the mixing.
    """
    attention: Any = part.module
    if type(attention) not in ATTENTIONS:
        raise InexpressibleError(f"{part.kind}, none of {_listed(ATTENTIONS)}")
    if part.has("gate"):
        raise InexpressibleError(f"{part.name} multiplies its values by a gate that depends on the token")
    if getattr(attention, "num_kv_groups", 1) > 1:
        heads = f"{attention.num_kv_heads} value heads for {attention.num_heads} heads"
        raise InexpressibleError(f"{part.name} shares values between heads ({heads}): value and output widths differ")
    return {
        **(_fused(part) if part.has("qkv") else _split(part)),
        "output": part.tensor("proj.weight"),
        "output_bias": part["proj"].optional("bias"),
        "inner_norm": optional_norm(part, "norm"),
        "heads": attention.num_heads,
        "mixing": "plain" if type(attention) is layers.Attention and not part.has("q_norm") else "other",
    }


def _fused(part: Part) -> dict[str, Any]:
    qkv = part["qkv"]
    third = _rows(qkv) // 3
    rows = {"query": (0, third), "key": (third, 2 * third), "value": (2 * third, 3 * third)}
    weights = {role: qkv.tensor("weight", at) for role, at in rows.items()}
    if part.has("q_bias"):  # EVA has no bias for keys
        return weights | {"query_bias": part.tensor("q_bias"), "value_bias": part.tensor("v_bias")}
    return weights | {f"{role}_bias": qkv.optional("bias", at) for role, at in rows.items()}


def _rows(linear: Part) -> int:
    layer: Any = linear.module
    return int(layer.out_features)


def _split(part: Part) -> dict[str, Any]:
    layers = {"query": part["q_proj"], "key": part["k_proj"], "value": part["v_proj"]}
    weights = {role: layer.tensor("weight") for role, layer in layers.items()}
    return weights | {f"{role}_bias": layer.optional("bias") for role, layer in layers.items()}


def mlp_map(part: Part, norm: NormMap, scale: WeightRef | None) -> PlainMlpMap | GatedMlpMap:
    """Return the map of an MLP by its class, with the norm before it and the LayerScale after it."""
    described = MLPS.get(type(part.module))
    if described is None:
        raise InexpressibleError(f"{part.kind}, none of {_listed(MLPS)}")
    fields = {
        "norm": norm,
        "activation": activation(part["act"]),
        "down": part.tensor("fc2.weight"),
        "down_bias": part["fc2"].optional("bias"),
        "scale": scale,
        "inner_norm": optional_norm(part, "norm"),
    }
    return described(part, fields)


def _plain(part: Part, fields: dict[str, Any]) -> PlainMlpMap:
    return PlainMlpMap(up=part.tensor("fc1.weight"), up_bias=part["fc1"].optional("bias"), **fields)


def _packed(part: Part, fields: dict[str, Any]) -> GatedMlpMap:
    """Return the map of an MLP with gate and up in one projection, in either order."""
    half = _rows(part["fc1"]) // 2
    first, second = (0, half), (half, 2 * half)
    gate, up = (second, first) if part.module.gate_last else (first, second)
    return GatedMlpMap(
        gate=part.tensor("fc1.weight", gate),
        gate_bias=part["fc1"].optional("bias", gate),
        up=part.tensor("fc1.weight", up),
        up_bias=part["fc1"].optional("bias", up),
        **fields,
    )


def _gated(part: Part, fields: dict[str, Any]) -> GatedMlpMap:
    return GatedMlpMap(
        gate=part.tensor("fc1_g.weight"),
        gate_bias=part["fc1_g"].optional("bias"),
        up=part.tensor("fc1_x.weight"),
        up_bias=part["fc1_x"].optional("bias"),
        **fields,
    )


MLPS: dict[type, Callable[[Part, dict[str, Any]], PlainMlpMap | GatedMlpMap]] = {
    layers.Mlp: _plain,
    layers.GluMlp: _packed,
    layers.SwiGLU: _gated,
}


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
