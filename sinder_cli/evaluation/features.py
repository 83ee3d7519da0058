"""Features on disk: extracted once for a model, a view and a list of images, in float16, and read one image at a time.

A store is a folder `KEY/` of chunks, `00000.safetensors` and so on, each with the features of some images in their
order; a chunk is written whole or not at all, so that an extraction goes on where it was interrupted. KEY is a hash of
all that the features depend on, which `about.json` lists; which parts of the pass are kept is not among it: tasks that
see the same images in the same way share a store, and a part that only a later task needs is added to the chunks.
Memory does not grow with the number of images.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
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
from sinder_cli.images.decoding import UnreadableImageError
from sinder_cli.images.loading import Changes, load_in_order

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.evaluation.views import ViewPreprocessing
    from sinder_cli.images.loading import LoadedImage
    from sinder_cli.images.sources import ImageSource

VERSION = 2  # of what the chunks hold; a change of their computation must raise it
MAPS_AT_A_TIME = 16  # images of a chunk, where maps are kept of each
VECTORS_AT_A_TIME = 512  # where only vectors are
VECTORS = frozenset({"cls", "mean", "stream_cls", *DERIVED_MEANS.values(), "outlying"})
ALWAYS = frozenset({"outlying"})  # kept in every chunk: the placebos need it
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
        """Return the store for features that depend on `about`, below `root`; nothing is written.

        Of `parts`, it only matters whether they are vectors alone.
        """
        at_a_time = MAPS_AT_A_TIME if set(parts) - VECTORS else VECTORS_AT_A_TIME
        text = json.dumps({**about, "at_a_time": at_a_time, "version": VERSION}, sort_keys=True, default=str)
        key = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return cls(root / key, images, at_a_time)

    @property
    def chunks(self) -> range:
        return range((self.images + self.at_a_time - 1) // self.at_a_time)

    def path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05}.safetensors"

    def lacking(self, parts: Iterable[Part]) -> list[int]:
        """Return the chunks that cannot be read, or lack one of the parts."""
        wanted = ALWAYS | set(parts)
        return [chunk for chunk in self.chunks if not wanted <= _Held.by(self.path(chunk)).parts]

    def indices(self, chunk: int) -> range:
        """Return the images of a chunk."""
        return range(chunk * self.at_a_time, min((chunk + 1) * self.at_a_time, self.images))

    def problems(self) -> dict[int, str]:
        """Return the images that could not be read, with the reason."""
        return {index: why for chunk in self.chunks for index, why in _Held.by(self.path(chunk)).problems.items()}

    def read(self, name: str, index: int) -> Tensor | None:
        """Return one part of one image as it is stored, or None if it has none."""
        file, names = _opened(self.path(index // self.at_a_time))
        key = f"{index}.{name}"
        return file.get_tensor(key) if key in names else None


@dataclass(frozen=True)
class _Held:
    """What a chunk holds: parts, of all its images but those that could not be read, with the reason."""

    parts: frozenset[str] = frozenset()
    problems: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def by(cls, path: Path) -> _Held:
        """Read it from a file; nothing, if the file is not there or is damaged."""
        if not path.is_file():
            return cls()
        try:
            with safe_open(path, "pt") as file:
                noted = file.metadata() or {}
        except (SafetensorError, OSError):
            return cls()
        problems = {int(index): why for index, why in json.loads(noted["problems"]).items()}
        return cls(frozenset(json.loads(noted["parts"])), problems)


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

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.preprocess.view.parts

    def missing(self) -> list[int]:
        """Return the chunks that lack one of the parts, or an image that could not be read then, and can be now."""
        lacking = self.store.lacking(self.parts)
        again = {
            index // self.store.at_a_time
            for index in (self.store.problems() if len(lacking) < len(self.store.chunks) else ())
            if self._can_be_read(index)
        }
        return sorted({*lacking, *again})

    def _can_be_read(self, index: int) -> bool:
        try:
            self.preprocess.fit(self.source.load(index, self.preprocess.decoded_for))
        except UnreadableImageError:
            return False
        return True

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
        """Extract the `missing` chunks; each of several ranks takes its share of them.

        Raises `StorageError` or `CannotCreateError` for what the file system refuses.
        """
        if ranks.writes:
            self._begin()
        ranks.all_gather(None)  # the folder is there now
        mine = list(ranks.share(missing))
        order = [index for chunk in mine for index in self.store.indices(chunk)]
        loaded = load_in_order(self.source, self.preprocess, order, workers)
        label = f"{side}: features"
        with_progress = tracked(_noting_pages(loaded, emit), emit, label, len(order), "images") if order else iter(())
        for chunk, images in groupby(with_progress, key=lambda image: image.index // self.store.at_a_time):
            self._write(chunk, list(_observed(observer, images, batch_size, device)))
        ranks.all_gather(None)

    def _begin(self) -> None:
        try:
            make_folder(self.store.folder)
        except OSError as error:
            raise output_error(self.store.folder, error) from error
        write_json(self.store.folder / "about.json", {**self.about, "version": VERSION})

    def _write(self, chunk: int, images: Sequence[_Observed]) -> None:
        """Write a chunk; other parts than ours that it held already stay, if they are of the same images."""
        path = self.store.path(chunk)
        found = {f"{each.index}.{name}": _stored(name, value) for each in images for name, value in each.parts.items()}
        problems = {each.index: each.problem for each in images if each.problem}
        fresh = ALWAYS | set(self.parts)
        with _alone(self.store.folder):
            held = _Held.by(path)
            kept = held.parts - fresh if held.problems.keys() == problems.keys() else frozenset()
            found |= _tensors_of(path, kept)
            noted = {"problems": json.dumps(problems), "parts": json.dumps(sorted(fresh | kept))}
            _opened.cache_clear()  # the chunk may be another now
            write_safetensors(path, infos_of(found), found.values(), noted)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from adding parts to the same chunk meanwhile, where the file system can lock folders."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _tensors_of(path: Path, parts: Iterable[str]) -> dict[str, Tensor]:
    """Return some parts of all images of a chunk, by their names in the file."""
    names = {name for part in parts for name in (part, *(DERIVED_MEANS.values() if part == "mean" else ()))}
    if not names:
        return {}
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.partition(".")[2] in names}  # noqa: SIM118


def shared(extractions: Iterable[Extraction]) -> list[Extraction]:
    """Return the extractions with those of one store joined into one, of all their parts: one pass serves them all."""
    joined: dict[Path, Extraction] = {}
    for each in extractions:
        if (other := joined.get(each.store.folder)) is not None:
            parts = tuple(dict.fromkeys((*other.parts, *each.parts)))
            view = replace(each.preprocess.view, parts=parts)
            each = replace(each, preprocess=replace(each.preprocess, view=view))
        joined[each.store.folder] = each
    return list(joined.values())


def _noting_pages(images: Iterable[LoadedImage], emit: Emit) -> Iterator[LoadedImage]:
    """Yield the images; at the end, emit a note if only the first page was used of some."""
    changes = Changes()
    for image in images:
        if "first page" in image.changes:
            changes.add(replace(image, changes=("first page",)))
        yield image
    changes.tell(emit)


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
    parts: frozenset[str]  # that the view keeps: a store may hold more, for other tasks

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, name: Part, index: int) -> Tensor:
        """Return one part of one image: float32, or bool for what is outlying. Raises `ValueError` for one not kept."""
        if name not in self.parts:
            raise ValueError(f"the view keeps {', '.join(sorted(self.parts))}, and no {name}")
        at = self.indices[index]
        if name == "mean":
            return self._read(DERIVED_MEANS.get(self.side, name), at)
        value = self._read(name, at)
        if name.startswith("outlying"):
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
