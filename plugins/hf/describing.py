"""From a folder or repository to its weights and its backbone."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

import sinder_cli as sinder

from .checkpoint import as_stored, encoder, is_fused, require_whole
from .config import Config, read_config
from .folder import (
    CONFIG,
    DescribedWeights,
    license_of,
    local_folder,
    open_folder,
    place_of,
    read_preprocessor,
    read_texts,
    repository,
)
from .layers import layer_map

if TYPE_CHECKING:
    from torch import nn


def described_weights(request: sinder.ModelRequest) -> DescribedWeights:
    """Return the weights in the folder, or in the repository, from which only the necessary files are downloaded."""
    folder = local_folder(request)
    if folder is None:
        folder = _hub().download(repository(request), request.revision, weights=True)
    return open_folder(folder)


def backbone(request: sinder.ModelRequest, weights: sinder.Weights) -> sinder.Backbone:
    """Describe the encoder of `config.json` with these weights."""
    place, sidecars = place_of(request), _sidecars(request, weights)
    config = read_config(sidecars[CONFIG], place)
    weights = encoder(weights, config)
    config, fused = as_stored(config, weights), is_fused(config, weights)
    require_whole(config, fused, weights, request.model)
    _require_heads(request, config)
    preprocessor = read_preprocessor(sidecars, config, place)
    attention = _attention(request)

    def build() -> nn.Module:
        library = _module()
        try:
            module: nn.Module = library.build(config, fused, attention)
        except MemoryError:
            raise
        except Exception as error:  # transformers checks configurations itself, with many kinds of errors
            line = (str(error).strip().splitlines() or [""])[-1].strip()
            why = f"transformers cannot build what its config.json describes ({type(error).__name__}: {line})"
            raise sinder.BadInputError(f"cannot use {place}", why, "is it the right config.json?") from error
        return module

    return sinder.Backbone(
        name=request.model,
        layers=layer_map(config, fused),
        weights=weights,
        patch_size=config.patch,
        prefix_tokens=config.prefix_tokens,
        has_cls=bool(config.family.stem.cls),
        image_size=preprocessor.size,
        build=build,
        embed=lambda module, images: _module().embed(config, module, images),
        run_block=lambda module, index, tokens, context: _module().run_block(config, module, index, tokens, context),
        finish=lambda module, tokens: _module().finish(config, module, tokens),
        forward=lambda module, images: _module().forward(config, module, images),
        mean=preprocessor.mean,
        std=preprocessor.std,
        sidecars=sidecars,
        license=license_of(sidecars),
    )


def _sidecars(request: sinder.ModelRequest, weights: sinder.Weights) -> Mapping[str, str]:
    """Return the text files of a run, else of the folder with the weights, else of the named folder or repository."""
    if request.sidecars:
        if CONFIG not in request.sidecars:
            what, why = f"cannot use {request.model}", f"its run directory keeps no {CONFIG}"
            raise sinder.NoInputError(what, why, "restore its folder sidecars")
        return request.sidecars
    if isinstance(weights.source, DescribedWeights):
        return weights.source.sidecars
    folder = local_folder(request)
    return read_texts(folder or _hub().download(repository(request), request.revision, weights=False))


def _require_heads(request: sinder.ModelRequest, config: Config) -> None:
    if request.heads not in (None, config.heads):
        why = f"its config.json says {config.heads}"
        raise sinder.UsageError(f"cannot use {request.heads} heads for {request.model}", why, "leave --heads out")


def _attention(request: sinder.ModelRequest) -> str:
    """Return the library's name for a kernel. Raises `UsageError` for a kernel that it lacks."""
    if request.attention == "xformers":
        what, why = "cannot use xformers attention", "the blocks are those of transformers, which does not support it"
        raise sinder.UsageError(what, why, "use --attention sdpa")
    return "eager" if request.attention == "eager" else "sdpa"


def _module() -> ModuleType:
    sinder.define_torchvision_operators()  # transformers needs them if torchvision was built for another torch
    try:
        from . import module
    except ImportError as error:
        raise _missing(error) from error
    return module


def _hub() -> ModuleType:
    try:
        from . import hub
    except ImportError as error:
        raise _missing(error) from error
    return hub


def _missing(error: ImportError) -> sinder.UnavailableError:
    return sinder.UnavailableError("cannot use models of Hugging Face", str(error), "pip install 'sinder-cli[hf]'")
