"""Checks of passes and weights.

The plugin's forward pass, its blocks and its tokens are what the engine expects; map and weights fit; a repair changes
only what the map names; and exports are read back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinder_cli.backbone.contract import Backbone, BlockMap, LayerMap, WeightRef, references, trained_references
from sinder_cli.backbone.opening import check_layer_map
from sinder_cli.backbone.weights import Weights, rows_of, same_bits
from sinder_cli.conformance.subject import GRID, Candidate, NonconformityError, gaussian, relative_error
from sinder_cli.defects.tokens import last_tokens
from sinder_cli.exporting.native import write_weights
from sinder_cli.repairing.deltas import Deltas
from sinder_cli.repairing.forward import Directions
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.repairing.step import step_gradient

SAME = 1e-4  # relative error of two ways to compute one thing in float32, over the depth of a model


def forward_agrees(subject: Candidate, forward: Callable[[object, Tensor], Tensor]) -> str:
    """Check that blocks one by one, then the final norm, give what the library's own forward gives, at two sizes."""
    backbone = subject.backbone
    native = backbone.image_size // backbone.patch_size
    errors = []
    for h, w in ((native, native), GRID):
        images = subject.images(1, h, w)
        with torch.no_grad():
            expected = forward(subject.module, images)
        found = _normalized(subject, images)
        if found.shape != expected.shape:
            shapes = f"{list(found.shape)} for {list(expected.shape)}"
            raise NonconformityError(f"at {h} × {w} patches the blocks give {shapes}")
        errors.append(_require_same(found, expected, f"at {h} × {w} patches"))
    return f"relative error {max(errors):.1e}, at {native} × {native} and {GRID[0]} × {GRID[1]} patches"


def images_are_apart(subject: Candidate) -> str:
    """Check that a batch of two equals two batches of one, and that a second pass gives the same bits as the first."""
    both = subject.images(2)
    together = _normalized(subject, both)
    alone = torch.cat([_normalized(subject, image[None]) for image in both])
    error = _require_same(together, alone, "a batch of 2 is not two batches of 1:")
    if not torch.equal(together, _normalized(subject, both)):
        raise NonconformityError("two passes over the same images differ: something is random in it")
    return f"relative error {error:.1e}"


def blocks_keep_their_input(subject: Candidate) -> str:
    """Check that no block writes into its input tokens: a repair needs them again."""
    tokens, context = subject.embedded(subject.images(1))
    for index in range(subject.backbone.depth):
        before = tokens.clone()
        with torch.no_grad():
            after = subject.backbone.run_block(subject.module, index, tokens, context)
        if not torch.equal(tokens, before):
            raise NonconformityError(f"block {index} changes the tokens that it is given")
        if after.shape != tokens.shape:
            raise NonconformityError(f"block {index} returns {list(after.shape)} for {list(tokens.shape)}")
        tokens = after
    return f"{subject.backbone.depth} blocks"


def gradients_arrive(subject: Candidate) -> str:
    """Check that a loss after each block has a gradient at its input, and one other than 0 at every trained weight."""
    backbone, module = subject.backbone, subject.module
    tokens, context = subject.embedded(subject.images(1))
    weights = 0
    for index, block in enumerate(backbone.layers.blocks):
        references = trained_references(block)
        parameters = {name: module.get_parameter(name) for name in {ref.name for ref in references.values()}}
        entering = tokens.detach().requires_grad_()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        leaving = backbone.run_block(module, index, entering, context)
        found = torch.autograd.grad(
            leaving, [entering, *parameters.values()], gaussian(*leaving.shape), allow_unused=True
        )
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        by_name = dict(zip(parameters, found[1:], strict=True))
        for role, ref in references.items():
            gradient = by_name[ref.name]
            if gradient is None or not bool(rows_of(gradient, ref).any()):
                raise NonconformityError(f"block {index}, {role} ({ref}) gets no gradient")
        if found[0] is None:
            raise NonconformityError(f"block {index} passes no gradient to its input")
        weights += len(references)
        tokens = leaving.detach()
    return f"{weights} weights"


@torch.no_grad()
def _normalized(subject: Candidate, images: Tensor) -> Tensor:
    return subject.backbone.finish(subject.module, last_tokens(subject.backbone, subject.module, images))


def _require_same(found: Tensor, expected: Tensor, where: str) -> float:
    error = relative_error(found, expected)
    if not error <= SAME:
        raise NonconformityError(f"{where} a relative error of {error:.1e}")
    return error


PROBED = ((0, 0), (1, 3), (3, 1), (4, 6))  # patches of the 5 × 7 whose pixels are changed
NEAR = 1  # patches: how far the stem may mix, as overlapping convolutions do


