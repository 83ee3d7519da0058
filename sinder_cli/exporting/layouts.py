"""How libraries name the tensors of a ViT, as data, and the recipes that make these tensors from any backbone.

q, k, v      fused in this order, if a layout gives all three one name
gate, up     fused with the gate first, if both have one name
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sinder_cli.backbone.contract import Backbone, BlockMap, NormMap, WeightRef, references
from sinder_cli.exporting.architecture import Architecture, stem_of
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
