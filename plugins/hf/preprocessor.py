"""Image size and normalization, as the preprocessor's file says them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sinder_cli import BadInputError

from .config import Config, read_table
from .families import Triple

NAMES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Preprocessor:
    """The side of a square input in pixels, and what `(pixels / 255 − mean) / std` takes."""

    size: int
    mean: Triple
    std: Triple


def read_preprocessor(sidecars: Mapping[str, str], config: Config, place: str) -> Preprocessor:
    """What the first of the preprocessor's files says; the family's usual values where it says nothing.

    Raises `BadInputError` for values that make no sense.
    """
    found = next((name for name in NAMES if name in sidecars), None)
    said = read_table(sidecars[found], f"{place}/{found}") if found else {}
    said = said.get("image_processor", said)  # the newer file keeps it beside the tokenizer's
    path = f"{place}/{found}"
    if not isinstance(said, dict):
        raise BadInputError(f"cannot read {path}", "its image_processor is no table", "fetch it again")
    mean = _triple(said, "image_mean", config.family.mean, path)
    std = _triple(said, "image_std", config.family.std, path)
    if said.get("do_normalize", True) is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    scale = _scale(said, path)
    return Preprocessor(_size(said) or config.image_size, _divided(mean, scale), _divided(std, scale))


def _scale(said: Mapping[str, Any], path: str) -> float:
    """What the file multiplies pixels of 0 to 255 with, in units of 1/255."""
    factor = said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) is not False else 1.0
    if not isinstance(factor, int | float) or not factor > 0:
        raise BadInputError(f"cannot read {path}", f"rescale_factor is {factor!r}, no scale", "fetch it again")
    scale = factor * 255
    return 1.0 if abs(scale - 1) < 1e-6 else scale  # files write 1/255 with more or fewer digits


def _divided(values: Triple, scale: float) -> Triple:
    red, green, blue = (value / scale for value in values)
    return red, green, blue


def _size(said: Mapping[str, Any]) -> int | None:
    """The side of what the model gets: of the crop, if there is one, else of the resized image."""
    if said.get("do_center_crop") and (side := _side(said.get("crop_size"))):
        return side
    return _side(said.get("size")) if said.get("do_resize", True) else None


def _side(size: object) -> int | None:
    """The shorter side of a size in any of the ways that the library writes one."""
    if isinstance(size, dict):
        sides = [size[key] for key in ("shortest_edge", "height", "width") if isinstance(size.get(key), int)]
        return min(sides, default=None)
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def _triple(said: Mapping[str, Any], key: str, usual: Triple, path: str) -> Triple:
    values = said.get(key)
    if values is None:
        return usual
    numbers: list[Any] = values if isinstance(values, list) else [values] * 3
    least = 0 if key == "image_std" else -math.inf
    if len(numbers) != 3 or not all(isinstance(v, int | float) and least < v < math.inf for v in numbers):
        raise BadInputError(f"cannot read {path}", f"{key} is {values!r}, no three numbers", "fetch it again")
    red, green, blue = map(float, numbers)
    return red, green, blue
