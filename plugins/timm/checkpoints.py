"""Which tensors of a checkpoint are the backbone's, converted by timm's own function where their names are others'."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn

from sinder_cli import BadInputError, MemoryTensors, Weights, require_matching

from .architecture import Architecture

ANCHOR = "patch_embed.proj.weight"  # of timm's own checkpoints, and of most official ones
WRAPPERS = ("model_ema", "model", "module", "state_dict", "encoder")  # that timm's functions look into

Filter = Callable[[dict[str, Any], nn.Module], Mapping[str, Tensor]]


def backbone_weights(name: str, described: Architecture, weights: Weights) -> Weights:
    """The tensors of the backbone by timm's names.

    Names that are timm's already are read lazily; others are converted, all tensors at once, by the function that timm
    itself applies to the official checkpoints of the model. The classifier is left out. Raises `BadInputError` for
    weights that do not fit after that.
    """
    plain = without(_located(weights), described.classifiers)
    shapes = described.shapes
    if {name: plain.shape(name) for name in plain.names} == shapes:
        return plain
    found = plain
    if (convert := filter_of(name)) is not None:
        found = without(converted(_located(weights), described.module, convert), described.classifiers)
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
    left_out = tuple(name for name in weights.names if name.startswith(prefixes))
    kept = {name: stored for name, stored in weights.stored_names.items() if name not in left_out}
    return replace(weights, stored_names=kept, ignored=(*weights.ignored, *left_out))


def converted(weights: Weights, module: nn.Module, convert: Filter) -> Weights:
    """The weights as timm's function makes them of these; it resizes position embeddings to the module's grid."""
    stored = weights.read(weights.names)
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():  # timm's functions print
            tensors = dict(convert(wrapped(stored), module))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        why = f"timm's function for this model cannot convert it ({type(error).__name__}: {error})"
        raise BadInputError(f"cannot use weights {weights.source.label}", why, "is it a checkpoint of it?") from error
    found = Weights.of(MemoryTensors(f"{weights.source.label}, converted by timm", tensors))
    return replace(found, ignored=weights.ignored)


def wrapped(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Tensors nested as they were stored, as far as timm's functions look: `model.x` is `x` of `model`."""
    for wrapper in WRAPPERS:
        prefix = f"{wrapper}."
        if inside := {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}:
            return {wrapper: wrapped(inside) if wrapper != "encoder" else inside}
    return dict(tensors)


def filter_of(name: str) -> Filter | None:
    """The function that timm applies to pretrained tensors of this model, with the options that it has bound.

    timm hands it to nobody but its own loader, so a loader that loads nothing takes it.
    """
    taken: list[Filter | None] = []
    with _loader(lambda *_, filter_fn=None, **__: taken.append(filter_fn)), torch.device("meta"):
        timm.create_model(name, pretrained=True, num_classes=0)
    return taken[0]


@contextlib.contextmanager
def _loader(load: Callable[..., None]) -> Iterator[None]:
    with mock.patch("timm.models._builder.load_pretrained", load):
        yield