def tokens_are_counted(subject: Candidate) -> str:
    """Check that there are prefix + h · w tokens, and that the prefix, with cls in it, is the same for every image."""
    backbone = subject.backbone
    images = subject.images(2)
    tokens, _ = subject.embedded(images)
    expected = (2, backbone.prefix_tokens + GRID[0] * GRID[1], backbone.width)
    if tuple(tokens.shape) != expected:
        what = f"{backbone.prefix_tokens} prefix tokens and {GRID[0]} × {GRID[1]} patches of width {backbone.width}"
        raise NonconformityError(f"embed gives {list(tokens.shape)}, not {what} for 2 images")
    if backbone.has_cls and not backbone.prefix_tokens:
        raise NonconformityError("it has a cls token, and no prefix token that could be one")
    one, other = tokens[:, : backbone.prefix_tokens]
    different = (one != other).any(dim=1).nonzero()[:, 0].tolist()
    if different:
        raise NonconformityError(f"prefix token {different[0]} depends on the image, as patch tokens do")
    return f"{backbone.prefix_tokens} prefix tokens" + (", cls first" if backbone.has_cls else ", no cls")


def patches_lie_row_by_row(subject: Candidate) -> str:
    """Check that other pixels in one patch move token prefix + row · w + column most, and others only beside it."""
    backbone, P = subject.backbone, subject.backbone.patch_size
    image, other = subject.images(1), subject.images(1, seed=1)
    before, _ = subject.embedded(image)
    changed_tokens = 0
    for row, column in PROBED:
        mixed = image.clone()
        inside = (..., slice(row * P, (row + 1) * P), slice(column * P, (column + 1) * P))
        mixed[inside] = other[inside]
        after, _ = subject.embedded(mixed)
        moved = (after - before)[0].norm(dim=1)  # [T]
        most = int(moved.argmax()) - backbone.prefix_tokens
        if most != row * GRID[1] + column:
            raise NonconformityError(f"the pixels of patch {row}, {column} move patch token {most} most")
        changed = (moved > 0).nonzero()[:, 0] - backbone.prefix_tokens
        far = torch.maximum((changed // GRID[1] - row).abs(), (changed % GRID[1] - column).abs()) > NEAR
        if bool((far | (changed < 0)).any()):
            raise NonconformityError(f"the pixels of patch {row}, {column} move {len(changed)} tokens, even far ones")
        changed_tokens = max(changed_tokens, len(changed))
    return f"one patch moves {changed_tokens} token" + ("s" if changed_tokens > 1 else "")


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


def repair_keeps_to_the_map(subject: Candidate) -> str:
    """Check that one step on noise changes every trained weight of its window, and no bit elsewhere."""
    backbone, module = subject.backbone, subject.module
    gaps = [1.0] * (backbone.depth - 1) + [float("inf")]  # only the last block's direction counts as determined
    directions = Directions(gaussian(backbone.depth, backbone.width), gaps)
    deltas = Deltas(backbone, module)
    found = step_gradient(deltas, directions, subject.images(2), MARKING)
    if not found.gradients or not found.finite:
        raise NonconformityError("a step on noise has no finite gradient")
    for target in deltas.touched:
        gradient = found.gradients[target.name]
        lr = STEP * float(target.basis.S[0]) / float(gradient.abs().max().clamp_min(1e-30))
        target.write(target.moved(gradient, lr, momentum=0.0).delta)
    refs = [ref for block in backbone.layers.blocks[-WINDOW:] for ref in trained_references(block).values()]
    changed = _require_changed(subject, refs)
    return f"{changed} weights of the last {min(WINDOW, backbone.depth)} blocks, and nothing else"


def _require_changed(subject: Candidate, refs: list[WeightRef]) -> int:
    """Check that the module differs from its weights in each of these references, and in no bit elsewhere."""
    state = subject.module.state_dict()
    for name, stored in subject.backbone.weights.stream(state):
        now, before = state[name].clone(), stored.to(state[name].dtype)
        for ref in refs:
            if ref.name != name:
                continue
            if same_bits(rows_of(now, ref), rows_of(before, ref)):
                raise NonconformityError(f"{ref} did not change")
            rows_of(now, ref).copy_(rows_of(before, ref))
        if not same_bits(now, before):
            raise NonconformityError(f"{name} changed outside of what the map names as trained")
    return len(refs)


def export_reads_back(subject: Candidate) -> str:
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
        if tensor.dtype != read.dtype or tensor.shape != read.shape or not same_bits(tensor, read):
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
