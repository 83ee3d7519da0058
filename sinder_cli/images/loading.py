"""Loading images in a given order, decoded ahead of the computation, and reporting those that cannot be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count as counting
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal

from sinder_cli.errors import BadInputError
from sinder_cli.events import Emit, Noted, Warned
from sinder_cli.images.decoding import LATER_PAGES, UnreadableImageError
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.processes import in_processes
from sinder_cli.images.sources import ImageSource
from sinder_cli.prefetch import loaded_ahead

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from sinder_cli.images.preprocessing import Pixels


ImageChange = Literal["first page", "scaled down"]  # done to some images beyond the usual preprocessing
READ_AHEAD = 4  # images decoded ahead of the computation, by each process if there are several


@dataclass(frozen=True)
class LoadedImage:
    """One image ready for the backbone, or the reason why it could not be read."""

    index: int
    name: str
    pixels: Tensor | None
    problem: str = ""
    changes: tuple[ImageChange, ...] = ()


@dataclass(frozen=True)
class FittedImage:
    """One image as sent between processes, in uint8: a quarter of the bytes of the normalized image."""

    index: int
    pixels: Pixels | None
    problem: str = ""
    changes: tuple[ImageChange, ...] = ()


def load_in_order(
    source: ImageSource, preprocess: Preprocessing, indices: Iterable[int], workers: int = 0
) -> Iterator[LoadedImage]:
    """Yield the images in the order of `indices`, which may be endless, decoded ahead of the consumer.

    Decoding happens in `workers` processes; if `workers` is 0 or the images are in memory, in a thread. The pixels are
    the same in both cases. Raises `TryAgainError` when a process dies.
    """
    fit = partial(_fit, source, preprocess)
    if workers > 0 and not source.in_memory:
        for fitted in in_processes(fit, indices, workers, READ_AHEAD):
            yield _loaded(source, preprocess, fitted)
    else:
        yield from loaded_ahead(lambda index: _loaded(source, preprocess, fit(index)), indices, READ_AHEAD)


def _fit(source: ImageSource, preprocess: Preprocessing, index: int) -> FittedImage:
    try:
        image = source.load(index, preprocess.decoded_for)
        return FittedImage(index, preprocess.fit(image), changes=tuple(_changes(image, preprocess)))
    except UnreadableImageError as error:
        return FittedImage(index, None, str(error))


def _changes(image: Image, preprocess: Preprocessing) -> Iterator[ImageChange]:
    if LATER_PAGES in image.info:
        yield "first page"
    if preprocess.bounded_size(*image.size) is not None:
        yield "scaled down"


def _loaded(source: ImageSource, preprocess: Preprocessing, fitted: FittedImage) -> LoadedImage:
    pixels = None if fitted.pixels is None else preprocess.normalize(fitted.pixels)
    return LoadedImage(fitted.index, source.name(fitted.index), pixels, fitted.problem, fitted.changes)


@dataclass
class Changes:
    """The names of the changed images, by kind of change; an image loaded several times is listed once."""

    names: dict[ImageChange, dict[str, None]] = field(default_factory=dict)

    def add(self, image: LoadedImage) -> None:
        for change in image.changes:
            self.names.setdefault(change, {})[image.name] = None

    def merge(self, other: Changes) -> None:
        """Add the changes of another process."""
        for change, names in other.names.items():
            self.names.setdefault(change, {}).update(names)

    def tell(self, emit: Emit, max_tokens: int | None = None) -> None:
        """Emit one note per kind of change, with the number of its images."""
        if names := self.names.get("first page"):
            emit(Noted(f"only the first page or frame is used of {_counted(names)}"))
        if names := self.names.get("scaled down"):
            emit(Noted(f"{_counted(names)} scaled down to at most {max_tokens:,} patch tokens (--max-tokens)"))


def _counted(names: Mapping[str, None]) -> str:
    """Return the number of images with the first name: `1 image (a.tif)`, `3 images (a.tif, …)`."""
    first = PurePath(next(iter(names))).name
    return f"1 image ({first})" if len(names) == 1 else f"{len(names):,} images ({first}, …)"


def readable(
    loaded: Iterable[LoadedImage], unreadable: dict[str, str], emit: Emit, changes: Changes | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and pixels of each image that could be decoded, and add its changes to `changes`.

    Every other image is named in a warning once and added to `unreadable`.
    """
    for image in loaded:
        if image.pixels is not None:
            if changes is not None:
                changes.add(image)
            yield image.name, image.pixels
        else:
            skip(image.name, image.problem, unreadable, emit)


def skip(name: str, problem: str, unreadable: dict[str, str], emit: Emit) -> None:
    """Name an undecodable image in a warning and add it to `unreadable`, unless it is in there already."""
    if name not in unreadable:
        emit(Warned(f"skipped {name}: {problem}"))
        unreadable[name] = problem


def skip_all(others: Iterable[Mapping[str, str]], unreadable: dict[str, str], emit: Emit) -> None:
    """Apply `skip` to all images that other processes could not decode."""
    for other in others:
        for name, problem in other.items():
            skip(name, problem, unreadable, emit)


def require_some(read: int, skipped: int) -> None:
    """Raise `BadInputError` if images were skipped and none could be decoded."""
    if read == 0 and skipped > 0:
        raise BadInputError("no image could be decoded", f"all {skipped} failed", "check --data")


def sampled(count: int, limit: int | None, seed: int) -> list[int]:
    """Draw `limit` of `count` images, each at most once, by the seed alone, in source order; all if there are fewer."""
    if limit is None or limit >= count:
        return list(range(count))
    import numpy as np

    drawn: list[int] = np.random.default_rng(seed).choice(count, limit, replace=False).tolist()
    return sorted(drawn)


def spread(indices: Sequence[int], most: int) -> list[int]:
    """Return at most `most` of the indices, evenly spread."""
    count = min(most, len(indices))
    return [indices[at * len(indices) // count] for at in range(count)]


def shuffled(count: int, seed: int, start: int = 0) -> Iterator[int]:
    """Yield endless passes over `count` images, each in an order of its own that depends only on the seed and the pass.

    The first `start` images are left out, without generating them.
    """
    import numpy as np

    first, offset = divmod(start, count)
    for number in counting(first):
        order: list[int] = np.random.default_rng([seed, number]).permutation(count).tolist()
        yield from order[offset:]
        offset = 0


def cycled(count: int, start: int = 0) -> Iterator[int]:
    """Yield endless passes over `count` images in their order, without the first `start` images."""
    for at in counting(start):
        yield at % count
