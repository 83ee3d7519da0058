"""Checks that map and weights fit, that a repair changes only what the map names, and that exports are read back."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sinder_cli.backbone.contract import Backbone, BlockMap, LayerMap, WeightRef, references, trained_references
from sinder_cli.backbone.opening import check_layer_map
from sinder_cli.backbone.weights import Weights, rows_of
from sinder_cli.conformance.subject import NonconformityError, Subject, gaussian
from sinder_cli.exporting.native import write_weights
from sinder_cli.repairing.deltas import Deltas
from sinder_cli.repairing.forward import Directions
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.repairing.step import step_gradient

if TYPE_CHECKING:
    from torch import Tensor


def map_fits_weights(backbone: Backbone) -> str:
    """Check that every tensor of the map exists, with a float dtype and the shape of its role: a matrix if trained."""
    check_layer_map(backbone)
    layers = backbone.layers
    named = {ref.name for part in (layers, *layers.blocks) for _, ref in references(part)}
    trained = sum(len(trained_references(block)) for block in layers.blocks)
    return f"it names {len(named)} of {len(backbone.weights.names)} tensors, {trained} trained weights among them"


def roles_are_apart(backbone: Backbone) -> str:
    """Check that no two roles share a row of a tensor: a repair would write it twice.

    The sub-layers of a parallel block may share their norm and their LayerScale, which a repair never writes.
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
    """Return the references of a block by role; norms and scales that a parallel block names twice appear once."""
    found: list[tuple[str, WeightRef]] = []
    for role, ref in references(block):
        untrained = ".norm." in role or role.endswith(".scale")
        shared = block.parallel and untrained and any(ref == other for _, other in found)
        found += [] if shared else [(role, ref)]
    return found


WINDOW = 2  # last blocks: so few are decomposed quickly
MARKING = RepairSettings.model_validate(  # marks tokens of noise, in blocks whose direction counts as determined
    {"recipe": "paper", "min_gap": 1.1, "mask_threshold": 0.5, "min_tokens": 1, "window": WINDOW}
)
STEP = 0.1  # learning rate relative to σ₁ over the largest gradient: far above rounding


def repair_keeps_to_the_map(subject: Subject) -> str:
    """Check that one step on noise changes every trained weight of its window, and no bit elsewhere."""
    backbone, module = subject.backbone, subject.module
    gaps = [1.0] * (backbone.depth - 1) + [float("inf")]  # only the last block's direction counts as determined
    directions = Directions(gaussian(backbone.depth, backbone.width), gaps)
    deltas = Deltas(backbone, module)
    found = step_gradient(backbone, module, directions, deltas, subject.images(2), MARKING)
    if not found.gradients or not found.finite:
        raise NonconformityError("a step on noise has no finite gradient")
    for target in deltas.touched:
        gradient = found.gradients[target.name]
        lr = STEP * float(target.basis.S[0]) / float(gradient.abs().max().clamp_min(1e-30))
        target.write(target.moved(gradient, lr, momentum=0.0).delta)
    refs = [ref for block in backbone.layers.blocks[-WINDOW:] for ref in trained_references(block).values()]
    changed = _require_changed(subject, refs)
    return f"{changed} weights of the last {min(WINDOW, backbone.depth)} blocks, and nothing else"


def _require_changed(subject: Subject, refs: list[WeightRef]) -> int:
    """Check that the module differs from its weights in each of these references, and in no bit elsewhere."""
    state = subject.module.state_dict()
    for name, stored in subject.backbone.weights.stream(state):
        now, before = state[name].clone(), stored.to(state[name].dtype)
        for ref in refs:
            if ref.name != name:
                continue
            if torch.equal(_bits(rows_of(now, ref)), _bits(rows_of(before, ref))):
                raise NonconformityError(f"{ref} did not change")
            rows_of(now, ref).copy_(rows_of(before, ref))
        if not torch.equal(_bits(now), _bits(before)):
            raise NonconformityError(f"{name} changed outside of what the map names as trained")
    return len(refs)


def export_reads_back(subject: Subject) -> str:
    """Check that the native format keeps names, dtypes and bits, and that its plugin finds the same map in it."""
    weights = subject.backbone.weights
    with tempfile.TemporaryDirectory(prefix="sinder-check-") as folder:
        path = Path(folder) / "exported.safetensors"
        write_weights(path, weights)
        again = subject.describe(path)
        _require_identical(again.weights, weights)
        if _comparable(again.layers) != _comparable(subject.backbone.layers):
            raise NonconformityError("the plugin describes the exported file with another layer map")
    return f"{len(weights.names)} tensors"


def _require_identical(again: Weights, weights: Weights) -> None:
    if sorted(again.names) != sorted(weights.names):
        different = sorted(set(again.names) ^ set(weights.names))
        raise NonconformityError(f"the plugin finds other tensors in the exported file: {', '.join(different[:3])}")
    pairs = zip(weights.stream(weights.names), again.stream(weights.names), strict=True)
    for (name, tensor), (_, read) in pairs:
        if tensor.dtype != read.dtype or tensor.shape != read.shape or not torch.equal(_bits(tensor), _bits(read)):
            raise NonconformityError(f"{name} is not the same in the exported file")


def _comparable(layers: LayerMap) -> Any:
    """Return a map as data; functions, which are created anew by each description, are compared only as functions."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return "a function" if callable(value) else value

    return plain(layers.model_dump())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
