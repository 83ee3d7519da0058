"""A backbone in the terms of other libraries: sizes and switches, names of tensors, and how to make these tensors.

q, k, v      fused in this order, if a layout gives all three one name
gate, up     fused with the gate first, if both have one name
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from sinder_cli.backbone.contract import (
    Backbone,
    BlockMap,
    GatedMlpMap,
    LayerMap,
    NormMap,
    StemMap,
    WeightRef,
    references,
)
from sinder_cli.errors import BadInputError
from sinder_cli.exporting.conversion import Recipe, part, reshaped

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Layout:
    """Names of one library's tensors: `block` precedes those in a block, `.weight` or `.bias` follows those of layers.

    `position_prefix` is the number of rows at the start of its position embedding that belong to no patch. If a layout
    requires a tensor that a backbone lacks, it is filled in so that nothing changes: masks and biases with zeros,
    LayerScale with ones. A mask token, which only pre-training uses, is dropped if the layout has no name for it.
    """

    cls: str
    position: str
    patch: str
    norm: str
    block: str
    norm1: str
    query: str
    key: str
    value: str
    output: str
    norm2: str
    up: str
    down: str
    gate: str = ""
    scale1: str = ""
    scale2: str = ""
    registers: str = ""
    mask: str = ""
    position_prefix: int = 1
    required: frozenset[str] = frozenset()  # of "mask", "scale", and names of biases such as "output_bias"


def recipes(layout: Layout, backbone: Backbone, architecture: Architecture) -> dict[str, Recipe]:
    """Return the recipes of the layout's tensors by name, in the order of a forward pass."""
    made = dict(_stem(layout, backbone, architecture))
    for index, block in enumerate(backbone.layers.blocks):
        made |= dict(_block(layout, backbone, architecture, block, layout.block.format(index)))
    assert backbone.layers.norm is not None
    return made | _norm(layout.norm, backbone, backbone.layers.norm)


def _stem(layout: Layout, backbone: Backbone, architecture: Architecture) -> Iterator[tuple[str, Recipe]]:
    stem, weights, N = stem_of(backbone), backbone.weights, architecture.width
    position = backbone.layers.position
    assert position is not None
    assert stem.cls is not None
    before, wanted, registers = position.prefix, layout.position_prefix, architecture.registers
    rows = architecture.grid**2
    yield layout.cls, Recipe((1, 1, N), (stem.cls, position.weight), _with_position(before, wanted, 0, 1))
    if stem.registers:
        make = _with_position(before, wanted, 1, registers)
        yield layout.registers, Recipe((1, registers, N), (stem.registers, position.weight), make)
    if layout.mask and (stem.mask or "mask" in layout.required):
        yield layout.mask, reshaped(weights, stem.mask, 1, N) if stem.mask else Recipe((1, N))
    yield layout.position, Recipe((1, wanted + rows, N), (position.weight,), _positions(before, wanted, N))
    yield f"{layout.patch}.weight", reshaped(weights, stem.patch, N, 3, architecture.patch, architecture.patch)
    if stem.patch_bias:
        yield f"{layout.patch}.bias", part(weights, stem.patch_bias)
    else:
        yield f"{layout.patch}.bias", Recipe((N,))


def _with_position(before: int, wanted: int, first: int, count: int) -> Make:
    """Return a function that adds to prefix tokens the position rows that the other library has no place for."""

    def make(tokens: Tensor, position: Tensor) -> Tensor:
        tokens = tokens.reshape(count, -1)
        rows = position.reshape(-1, position.shape[-1])[:before][first : first + count]
        if not len(rows) or first + count <= wanted:
            return tokens
        return tokens + rows

    return make


def _positions(before: int, wanted: int, width: int) -> Make:
    """Return a function that puts `wanted` rows before those of the patches: the ones that were there, or zeros."""

    def make(position: Tensor) -> Tensor:
        import torch

        rows = position.reshape(-1, width)
        kept = rows[: min(before, wanted)]
        empty = rows.new_zeros(wanted - len(kept), width)
        return torch.cat([kept, empty, rows[before:]])

    return make


