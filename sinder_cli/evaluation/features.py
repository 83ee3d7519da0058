"""Features on disk: extracted once for a model, a view and a list of images, in float16, and read one image at a time.

A store is a folder `KEY/` of parts, `00000.safetensors` and so on, each with the features of some images in their
order; a part is written whole or not at all, so that an extraction goes on where it was interrupted. KEY is a hash of
all that the features depend on, which `about.json` lists. Memory does not grow with the number of images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from sinder_cli.backbone.sources import infos_of
from sinder_cli.backbone.storing import write_safetensors
from sinder_cli.distributed import Ranks
from sinder_cli.errors import BadInputError
from sinder_cli.evaluation.contract import Part, SideName
from sinder_cli.evaluation.views import DERIVED, DERIVED_MEANS, Observer
from sinder_cli.events import Emit, tracked
from sinder_cli.files import make_folder, output_error, write_json
from sinder_cli.images.loading import load_in_order

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.evaluation.views import ViewPreprocessing
    from sinder_cli.images.loading import LoadedImage
    from sinder_cli.images.sources import ImageSource

VERSION = 1  # of what the parts hold; a change of their computation must raise it
MAPS_AT_A_TIME = 16  # images of a part, where maps are kept of each
VECTORS_AT_A_TIME = 512  # where only vectors are
VECTORS = frozenset({"cls", "mean", "stream_cls", *DERIVED_MEANS.values(), "outlying"})
EXACT = frozenset({"norms"})  # kept in float32: norms exceed what float16 holds
MOST_FLOAT16 = 65504.0


@dataclass(frozen=True)
class Store:
    """The features of a list of images on disk, perhaps unfinished."""

    folder: Path
    images: int
    at_a_time: int

    @classmethod
    def of(cls, root: Path, about: Mapping[str, Any], images: int, parts: Iterable[Part]) -> Store:
        """Return the store for features that depend on `about`, below `root`; nothing is written."""
        text = json.dumps({**about, "version": VERSION}, sort_keys=True, default=str)
        key = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        maps = bool(set(parts) - VECTORS)
        return cls(root / key, images, MAPS_AT_A_TIME if maps else VECTORS_AT_A_TIME)

    @property
    def parts(self) -> range:
        return range((self.images + self.at_a_time - 1) // self.at_a_time)

    def path(self, part: int) -> Path:
        return self.folder / f"{part:05}.safetensors"

    def missing(self) -> list[int]:
        """Return the parts that are not there yet, cannot be read, or lack an image that could not be read then."""
        return [part for part in self.parts if not _whole(self.path(part))]

    def indices(self, part: int) -> range:
        """Return the images of a part."""
        return range(part * self.at_a_time, min((part + 1) * self.at_a_time, self.images))

    def problems(self) -> dict[int, str]:
        """Return the images that could not be read, with the reason."""
        found: dict[int, str] = {}
        for part in self.parts:
            with safe_open(self.path(part), "pt") as file:
                noted = json.loads((file.metadata() or {}).get("problems", "{}"))
            found |= {int(index): why for index, why in noted.items()}
        return found

    def read(self, name: str, index: int) -> Tensor | None:
        """Return one part of one image as it is stored, or None if it has none."""
        file, names = _opened(self.path(index // self.at_a_time))
        key = f"{index}.{name}"
        return file.get_tensor(key) if key in names else None


def _whole(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("problems") == "{}"
    except (SafetensorError, OSError):
        return False


@lru_cache(maxsize=8)
def _opened(path: Path) -> tuple[Any, frozenset[str]]:
    file = safe_open(path, "pt")
    return file, frozenset(file.keys())


@dataclass(frozen=True)
class Extraction:
    """What is extracted: the images of a split in one view, by one backbone."""

    store: Store
    about: Mapping[str, Any]
    source: ImageSource
    preprocess: ViewPreprocessing

    def run(
        self,
        missing: Sequence[int],
        observer: Observer,
        side: SideName,
        batch_size: int,
        workers: int,
        device: str,
        emit: Emit,
        ranks: Ranks,
    ) -> None:
        """Extract the `missing` parts; each of several ranks takes its share of them.

        Raises `StorageError` or `CannotCreateError` for what the file system refuses.
        """
        if ranks.writes:
            self._begin()
        ranks.all_gather(None)  # the folder is there now
        mine = list(ranks.share(missing))
        order = [index for part in mine for index in self.store.indices(part)]
        loaded = load_in_order(self.source, self.preprocess, order, workers)
        label = f"{side}: features"
        with_progress = tracked(loaded, emit, label, len(order), "images") if order else iter(())
        for part, images in groupby(with_progress, key=lambda image: image.index // self.store.at_a_time):
            self._write(part, list(_observed(observer, images, batch_size, device)))
        ranks.all_gather(None)

    def _begin(self) -> None:
        try:
            make_folder(self.store.folder)
        except OSError as error:
            raise output_error(self.store.folder, error) from error
        write_json(self.store.folder / "about.json", {**self.about, "version": VERSION})

    def _write(self, part: int, images: Sequence[_Observed]) -> None:
        found = {f"{each.index}.{name}": _stored(name, value) for each in images for name, value in each.parts.items()}
        problems = {str(each.index): each.problem for each in images if each.problem}
        path = self.store.path(part)
        _opened.cache_clear()  # a part that could not be read may have been replaced
        write_safetensors(path, infos_of(found), found.values(), {"problems": json.dumps(problems)})


@dataclass(frozen=True)
class _Observed:
    """The parts of one image, or why it could not be read."""

    index: int
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    problem: str = ""


def _observed(observer: Observer, images: Iterable[LoadedImage], batch_size: int, device: str) -> Iterator[_Observed]:
    """Observe images in batches of equal shape that follow one another; the order is kept."""
    shape = lambda image: None if image.pixels is None else tuple(image.pixels.shape)  # noqa: E731
    for key, group in groupby(images, key=shape):
        if key is None:
            yield from (_Observed(image.index, problem=image.problem) for image in group)
            continue
        for batch in _batches(group, batch_size):
            pixels = torch.stack([image.pixels for image in batch if image.pixels is not None]).to(device)
            found = {name: value.cpu() for name, value in observer.observe(pixels).items()}
            for at, image in enumerate(batch):
                yield _Observed(image.index, {name: value[at] for name, value in found.items()})


def _batches(images: Iterable[LoadedImage], size: int) -> Iterator[list[LoadedImage]]:
    batch: list[LoadedImage] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _stored(name: str, value: Tensor) -> Tensor:
    """Return a part as it is stored: float16, unless that cannot hold it; a mask as uint8."""
    if value.dtype == torch.bool:
        return value.to(torch.uint8)
    value = value.float()
    largest = value.abs().amax() if value.numel() else value.new_zeros(())
    narrow = name not in EXACT and bool(largest <= MOST_FLOAT16)
    return value.to(torch.float16) if narrow else value


@dataclass(frozen=True)
class StoredFeatures:
    """The features of one side on some images of a store; placebos are derived from the original's as they are read."""

    store: Store
    side: SideName
    indices: Sequence[int]  # images of the store, in the order of the split

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, name: Part, index: int) -> Tensor:
        """Return one part of one image: float32, or bool for `outlying`."""
        at = self.indices[index]
        if name == "mean":
            return self._read(DERIVED_MEANS.get(self.side, name), at)
        value = self._read(name, at)
        if name == "outlying":
            return value.bool()
        if self.side in DERIVED and value.dim() == 3 and name not in {"norms", "colour"}:
            return DERIVED[self.side](value, self._read("outlying", at).bool())
        return value

    def _read(self, name: str, at: int) -> Tensor:
        value = self.store.read(name, at)
        if value is None:
            raise BadInputError("features are missing", f"{name} of image {at} in {self.store.folder}", "remove it")
        return value if value.dtype == torch.uint8 else value.float()

    def stacked(self, name: Part) -> Tensor:
        """Return a part of all images, `[images, …]`."""
        return torch.stack([self.part(name, index) for index in range(len(self))])
