"""Whether the layer map fits the weights, and the weights the module."""

from __future__ import annotations

from itertools import pairwise

from sinder_cli.backbone.contract import Backbone, BlockMap, WeightRef, references, trained_references
from sinder_cli.backbone.opening import check_layer_map
from sinder_cli.conformance.records import NonconformityError


def map_fits_weights(backbone: Backbone) -> str:
    """Every tensor of the map exists, floats, and has the shape of its role; trained weights are matrices thereby."""
    check_layer_map(backbone)
    layers = backbone.layers
    named = {ref.name for part in (layers, *layers.blocks) for _, ref in references(part)}
    trained = sum(len(trained_references(block)) for block in layers.blocks)
    return f"it names {len(named)} of {len(backbone.weights.names)} tensors, {trained} trained weights among them"


def roles_are_apart(backbone: Backbone) -> str:
    """No two roles share a row of a tensor: a repair would write it twice.

    The sub-layers of a parallel block may share their norm and their LayerScale, which nobody writes.
    """
    claims: dict[str, list[tuple[int, int, str]]] = {}
    for index, block in enumerate(backbone.layers.blocks):
        for role, ref in _claims(block):
            start, stop = ref.rows or (0, backbone.weights.shape(ref.name)[0])
            claims.setdefault(ref.name, []).append((start, stop, f"block {index}, {role}"))
    for name, rows in claims.items():
        rows.sort()
        for (_, stop, first), (start, _, second) in pairwise(rows):
            if start < stop:
                raise NonconformityError(f"{first} and {second} both mean {name}[{start}:{stop}]")
    return f"{sum(map(len, claims.values()))} roles"


def _claims(block: BlockMap) -> list[tuple[str, WeightRef]]:
    """The references of a block by role; of norms and scales that a parallel block names more than once, the first."""
    found: list[tuple[str, WeightRef]] = []
    for role, ref in references(block):
        untrained = ".norm." in role or role.endswith(".scale")
        shared = block.parallel and untrained and any(ref == other for _, other in found)
        found += [] if shared else [(role, ref)]
    return found
