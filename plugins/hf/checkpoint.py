"""The encoder inside a checkpoint, under the names of the library's present modules."""

from __future__ import annotations

import re
from dataclasses import replace

from sinder_cli import BadInputError, Weights, require_matching

from .config import Config
from .families import Family
from .layers import tensor_shapes


def encoder(weights: Weights, config: Config) -> Weights:
    """The encoder's tensors by the library's names, whatever they are nested in and whenever they were stored.

    Heads and poolers are left out, and count as ignored.
    """
    family = config.family
    inside = _gathered(weights, family).located(f"{family.stem.patch}.weight")
    return inside.renamed(lambda name: _renamed(name, family.renames)).without(
        lambda name: name.startswith(family.heads)
    )


def _gathered(weights: Weights, family: Family) -> Weights:
    """The tensors with those under the encoder's prefix that a file stores without it."""
    prefix, beginning = family.astray
    if not prefix or f"{prefix}{family.stem.patch}.weight" not in weights:
        return weights
    return weights.renamed(lambda name: f"{prefix}{name}" if name.startswith(beginning) else name)


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def as_stored(config: Config, weights: Weights) -> Config:
    """The configuration with what it leaves to the checkpoint: whether there is a mask token."""
    stem, parts = config.family.stem, config.parts
    return config if parts.mask is not None else replace(config, parts=replace(parts, mask=stem.mask in weights))


def is_fused(config: Config, weights: Weights) -> bool:
    """Whether a gated MLP's gate and up are one tensor, as checkpoints from before transformers 5 have them."""
    fused = config.family.names.fused[0]
    return bool(config.parts.gated and fused) and any(f".{fused}." in name for name in weights.names)


def require_whole(config: Config, fused: bool, weights: Weights, model: str) -> None:
    """Raises `BadInputError` for an encoder that lacks a tensor, has one too many, or one of another shape.

    Its depth is held against the number of tensors first, so that nothing of a size that nobody has is made.
    """
    if config.depth > len(weights.names):
        why = f"its config.json says {config.depth} blocks, and its weights have {len(weights.names)} tensors"
        raise BadInputError(f"cannot use {model}", why, "is it the right config.json?")
    require_matching(tensor_shapes(config, fused), weights, model)
