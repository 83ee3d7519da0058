"""Checkpoints of the paper's own code, which loads them loosely and leaves to them what it once trained with.

The file that the authors released has the official names, and a `reg_token` that their model does not read. A state
dict that is saved while the code trains has, in the place of each weight W, the factors of W = U diag(S + ε) Vᵀ: `U`,
`S`, `Vt` and `epsilon`, and for fused queries, keys and values three sets of them, `U_q`, `U_k`, `U_v` and so on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sinder_cli import BadInputError, TensorInfo, TensorSource, Weights

if TYPE_CHECKING:
    from torch import Tensor

LOOSE = "reg_token"  # no tensor of this architecture has that name: registers are `register_tokens`
FACTORS = ("U", "S", "Vt", "epsilon")
PACKED = ("w1", "w2")  # gate and up of a SwiGLU, which the official files have as one, `w12`
FUSED = ("_q", "_k", "_v")  # in the order of their rows

_FACTOR = re.compile(rf"^(.+\.)(?:{'|'.join(FACTORS)})(_[qkv])?$")


def with_packed(weights: Weights) -> Weights:
    """The weights with gate and up of each SwiGLU as one tensor, where a file stores them apart.

    Raises `BadInputError` for a gate without its up, or of another shape.
    """
    first, second = (f".{name}." for name in PACKED)
    pairs = {name: name.replace(first, second) for name in weights.names if f".mlp{first}" in name}
    if not pairs:
        return weights
    names: dict[str, str] = {}
    products: dict[str, Product | Stack] = {}
    for name, stored in weights.stored_names.items():
        if name in pairs:
            gate, up = name, pairs[name]
            if up not in weights or weights.info(gate) != weights.info(up):
                what = f"cannot use weights {weights.source.label}"
                raise BadInputError(what, f"{up} is no match for {gate}", "is it whole?")
            packed = name.replace(first, ".w12.")
            names[packed] = f"{weights.prefix}{packed}"
            products[names[packed]] = Stack((stored, weights.stored_names[up]))
        elif name not in pairs.values():
            names[name] = stored
    return replace(weights, source=MultipliedTensors(weights.source, products), stored_names=names)


def without_leftovers(weights: Weights) -> Weights:
    """The weights as the official files have them: factors multiplied when they are read, the loose key ignored.

    Raises `BadInputError` for factors that are not all there, or whose shapes make no product.
    """
    kept = {name: stored for name, stored in weights.stored_names.items() if name != LOOSE}
    ignored = (*weights.ignored, *([weights.stored_names[LOOSE]] if LOOSE in weights else ()))
    layers: dict[str, tuple[str, ...]] = {}
    for name in kept:
        if match := _FACTOR.match(name):
            layers[match[1]] = FUSED if match[2] else ("",)
    if not layers:
        return replace(weights, stored_names=kept, ignored=ignored)
    products = {
        f"{layer}weight": Product(tuple(_factors(weights, layer, suffix) for suffix in suffixes))
        for layer, suffixes in layers.items()
    }
    names: dict[str, str] = {}
    for name, stored in kept.items():  # a weight comes where the first tensor of its layer was
        match = _FACTOR.match(name)
        layer = match[1] if match else name[: name.rindex(".") + 1] if "." in name else ""
        if layer in layers:
            names.setdefault(f"{layer}weight", f"{weights.prefix}{layer}weight")
        if not match:
            names[name] = stored
    stored_products = {names[name]: product for name, product in products.items()}
    return replace(
        weights, source=MultipliedTensors(weights.source, stored_products), stored_names=names, ignored=ignored
    )


@dataclass(frozen=True)
class Product:
    """A weight by the stored names of its factors, one set of four for each part of its rows."""

    parts: tuple[tuple[str, str, str, str], ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part)

    def info(self, infos: Mapping[str, TensorInfo]) -> TensorInfo:
        """Shape and dtype of the weight."""
        rows = sum(infos[u].shape[0] for u, *_ in self.parts)
        return TensorInfo((rows, infos[self.parts[0][2]].shape[1]), infos[self.parts[0][0]].dtype)

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """U diag(S + ε) Vᵀ, part below part."""
        import torch

        return torch.cat([tensors[u] * (tensors[s] + tensors[e]) @ tensors[vt] for u, s, vt, e in self.parts])


@dataclass(frozen=True)
class Stack:
    """A tensor by the stored names of those whose rows it has, one below another; they are of one dtype."""

    names: tuple[str, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return self.names

    def info(self, infos: Mapping[str, TensorInfo]) -> TensorInfo:
        """Shape and dtype of the tensor."""
        shapes = [infos[name].shape for name in self.names]
        return TensorInfo((sum(shape[0] for shape in shapes), *shapes[0][1:]), infos[self.names[0]].dtype)

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The rows, part below part."""
        import torch

        return torch.cat([tensors[name] for name in self.names])


@dataclass(frozen=True)
class MultipliedTensors:
    """A source some of whose tensors are made of others."""

    source: TensorSource
    products: Mapping[str, Product | Stack] = field(repr=False)

    @property
    def label(self) -> str:
        return self.source.label

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        infos = self.source.infos
        return {**infos, **{name: product.info(infos) for name, product in self.products.items()}}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors, in the order asked for; the factors of one product at a time."""
        found: dict[str, Tensor] = {}
        for name in names:
            if product := self.products.get(name):
                found[name] = product.of(self.source.read(product.sources))
            else:
                found |= self.source.read([name])
        return found


def _factors(weights: Weights, layer: str, suffix: str) -> tuple[str, str, str, str]:
    """The stored names of U, S, Vᵀ and ε, if they are all there and fit."""
    names = [f"{layer}{factor}{suffix}" for factor in FACTORS]
    what = f"cannot use weights {weights.source.label}"
    if missing := [name for name in names if name not in weights]:
        raise BadInputError(what, f"of the factors of {layer}weight it has no {', '.join(missing)}", "is it whole?")
    shapes = [weights.shape(name) for name in names]
    u, s, vt, epsilon = shapes
    if [len(shape) for shape in shapes] != [2, 1, 2, 1] or not u[1] == s[0] == epsilon[0] == vt[0]:
        raise BadInputError(what, f"the factors of {layer}weight do not fit: {shapes}", "is it whole?")
    first, second, third, fourth = (weights.stored_names[name] for name in names)
    return first, second, third, fourth
