"""A local folder as `save_pretrained` writes it: weights in safetensors, and small text files that describe them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinder_cli import (
    BadInputError,
    ModelRequest,
    NoInputError,
    TensorInfo,
    TensorSource,
    UsageError,
    open_checkpoint,
    weights_in,
)

from .config import Config, read_table
from .families import Triple

if TYPE_CHECKING:
    from torch import Tensor


CONFIG = "config.json"
ADAPTER = "adapter_config.json"
CARD = "README.md"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
OPTIONAL = (*PREPROCESSORS, CARD)
MAX_BYTES = 4 << 20  # of a text file; the largest configurations, with a thousand labels, have a tenth of that

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class DescribedWeights:
    """Weights with the text files of the same folder."""

    source: TensorSource
    sidecars: Mapping[str, str] = field(repr=False)

    @property
    def label(self) -> str:
        return self.source.label

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self.source.infos

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return self.source.read(names)


def open_folder(folder: Path) -> DescribedWeights:
    """Open a folder's weights, reading names, shapes and dtypes only, and its text files.

    Raises `NoInputError` if a file is missing and `BadInputError` if there are only pickles.
    """
    sidecars = read_texts(folder)
    try:
        found = weights_in(folder)
    except NoInputError:
        if any((folder / name).exists() for name in PICKLES):
            raise pickled(str(folder)) from None
        raise
    return DescribedWeights(open_checkpoint(found), sidecars)


def read_texts(folder: Path) -> dict[str, str]:
    """Read the text files of a folder by name. Raises `NoInputError` if there is no `config.json`."""
    if not (folder / CONFIG).is_file():
        why = f"there is no {CONFIG}" if folder.is_dir() else "there is no such folder"
        remedy = "name a folder that save_pretrained wrote, or OWNER/NAME"
        if (folder / ADAPTER).is_file():
            why, remedy = "it is an adapter of peft", "put it into its model with merge_and_unload(), and save that"
        raise NoInputError(f"cannot use {folder}", why, remedy)
    return {name: _text(folder / name) for name in (CONFIG, *OPTIONAL) if (folder / name).is_file()}


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise BadInputError(f"cannot read {path}", f"it has more than {MAX_BYTES >> 20} MB", "is it a text file?")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(f"cannot read {path}", str(error), "fetch it again") from error


def license_of(sidecars: Mapping[str, str]) -> str | None:
    """Return the license named in the head of a model card, or None."""
    head = re.match(r"---\s*\n(.*?)\n---", sidecars.get(CARD, ""), re.DOTALL)
    named = re.search(r"^license: *[\"']?([\w.-]+)", head[1], re.MULTILINE) if head else None
    return named[1] if named else None


def pickled(place: str) -> BadInputError:
    """Return the error for weights that exist only as pickles."""
    why = "its weights exist only as pickles, which are not opened unless they are named"
    remedy = "give --weights FOLDER/pytorch_model.bin (only tensors are read), or save it as safetensors"
    return BadInputError(f"cannot use {place}", why, remedy)


PREFIX = "hf/"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def place_of(request: ModelRequest) -> str:
    """Return the folder or repository as the user wrote it."""
    return request.model.removeprefix(PREFIX)


def local_folder(request: ModelRequest) -> Path | None:
    """Return the requested folder, or None for a repository. Raises `UsageError` for a revision of a folder."""
    place = place_of(request)
    path = Path(place).expanduser()
    if not place.startswith((".", "/", "~")) and not (place and path.is_dir()):
        return None
    if request.revision is not None:
        what, why = f"cannot use revision {request.revision!r}", f"{place} is a folder"
        raise UsageError(what, why, "leave --revision out")
    return path


def repository(request: ModelRequest) -> str:
    """Return the requested repository. Raises `UsageError` for an invalid name."""
    place = place_of(request)
    if not _REPOSITORY.fullmatch(place):
        why = "it is neither a local folder nor OWNER/NAME"
        raise UsageError(f"unknown model {request.model!r}", why, "name a folder as hf/./FOLDER, or a repository")
    return place


@dataclass(frozen=True)
class Preprocessor:
    """The side of a square input in pixels, and mean and std of `(pixels / 255 − mean) / std`."""

    size: int
    mean: Triple
    std: Triple


def read_preprocessor(sidecars: Mapping[str, str], config: Config, place: str) -> Preprocessor:
    """Read the first of the preprocessor's files; missing values are the family's usual ones.

    Raises `BadInputError` for invalid values.
    """
    found = next((name for name in PREPROCESSORS if name in sidecars), None)
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
    """Return the factor by which the file multiplies pixels of 0 to 255, in units of 1/255."""
    factor = said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) is not False else 1.0
    if not isinstance(factor, int | float) or not factor > 0:
        raise BadInputError(f"cannot read {path}", f"rescale_factor is {factor!r}, no scale", "fetch it again")
    scale = factor * 255
    return 1.0 if abs(scale - 1) < 1e-6 else scale  # files write 1/255 with more or fewer digits


def _divided(values: Triple, scale: float) -> Triple:
    red, green, blue = (value / scale for value in values)
    return red, green, blue


def _size(said: Mapping[str, Any]) -> int | None:
    """Return the side of the model's input: of the crop, if there is one, else of the resized image."""
    if said.get("do_center_crop") and (side := _side(said.get("crop_size"))):
        return side
    return _side(said.get("size")) if said.get("do_resize", True) else None


def _side(size: object) -> int | None:
    """Return the shorter side of a size, in any format of the library; None if it has none."""
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
