"""A local folder as `save_pretrained` leaves it: weights in safetensors, and small text files that describe them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

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

from . import preprocessor

if TYPE_CHECKING:
    from torch import Tensor


CONFIG = "config.json"
ADAPTER = "adapter_config.json"
CARD = "README.md"
OPTIONAL = (*preprocessor.NAMES, CARD)
MAX_BYTES = 4 << 20  # of a text file; the largest configurations, with a thousand labels, have a tenth of it

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class DescribedWeights:
    """Weights with the text files that lay beside them."""

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

    Raises `NoInputError` where a file is missing and `BadInputError` where there are only pickles.
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
    """The text files of a folder by name. Raises `NoInputError` where there is no `config.json`."""
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
    """The license that the head of a model card names, if there is a card."""
    head = re.match(r"---\s*\n(.*?)\n---", sidecars.get(CARD, ""), re.DOTALL)
    named = re.search(r"^license: *[\"']?([\w.-]+)", head[1], re.MULTILINE) if head else None
    return named[1] if named else None


def pickled(place: str) -> BadInputError:
    """The error for weights that are there only as pickles."""
    why = "its weights are pickles alone, which are not opened unless they are named"
    remedy = "give --weights FOLDER/pytorch_model.bin (tensors alone are read), or save it as safetensors"
    return BadInputError(f"cannot use {place}", why, remedy)


PREFIX = "hf/"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def place_of(request: ModelRequest) -> str:
    """The folder or repository as the user wrote it."""
    return request.model.removeprefix(PREFIX)


def local_folder(request: ModelRequest) -> Path | None:
    """The folder that is meant, or None for a repository. Raises `UsageError` for a revision of a folder."""
    place = place_of(request)
    path = Path(place).expanduser()
    if not place.startswith((".", "/", "~")) and not (place and path.is_dir()):
        return None
    if request.revision is not None:
        what, why = f"cannot use revision {request.revision!r}", f"{place} is a folder"
        raise UsageError(what, why, "leave --revision out")
    return path


def repository(request: ModelRequest) -> str:
    """The repository that is meant. Raises `UsageError` for a name that none can have."""
    place = place_of(request)
    if not _REPOSITORY.fullmatch(place):
        why = "it is no folder here, and no OWNER/NAME"
        raise UsageError(f"unknown model {request.model!r}", why, "name a folder as hf/./FOLDER, or a repository")
    return place
