"""Opening a backbone: from the user's request to a checked description, and from that to a module with its weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.backbone.contract import Backbone, BlockMap, GatedMlpMap, WeightRef, references
from sinder_cli.backbone.hooks import ModelRequest
from sinder_cli.backbone.isolation import Hooks
from sinder_cli.backbone.sources import open_checkpoint
from sinder_cli.backbone.weights import Weights, is_branch, recognized_by_names
from sinder_cli.errors import BadInputError, UsageError
from sinder_cli.events import Noted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


def open_backbone(hooks: Hooks, request: ModelRequest) -> Backbone:
    """Open the weights, let the plugin describe them, and check its layer map against them.

    Raises `BadInputError` for weights or maps that do not fit, and the errors of `describe`.
    """
    backbone = describe(hooks, request)
    check_layer_map(backbone)
    return backbone


def describe(hooks: Hooks, request: ModelRequest) -> Backbone:
    """Open the weights and let the plugin describe them; the layer map is not checked.

    Raises `BadInputError` if there are no weights or the file is no checkpoint, and `UnavailableError` for a plugin
    that breaks or describes nothing. `OSError` and `MemoryError` come from this machine, not from the plugin, and pass.
    """
    _require_revisions(hooks, request)
    found = request.weights or hooks.sinder_weights(request=request)
    if found is None:
        raise BadInputError(f"no weights for {request.model!r}", "its plugin has none", "name a file with --weights")
    source = open_checkpoint(found) if isinstance(found, Path) else found
    backbone: Backbone = hooks.sinder_backbone(request=request, weights=Weights.of(source, request.branch))
    _require_branch(request, backbone.weights)
    request.emit(Noted(_matched(backbone.weights)))
    return backbone


def _require_branch(request: ModelRequest, weights: Weights) -> None:
    """Refuse a branch that the plugin did not select, rather than ignore the option. Raises `UsageError`."""
    if request.branch and not is_branch(request.branch, weights.prefix):
        what, why = f"cannot use branch {request.branch!r}", f"{weights.source.label} has one backbone and no branches"
        raise UsageError(what, why, "leave --branch out")


def _matched(weights: Weights) -> str:
    """Return one line with the number of matched tensors, their prefix, other backbones, and ignored tensors."""
    under = f" under {weights.prefix!r}" if weights.prefix else ""
    if weights.others:
        listed = ", ".join(repr(other) for other in weights.others)
        under += f", one of several backbones (--branch takes another: {listed})"
    ignored = weights.ignored
    names = f" ({', '.join(ignored[:3])}{', …' if len(ignored) > 3 else ''})" if ignored else ""
    left_out = f", {len(ignored)} outside it ignored{names}" if ignored else ""
    return f"{weights.source.label}: matched {len(weights.names)} tensors{under}{left_out}"


def _require_revisions(hooks: Hooks, request: ModelRequest) -> None:
    """Refuse a revision if the plugin has none, rather than ignore the option. Raises `UsageError`."""
    if request.revision is not None and not any(row.revisions for row in hooks.sinder_listing()):
        what, why = f"cannot use revision {request.revision!r}", f"{request.model} does not come from a hub"
        raise UsageError(what, why, "leave --revision out")


def check_layer_map(backbone: Backbone) -> None:
    """Refuse a map that names a missing tensor, rows out of range or a wrong shape. Raises `BadInputError`."""
    layers = backbone.layers
    shapes = {index: _block_shapes(block) for index, block in enumerate(layers.blocks)}
    for index, block in enumerate(layers.blocks):
        sizes: dict[str, int] = {"N": layers.width}
        for role, ref in references(block):
            shape = _shape_of(ref, backbone.weights, f"block {index}, {role}")
            _check_shape(shape, shapes[index].get(role), sizes, f"block {index}, {role} ({ref})")
    if layers.position is not None:
        place = f"position ({layers.position.weight})"
        shape = _shape_of(layers.position.weight, backbone.weights, "position")
        _check_width(shape, -1, layers.width, place)
        if math.prod(shape[:-1]) <= layers.position.prefix:
            raise _bad_map(place, f"{layers.position.prefix} prefix rows leave no patches")
    for name, part in (("stem", layers.stem), ("norm", layers.norm)):
        for role, ref in references(part) if part else ():
            shape = _shape_of(ref, backbone.weights, f"{name}.{role}")
            at = 0 if role.startswith("patch") else -1
            _check_width(shape, at, layers.width, f"{name}.{role} ({ref})")


def _check_width(shape: tuple[int, ...], at: int, width: int, place: str) -> None:
    """Refuse a tensor whose first or last size is not the width of the residual stream."""
    if not shape or shape[at] != width:
        which = "last" if at else "first"
        raise _bad_map(place, f"its shape is {_times(shape)}, and its {which} size is not width {width}")


def _block_shapes(block: BlockMap) -> dict[str, tuple[str, ...]]:
    """Return the shape of each role in symbols: N width, Q, K, A inner widths of queries, keys, values, H hidden width.

    Sub-layers of `beside` may have other inner widths than the first ones, and so have symbols of their own.
    """
    shapes: dict[str, tuple[str, ...]] = {
        "attention.query": ("Q", "N"),
        "attention.query_bias": ("Q",),
        "attention.key": ("K", "N"),
        "attention.key_bias": ("K",),
        "attention.value": ("A", "N"),
        "attention.output": ("N", "A"),
        "attention.value_bias": ("A",),
        "attention.output_bias": ("N",),
        "mlp.up": ("H", "N"),
        "mlp.up_bias": ("H",),
        "mlp.down": ("N", "H"),
        "mlp.down_bias": ("N",),
    }
    if isinstance(block.mlp, GatedMlpMap):
        shapes |= {"mlp.gate": ("H", "N"), "mlp.gate_bias": ("H",)}
    for part, inner in (("attention", "A"), ("mlp", "H")):
        shapes |= {f"{part}.scale": ("N",), f"{part}.norm.weight": ("N",), f"{part}.norm.bias": ("N",)}
        shapes |= {f"{part}.inner_norm.weight": (inner,), f"{part}.inner_norm.bias": (inner,)}
    if block.beside:
        for role, symbols in _block_shapes(block.beside).items():
            shapes[f"beside.{role}"] = tuple(symbol if symbol == "N" else f"{symbol}′" for symbol in symbols)
    return shapes


def _shape_of(ref: WeightRef, weights: Weights, place: str) -> tuple[int, ...]:
    if ref.name not in weights:
        raise _bad_map(place, f"there is no tensor {ref.name!r}")
    shape, dtype = weights.shape(ref.name), weights.info(ref.name).dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise _bad_map(place, f"{ref.name!r} holds {dtype}: quantized weights cannot be decomposed")
    if ref.rows:
        (start, stop), held = ref.rows, shape[0] if shape else 0
        if not 0 <= start < stop <= held:
            raise _bad_map(place, f"rows {start}:{stop} are out of range of {ref.name!r}, which has {held}")
    return weights.shape_of(ref)


def _check_shape(shape: tuple[int, ...], symbols: tuple[str, ...] | None, sizes: dict[str, int], place: str) -> None:
    if symbols is None:
        return
    expected = tuple(sizes.setdefault(symbol, size) for symbol, size in zip(symbols, shape, strict=False))
    if len(shape) != len(symbols) or expected != shape:
        known = " × ".join(str(sizes.get(symbol, symbol)) for symbol in symbols)
        raise _bad_map(place, f"its shape is {' × '.join(map(str, shape))}, not {known}")


def _bad_map(place: str, why: str) -> BadInputError:
    return BadInputError(f"the layer map does not fit these weights: {place}", why, "is it the right checkpoint?")


def require_matching(expected: Mapping[str, tuple[int, ...]], weights: Weights, model: str) -> None:
    """Raise `BadInputError` with the differences unless the weights have exactly the expected names and shapes."""
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights.names if name not in expected]
    misshaped = [
        f"{name} ({_times(weights.shape(name))} for {_times(expected[name])})"
        for name in weights.names
        if name in expected and weights.shape(name) != tuple(expected[name])
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if names
    ]
    if problems:
        matched = len(expected) - len(missing) - len(misshaped)
        counted = f"{matched} tensors match, {'; '.join(problems)}".replace(";", ",")
        why, remedy = recognized_by_names(weights) or (counted, "give the checkpoint of this model")
        raise BadInputError(f"weights {weights.source.label} do not fit {model}", why, remedy)


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def require_loadable(backbone: Backbone) -> nn.Module:
    """Return the module, built on the meta device, where it takes no memory.

    Raises `BadInputError`, which names the differences, unless the weights have exactly the module's names and shapes.
    """
    import torch

    with torch.device("meta"):
        module = backbone.build()
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    require_matching(expected, backbone.weights, backbone.name)
    return module


def load_module(backbone: Backbone, device: str = "cpu") -> nn.Module:
    """Build the module, fill it with exactly the weights as float32, some tensors at a time, and freeze it.

    Raises `BadInputError` for weights that are not exactly the module's.
    """
    module = require_loadable(backbone)
    # buffers that no file stores must be computed, which the meta device cannot do
    module = backbone.build().to(device) if _computes_buffers(module) else module.to_empty(device=device)
    targets = module.state_dict()
    for name, tensor in backbone.weights.stream(targets):
        targets[name].copy_(tensor)
    return module.eval().requires_grad_(False)


def _computes_buffers(module: nn.Module) -> bool:
    """Return True if the module has buffers that its state dict leaves out (`persistent=False`)."""
    return not {name for name, _ in module.named_buffers()} <= module.state_dict().keys()