def _block(
    layout: Layout, backbone: Backbone, architecture: Architecture, block: BlockMap, at: str
) -> Iterator[tuple[str, Recipe]]:
    roles = dict(references(block))
    attention = {layout.query: ["query"], layout.key: ["key"], layout.value: ["value"]}
    if layout.query == layout.value:
        attention = {layout.query: ["query", "key", "value"]}
    mlp = {layout.up: ["up"]}
    if architecture.gated:
        mlp = {layout.up: ["gate", "up"]} if layout.gate == layout.up else {layout.gate: ["gate"], layout.up: ["up"]}
    yield from _norm(at + layout.norm1, backbone, block.attention.norm).items()
    for name, parts in attention.items():
        yield from _linear(at + name, backbone, roles, "attention", parts, layout.required)
    yield from _linear(at + layout.output, backbone, roles, "attention", ["output"], layout.required)
    yield from _scale(at + layout.scale1, layout, backbone, block.attention.scale, architecture)
    yield from _norm(at + layout.norm2, backbone, block.mlp.norm).items()
    for name, parts in mlp.items():
        yield from _linear(at + name, backbone, roles, "mlp", parts, layout.required)
    yield from _linear(at + layout.down, backbone, roles, "mlp", ["down"], layout.required)
    yield from _scale(at + layout.scale2, layout, backbone, block.mlp.scale, architecture)


def _linear(
    name: str, backbone: Backbone, roles: dict[str, WeightRef], layer: str, parts: list[str], required: frozenset[str]
) -> Iterator[tuple[str, Recipe]]:
    """Yield weight and bias of a linear layer, its parts stacked; a bias that some parts lack is filled with zeros."""
    weight = part(backbone.weights, *(roles[f"{layer}.{role}"] for role in parts))
    yield f"{name}.weight", weight
    biases = [roles.get(f"{layer}.{role}_bias") for role in parts]
    given = [bias for bias in biases if bias is not None]
    if len(given) == len(parts):
        yield f"{name}.bias", part(backbone.weights, *given)
    elif given:
        sizes = [part(backbone.weights, roles[f"{layer}.{role}"]).shape[0] for role in parts]
        present = [bias is not None for bias in biases]
        yield f"{name}.bias", Recipe((sum(sizes),), tuple(given), _filled_up(sizes, present))
    elif any(f"{role}_bias" in required for role in parts):
        yield f"{name}.bias", Recipe((weight.shape[0],))


def _filled_up(sizes: list[int], present: list[bool]) -> Make:
    """Return a function that stacks biases, with zeros for those that are absent."""

    def make(*given: Tensor) -> Tensor:
        import torch

        left = iter(given)
        rows = zip(sizes, present, strict=True)
        return torch.cat([next(left) if there else given[0].new_zeros(size) for size, there in rows])

    return make


def _scale(
    name: str, layout: Layout, backbone: Backbone, ref: WeightRef | None, architecture: Architecture
) -> Iterator[tuple[str, Recipe]]:
    if ref is not None:
        yield name, part(backbone.weights, ref)
    elif "scale" in layout.required:
        yield name, Recipe((architecture.width,), fill=1.0)


def _norm(name: str, backbone: Backbone, norm: NormMap) -> dict[str, Recipe]:
    assert norm.weight is not None
    assert norm.bias is not None
    return {f"{name}.weight": part(backbone.weights, norm.weight), f"{name}.bias": part(backbone.weights, norm.bias)}


@dataclass(frozen=True)
class Architecture:
    """A pre-norm ViT whose blocks are all alike, with learned positions and plain attention.

    `position_prefix` is the number of rows at the start of the position embedding that belong to no patch; `biases` are
    the biases that a block has, by role, such as `attention.value_bias`.
    """

    width: int
    depth: int
    heads: int
    hidden: int  # of the MLP; for a gated one, of each of its two branches
    patch: int
    grid: int  # patches along one side of the position embedding
    registers: int
    position_prefix: int
    gated: bool
    activation: str
    eps: float
    layer_scale: bool
    biases: frozenset[str]
    has_mask: bool
    has_stem_norm: bool

    @property
    def image_size(self) -> int:
        """Pixels along a side of the square that the position embedding is made for."""
        return self.grid * self.patch


