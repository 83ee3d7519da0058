"""The encoder inside a checkpoint, under the names of the library's current modules."""

from __future__ import annotations

import re
from dataclasses import replace

from sinder_cli import BadInputError, Weights, require_matching

from .config import Config
from .families import Family
from .layers import tensor_shapes


def encoder(weights: Weights, config: Config) -> Weights:
    """Return the encoder's tensors by the library's current names, from files of any nesting and any version.

    Heads and poolers are left out, and count as ignored.
    """
    family = config.family
    inside = _gathered(weights, family).located(f"{family.stem.patch}.weight")
    return inside.renamed(lambda name: _renamed(name, family.renames)).without(
        lambda name: name.startswith(family.heads)
    )


def _gathered(weights: Weights, family: Family) -> Weights:
    """Return the tensors, adding the encoder's prefix to those that a file stores without it."""
    prefix, beginning = family.astray
    if not prefix or f"{prefix}{family.stem.patch}.weight" not in weights:
        return weights
    return weights.renamed(lambda name: f"{prefix}{name}" if name.startswith(beginning) else name)


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def as_stored(config: Config, weights: Weights) -> Config:
    """Return the configuration, with the mask token taken from the checkpoint if it was undecided."""
    stem, parts = config.family.stem, config.parts
    return config if parts.mask is not None else replace(config, parts=replace(parts, mask=stem.mask in weights))


def is_fused(config: Config, weights: Weights) -> bool:
    """Return True if gate and up of a gated MLP are one tensor, as in checkpoints from before transformers 5."""
    fused = config.family.names.fused[0]
    return bool(config.parts.gated and fused) and any(f".{fused}." in name for name in weights.names)


def require_whole(config: Config, fused: bool, weights: Weights, model: str) -> None:
    """Raise `BadInputError` for an encoder with a missing tensor, an unexpected one, or one of another shape.

    Its depth is compared with the number of tensors first, so that an absurd depth does not fill the memory.
    """
    if config.depth > len(weights.names):
        why = f"its config.json says {config.depth} blocks, and its weights have {len(weights.names)} tensors"
        raise BadInputError(f"cannot use {model}", why, "is it the right config.json?")
    require_matching(tensor_shapes(config, fused), weights, model)
