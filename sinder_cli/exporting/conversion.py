"""Tensors of one library's model, made from those of another when they are read: one at a time, none kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import TYPE_CHECKING

from sinder_cli.backbone.contract import Backbone, WeightRef
from sinder_cli.backbone.sources import TensorInfo
from sinder_cli.backbone.storing import stored_as
from sinder_cli.backbone.weights import Weights, rows_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sinder_cli.exporting.targets import DtypeName


def stacked(*parts: Tensor) -> Tensor:
    """Stack parts below each other, as a fused projection holds them."""
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Recipe:
    """Recipe of one tensor: `make` applied to parts of the original, in `shape`; without parts, filled with `fill`."""

    shape: tuple[int, ...]
    parts: tuple[WeightRef, ...] = ()
    make: Callable[..., Tensor] = stacked
    fill: float = 0.0


def part(weights: Weights, *parts: WeightRef) -> Recipe:
    """Return the recipe that stacks parts below each other, in the resulting shape."""
    shapes = [weights.shape_of(ref) for ref in parts]
    return Recipe((sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0], parts)


def reshaped(weights: Weights, ref: WeightRef, *shape: int) -> Recipe:
    """Return the recipe of one tensor in another shape. Raises `ValueError` if the number of values differs."""
    if prod(weights.shape_of(ref)) != prod(shape):
        raise ValueError(f"{ref} has shape {weights.shape_of(ref)}, which does not make {shape}")
    return Recipe(shape, (ref,))


@dataclass(frozen=True)
class ConvertedTensors:
    """A source of tensors that recipes make from a backbone's weights; those made without parts have `dtype`."""

    weights: Weights
    recipes: Mapping[str, Recipe]
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"{self.weights.source.label}, converted"

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(recipe.shape, self._dtype(recipe)) for name, recipe in self.recipes.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return whole tensors, newly made; each tensor of the original is read once for all the names."""
        import torch

        recipes = {name: self.recipes[name] for name in names}
        needed = dict.fromkeys(ref.name for recipe in recipes.values() for ref in recipe.parts)
        stored = self.weights.read(needed)
        made: dict[str, Tensor] = {}
        for name, recipe in recipes.items():
            info = self.infos[name]
            if recipe.parts:
                tensor = recipe.make(*(rows_of(stored[ref.name], ref) for ref in recipe.parts))
                made[name] = tensor.reshape(recipe.shape).to(info.dtype, copy=True)
            else:
                made[name] = torch.full(recipe.shape, recipe.fill, dtype=info.dtype)
        return made

    def _dtype(self, recipe: Recipe) -> torch.dtype:
        return self.weights.info(recipe.parts[0].name).dtype if recipe.parts else self.dtype


def cast(backbone: Backbone, name: DtypeName) -> Backbone:
    """Return the backbone with its floating-point weights in the dtype of that name; integers stay.

    Reading raises `BadInputError` naming the first tensor that the dtype cannot hold.
    """
    import torch

    weights = backbone.weights
    dtype: torch.dtype = getattr(torch, name)
    floating = [name for name in weights.names if weights.info(name).dtype.is_floating_point]
    changes = {name: partial(_stored_as, weights.stored_names[name], dtype) for name in floating}
    return replace(backbone, weights=weights.mapped(weights.source.label, changes, dict.fromkeys(floating, dtype)))


def _stored_as(name: str, dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return stored_as(tensor, name, dtype)
