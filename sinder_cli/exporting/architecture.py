"""Description of a backbone in the terms of other libraries: sizes and switches, read from its layer map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from sinder_cli.backbone.contract import Backbone, BlockMap, GatedMlpMap, LayerMap, NormMap, StemMap, references
from sinder_cli.errors import BadInputError


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
    return backbone.weights.shape(ref.name)[0] if ref.rows is None else ref.rows[1] - ref.rows[0]


def stem_of(backbone: Backbone) -> StemMap:
    """Return the stem of a backbone that has an `Architecture`."""
    assert backbone.layers.stem is not None
    return backbone.layers.stem