def architecture_of(backbone: Backbone, target: str) -> Architecture:
    """Return what the layer map describes. Raises `BadInputError` with the reason why `target` cannot hold it."""

    def refuse(why: str) -> NoReturn:
        raise BadInputError(f"cannot export {backbone.name} to {target}", why, "use --to native")

    layers, stem = backbone.layers, backbone.layers.stem
    for unlike in _unlike(layers):
        refuse(unlike)
    if stem is None or layers.norm is None:
        refuse("its plugin does not name its stem and its final norm")
    if layers.position is None:
        refuse("it has no learned position embedding")
    if stem.cls is None:
        refuse("it has no cls token")
    block, weights = layers.blocks[0], backbone.weights
    if block.attention.heads is None:
        refuse("its plugin does not say how many heads it has")
    if callable(block.mlp.activation):
        refuse("its activation has no name")
    shape = weights.shape(layers.position.weight.name)
    patches = math.prod(shape[:-1]) - layers.position.prefix
    registers = backbone.prefix_tokens - 1
    if layers.position.prefix not in (0, 1, 1 + registers):
        refuse(f"{layers.position.prefix} rows of its position embedding belong to no patch")
    if math.isqrt(patches) ** 2 != patches:
        refuse(f"its {patches} positions do not form a square")
    if bool(registers) != (stem.registers is not None):
        refuse(f"{registers} of its tokens are neither cls nor registers nor patches")
    hidden = _rows(backbone, block, "mlp.up")
    if _rows(backbone, block, "attention.value") != layers.width:
        refuse("its values are not as wide as its tokens")
    return Architecture(
        width=layers.width,
        depth=backbone.depth,
        heads=block.attention.heads,
        hidden=hidden,
        patch=backbone.patch_size,
        grid=math.isqrt(patches),
        registers=registers,
        position_prefix=layers.position.prefix,
        gated=isinstance(block.mlp, GatedMlpMap),
        activation=str(block.mlp.activation),
        eps=layers.norm.eps,
        layer_scale=block.attention.scale is not None,
        biases=frozenset(role for role, _ in references(block) if role.endswith("_bias")),
        has_mask=stem.mask is not None,
        has_stem_norm=stem.norm is not None,
    )


def _unlike(layers: LayerMap) -> Iterator[str]:
    """Yield in words what no other library's ViT has."""
    first = _shape(layers.blocks[0])
    for index, block in enumerate(layers.blocks):
        if _shape(block) != first:
            yield f"block {index} differs from block 0 in its structure"
        if block.parallel or block.beside:
            yield f"block {index} has sub-layers that run in parallel"
        if block.attention.inner_norm or block.mlp.inner_norm:
            yield f"block {index} has a norm inside a sub-layer"
        if block.attention.mixing != "plain":
            yield f"attention of block {index} has rotary or relative positions, or norms of queries and keys"
        if block.attention.query is None or block.attention.key is None:
            yield f"the plugin does not name queries and keys of block {index}"
        if (block.attention.scale is None) != (block.mlp.scale is None):
            yield f"block {index} has only one LayerScale"
        for norm in (block.attention.norm, block.mlp.norm):
            if norm.kind != "layernorm" or norm.weight is None or norm.bias is None:
                yield f"block {index} has a norm that is not a LayerNorm with weight and bias"
    norms = [norm for block in layers.blocks for norm in (block.attention.norm, block.mlp.norm)]
    if len({norm.eps for norm in (*norms, layers.norm or NormMap())}) > 1:
        yield "its norms differ in their eps"
    if layers.norm and (layers.norm.kind != "layernorm" or layers.norm.weight is None or layers.norm.bias is None):
        yield "its final norm is not a LayerNorm with weight and bias"


def _shape(block: BlockMap) -> tuple[object, ...]:
    """Return the properties that are equal for two blocks of the same structure."""
    return (
        tuple(role for role, _ in references(block)),
        block.mlp.kind,
        block.mlp.activation,
        block.attention.heads,
        block.parallel,
    )


def _rows(backbone: Backbone, block: BlockMap, role: str) -> int:
    ref = dict(references(block))[role]
    return backbone.weights.shape_of(ref)[0]


def stem_of(backbone: Backbone) -> StemMap:
    """Return the stem of a backbone that has an `Architecture`."""
    assert backbone.layers.stem is not None
    return backbone.layers.stem
