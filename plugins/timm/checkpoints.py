"""Which tensors of a checkpoint are the backbone's, converted by timm's own function where their names are others'."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.models import _builder as builder
from torch import Tensor, nn

from sinder_cli import BadInputError, MemoryTensors, Weights, require_matching

from .architecture import Architecture, create

ANCHOR = "patch_embed.proj.weight"  # of timm's own checkpoints, and of most official ones
WRAPPERS = ("model_ema", "model", "module", "state_dict")  # that timm's functions look into, one inside another
ENCODER = "encoder"  # of I-JEPA, the same

Filter = Callable[[dict[str, Any], nn.Module], Mapping[str, Tensor]]


def backbone_weights(name: str, described: Architecture, weights: Weights) -> Weights:
    """The tensors of the backbone by timm's names, those of the classifier left out.

    Where names and shapes are timm's already, they are read lazily. Others are converted, all tensors at once, by the
    function that timm itself applies to the official checkpoints of this model; it resizes position embeddings and
    patches to the sizes of the module. Raises `BadInputError` for weights that do not fit after that.
    """
    shapes = described.shapes
    located = _located(weights)
    found = without(located, described.classifiers)
    if {tensor: found.shape(tensor) for tensor in found.names} != shapes:
        with contextlib.suppress(LookupError):
            found = without(converted(located, described.module, filter_of(name)), described.classifiers)
    require_matching(shapes, found, f"timm/{name}")
    return found


def _located(weights: Weights) -> Weights:
    """The backbone inside a training checkpoint; of a file that has none, or several, all there is."""
    try:
        return weights.located(ANCHOR)
    except BadInputError:
        return weights


def without(weights: Weights, layers: tuple[str, ...]) -> Weights:
    """The weights but for those of some layers, which are counted as ignored."""
    prefixes = tuple(f"{layer}." for layer in layers)
    kept = {name: stored for name, stored in weights.stored_names.items() if not name.startswith(prefixes)}
    left_out = tuple(name for name in weights.names if name not in kept)
    return replace(weights, stored_names=kept, ignored=(*weights.ignored, *left_out))


def converted(weights: Weights, module: nn.Module, convert: Filter) -> Weights:
    """The weights as timm's function makes them of these, held in memory."""
    stored = nested(weights.read(weights.names))
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():  # standard output is for results
            tensors = dict(convert(stored, module))
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        why = f"timm's function for this model cannot convert it ({type(error).__name__}: {error})"
        raise BadInputError(f"cannot use weights {weights.source.label}", why, "is it a checkpoint of it?") from error
    found = Weights.of(MemoryTensors(f"{weights.source.label}, converted by timm", tensors))
    return replace(found, ignored=weights.ignored)


def nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Tensors in the dictionaries they were stored in, as far as timm's functions look: `model.x` is `x` of `model`."""
    for wrapper in (*WRAPPERS, ENCODER):
        prefix = f"{wrapper}."
        if inside := {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}:
            return {wrapper: inside if wrapper == ENCODER else nested(inside)}
    return dict(tensors)


def filter_of(name: str) -> Filter:
    """The function that timm applies to pretrained tensors of this model, with the options that it binds to it.

    timm hands it to its own loader alone, so a loader that loads nothing takes it. Raises `LookupError` without one.
    """
    taken: list[Filter | None] = []
    with _loading(lambda *_, filter_fn=None, **__: taken.append(filter_fn)), torch.device("meta"):
        create(name, pretrained=True)
    if not taken or taken[0] is None:
        raise LookupError(name)
    return taken[0]


@contextlib.contextmanager
def _loading(load: Callable[..., None]) -> Iterator[None]:
    """Another loader in the place of timm's."""
    own, builder.load_pretrained = builder.load_pretrained, load
    try:
        yield
    finally:
        builder.load_pretrained = own
