"""Features on disk: extracted once for a model, a view and an image, in float16, and read one image at a time.

A store is a folder `KEY/` of chunks, each a file with some parts of the pass of some images; a chunk is written whole
or not at all, and never changed, so that an extraction goes on where it was interrupted. KEY is a hash of all that the
features depend on but the image, which `about.json` lists. Images are known by their identity, whatever list they are
in: tasks and splits that see an image in the same way share its features, and a part that only a later task needs is
added in chunks of its own. Memory does not grow with the number of images, but for their identities and places.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from sinder_cli.images.sources import ImageFiles, JoinedImages, SomeImages

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
NOWHERE = -1


def identities(source: ImageSource) -> list[str]:
    """Return what each image is known by: path, size and time of a file; else its place in what it was drawn from."""
    if isinstance(source, SomeImages):
        known = identities(source.source)
        return [known[index] for index in source.indices]
    if isinstance(source, JoinedImages):
        return [identity for part in source.parts for identity in identities(part)]
    if isinstance(source, ImageFiles):
        pairs = zip(source.paths, source.states, strict=True)
        return [_hash(os.fsencode(path.absolute()) + f" {size} {time}".encode()) for path, (size, time) in pairs]
    drawn = source.fingerprint()
    return [_hash(f"{drawn} {index}".encode()) for index in range(len(source))]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class _Chunk:
    """The header of a chunk: its images, the parts that it has of them, and those that could not be read."""

    path: Path
    images: tuple[str, ...]
    parts: frozenset[str]
    problems: Mapping[str, str]  # by image, the reason

    @classmethod
    def read(cls, path: Path) -> _Chunk | None:
        """Return the header of a file, or None if the file is damaged."""
        try:
            with safe_open(path, "pt") as file:
                noted = file.metadata() or {}
            images, parts, problems = (json.loads(noted[name]) for name in ("images", "parts", "problems"))
        except (SafetensorError, OSError, KeyError, ValueError):
            return None
        return cls(path, tuple(images), frozenset(parts), problems)


@dataclass(frozen=True)
class Places:
    """Where the parts of a list of images lie in a store."""

    files: tuple[Path, ...]
    by_part: Mapping[str, tuple[Tensor, Tensor]]  # of every image: the file, NOWHERE if there is none, and the place
    problems: Mapping[int, str]  # images that could not be read, with the reason

    def lacking(self, parts: Iterable[str]) -> list[int]:
        """Return the images that lack one of the parts; those that could not be read among them."""
        known = torch.stack([self.by_part[part][0] != NOWHERE for part in sorted(ALWAYS | set(parts))])
        return (~known.all(dim=0)).nonzero()[:, 0].tolist()

    def read(self, part: str, name: str, index: int) -> Tensor | None:
        """Return a tensor of one image as it is stored with a part, or None if there is none."""
        files, places = self.by_part[part]
        if files[index] == NOWHERE:
            return None
        file, names = _opened(self.files[int(files[index])])
        key = f"{int(places[index])}.{name}"
        return file.get_tensor(key) if key in names else None


@dataclass(frozen=True)
class Store:
    """The features of a model in one view on disk."""

    folder: Path

    @classmethod
    def of(cls, root: Path, about: Mapping[str, Any]) -> Store:
        """Return the store for features that depend on `about`, below `root`; nothing is written."""
        text = json.dumps({**about, "version": VERSION}, sort_keys=True, default=str)
        return cls(root / _hash(text.encode("utf-8", "surrogateescape")))

    def places(self, images: Sequence[str], parts: Iterable[str]) -> Places:
        """Find images, by their identities, among the chunks; damaged chunks are passed over."""
        wanted = sorted(ALWAYS | set(parts))
        at: dict[str, list[int]] = {}
        for index, image in enumerate(images):
            at.setdefault(image, []).append(index)
        nothing = torch.full((len(images),), NOWHERE, dtype=torch.int32)
        by_part = {part: (nothing.clone(), nothing.clone()) for part in wanted}
        files: list[Path] = []
        problems: dict[int, str] = {}
        for chunk in filter(None, map(_Chunk.read, sorted(self.folder.glob("*.safetensors")))):
            indices = [(index, place) for place, image in enumerate(chunk.images) for index in at.get(image, ())]
            unread = {index: chunk.problems[images[index]] for index, _ in indices if images[index] in chunk.problems}
            problems |= unread
            found = [(index, place) for index, place in indices if index not in unread]
            if not found:
                continue
            own, places = torch.tensor(found).unbind(dim=1)
            for part in chunk.parts & set(wanted):
                by_part[part][0][own], by_part[part][1][own] = len(files), places.int()
            files.append(chunk.path)
        there = torch.stack([found[0] != NOWHERE for found in by_part.values()]).all(dim=0)
        return Places(tuple(files), by_part, {index: why for index, why in problems.items() if not there[index]})


@lru_cache(maxsize=8)
def _opened(path: Path) -> tuple[Any, frozenset[str]]:
    file = safe_open(path, "pt")
    return file, frozenset(file.keys())


@dataclass(frozen=True)
class Extraction:
    """What is extracted: some images in one view, by one backbone."""

    store: Store
    about: Mapping[str, Any]
    source: ImageSource
    images: Sequence[str]  # identities
    preprocess: ViewPreprocessing

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.preprocess.view.parts

    @property
    def at_a_time(self) -> int:
        """Images of a chunk."""
        return MAPS_AT_A_TIME if set(self.parts) - VECTORS else VECTORS_AT_A_TIME

    def places(self) -> Places:
        """Find the images in the store."""
        return self.store.places(self.images, self.parts)

    def missing(self) -> list[int]:
        """Return the images that lack one of the parts, but for those that could not be read and still cannot be."""
        places = self.places()
        return [
            index for index in places.lacking(self.parts) if index not in places.problems or self._can_be_read(index)
        ]

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
        side: str,
        batch_size: int,
        workers: int,
        device: str,
        emit: Emit,
        ranks: Ranks,
    ) -> None:
        """Extract the `missing` images, in chunks; each of several ranks takes its share of the chunks.

        `side` is how messages call it. Raises `StorageError` or `CannotCreateError` for what the file system refuses.
        """
        if ranks.writes:
            self._begin()
        ranks.all_gather(None)  # the folder is there now
        chunks = [missing[first : first + self.at_a_time] for first in range(0, len(missing), self.at_a_time)]
        mine = list(ranks.share(chunks))
        order = [index for chunk in mine for index in chunk]
        loaded = load_in_order(self.source, self.preprocess, order, workers)
        label = f"{side}: features"
        with_progress = tracked(_noting_pages(loaded, emit), emit, label, len(order), "images") if order else iter(())
        counted = enumerate(with_progress)
        for _, images in groupby(counted, key=lambda pair: pair[0] // self.at_a_time):
            self._write(list(_observed(observer, (image for _, image in images), batch_size, device)))
        ranks.all_gather(None)

    def _begin(self) -> None:
        try:
            make_folder(self.store.folder)
        except OSError as error:
            raise output_error(self.store.folder, error) from error
        write_json(self.store.folder / "about.json", {**self.about, "version": VERSION})

    def _write(self, observed: Sequence[_Observed]) -> None:
        tensors = {
            f"{place}.{name}": _stored(name, value)
            for place, each in enumerate(observed)
            for name, value in each.parts.items()
        }
        images, parts = [self.images[each.index] for each in observed], sorted(ALWAYS | set(self.parts))
        problems = {self.images[each.index]: each.problem for each in observed if each.problem}
        noted = {"images": json.dumps(images), "parts": json.dumps(parts), "problems": json.dumps(problems)}
        path = self.store.folder / f"{_hash(f'{images} {parts}'.encode())}.safetensors"
        _opened.cache_clear()  # a damaged file may have had that name
        write_safetensors(path, infos_of(tensors), tensors.values(), noted)


def shared(extractions: Iterable[Extraction]) -> list[Extraction]:
    """Return the extractions with those of one store joined into one, of all their images and parts."""
    by_folder: dict[Path, list[Extraction]] = {}
    for each in extractions:
        by_folder.setdefault(each.store.folder, []).append(each)
    return [_joined(group) for group in by_folder.values()]


def _joined(group: Sequence[Extraction]) -> Extraction:
    first = group[0]
    parts = tuple(dict.fromkeys(part for each in group for part in each.parts))
    images = [image for each in group for image in each.images]
    kept = list({image: index for index, image in reversed(list(enumerate(images)))}.values())[::-1]  # each image once
    source = SomeImages(JoinedImages(tuple(each.source for each in group)), kept)
    preprocess = replace(first.preprocess, view=replace(first.preprocess.view, parts=parts))
    return replace(first, source=source, images=[images[index] for index in kept], preprocess=preprocess)


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

    places: Places
    side: SideName
    indices: Sequence[int]  # images of the list that is placed, in the order of the split
    parts: frozenset[str]  # that the view keeps: a store may hold more, for other tasks

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, name: Part, index: int) -> Tensor:
        """Return one part of one image: float32, or bool for what is outlying. Raises `ValueError` for one not kept."""
        if name not in self.parts:
            raise ValueError(f"the view keeps {', '.join(sorted(self.parts))}, and no {name}")
        at = self.indices[index]
        if name == "mean":
            return self._read(name, DERIVED_MEANS.get(self.side, name), at)
        value = self._read(name, name, at)
        if name.startswith("outlying"):
            return value.bool()
        if self.side in DERIVED and value.dim() == 3 and name not in {"norms", "colour"}:
            return DERIVED[self.side](value, self._read("outlying", "outlying", at).bool())
        return value

    def _read(self, part: str, name: str, at: int) -> Tensor:
        value = self.places.read(part, name, at)
        if value is None:
            raise BadInputError("features are missing", f"{name} of an image", "remove the folder of the features")
        return value if value.dtype == torch.uint8 else value.float()

    def stacked(self, name: Part) -> Tensor:
        """Return a part of all images, `[images, …]`."""
        return torch.stack([self.part(name, index) for index in range(len(self))])
