"""Images in a given order, decoded ahead of the computation, and what becomes of those that cannot be read."""

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


Change = Literal["first page", "scaled down"]  # what was done to an image beyond what is done to all
READ_AHEAD = 4  # images decoded ahead of the computation, by each process where there are several


@dataclass(frozen=True)
class LoadedImage:
    """One image ready for the backbone, or the reason why it could not be read."""

    index: int
    name: str
    pixels: Tensor | None
    problem: str = ""
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class FittedImage:
    """What one process hands to another: a quarter of the bytes of a normalized image."""

    index: int
    pixels: Pixels | None
    problem: str = ""
    changes: tuple[Change, ...] = ()


def load_in_order(
    source: ImageSource, preprocess: Preprocessing, indices: Iterable[int], workers: int = 0
) -> Iterator[LoadedImage]:
    """Decode ahead of the consumer and give the images back in the order of `indices`, which may be endless.

    Decoding happens in `workers` processes; without any, or with images that are in memory, in a thread. The pixels
    are the same either way. Raises `TryAgainError` when a process dies.
    """
    fit = partial(_fit, source, preprocess)
    if workers > 0 and not source.in_memory:
        for fitted in in_processes(fit, indices, workers, READ_AHEAD):
            yield _loaded(source, preprocess, fitted)
    else:
        yield from loaded_ahead(lambda index: _loaded(source, preprocess, fit(index)), indices, READ_AHEAD)


def _fit(source: ImageSource, preprocess: Preprocessing, index: int) -> FittedImage:
    try:
        image = source.load(index)
        return FittedImage(index, preprocess.fit(image), changes=tuple(_changes(image, preprocess)))
    except UnreadableImageError as error:
        return FittedImage(index, None, str(error))


def _changes(image: Image, preprocess: Preprocessing) -> Iterator[Change]:
    if LATER_PAGES in image.info:
        yield "first page"
    if preprocess.bounded_size(*image.size) is not None:
        yield "scaled down"


def _loaded(source: ImageSource, preprocess: Preprocessing, fitted: FittedImage) -> LoadedImage:
    pixels = None if fitted.pixels is None else preprocess.normalize(fitted.pixels)
    return LoadedImage(fitted.index, source.name(fitted.index), pixels, fitted.problem, fitted.changes)


@dataclass
class Changes:
    """The names of the images that were changed, by what was done, each once however often it is loaded."""

    names: dict[Change, dict[str, None]] = field(default_factory=dict)

    def add(self, image: LoadedImage) -> None:
        for change in image.changes:
            self.names.setdefault(change, {})[image.name] = None

    def merge(self, other: Changes) -> None:
        """Take in what another process has loaded."""
        for change, names in other.names.items():
            self.names.setdefault(change, {}).update(names)

    def tell(self, emit: Emit, max_tokens: int | None = None) -> None:
        """Note in one line for each kind of change how many images it was made to."""
        if names := self.names.get("first page"):
            emit(Noted(f"of {_counted(names)} with several pages or frames, only the first is used"))
        if names := self.names.get("scaled down"):
            emit(Noted(f"{_counted(names)} scaled down to at most {max_tokens:,} patch tokens (--max-tokens)"))


def _counted(names: Mapping[str, None]) -> str:
    """1 image (a.tif); 3 images (a.tif, …)."""
    first = PurePath(next(iter(names))).name
    return f"1 image ({first})" if len(names) == 1 else f"{len(names):,} images ({first}, …)"


def readable(
    loaded: Iterable[LoadedImage], unreadable: dict[str, str], emit: Emit, changes: Changes | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Name and pixels of the images that could be decoded, with what was done to them added to `changes`.

    Each other one is told once and added to `unreadable`.
    """
    for image in loaded:
        if image.pixels is not None:
            if changes is not None:
                changes.add(image)
            yield image.name, image.pixels
        else:
            skip(image.name, image.problem, unreadable, emit)


def skip(name: str, problem: str, unreadable: dict[str, str], emit: Emit) -> None:
    """Name an image that could not be decoded, unless it was named before, and add it to `unreadable`."""
    if name not in unreadable:
        emit(Warned(f"skipped {name}: {problem}"))
        unreadable[name] = problem


def skip_all(others: Iterable[Mapping[str, str]], unreadable: dict[str, str], emit: Emit) -> None:
    """The same for all that other processes could not decode."""
    for other in others:
        for name, problem in other.items():
            skip(name, problem, unreadable, emit)


def require_some(read: int, skipped: int) -> None:
    """Refuse to go on when not one image could be decoded. Raises `BadInputError`."""
    if read == 0 and skipped > 0:
        raise BadInputError("no image could be decoded", f"all {skipped} failed", "check --data")


def sampled(count: int, limit: int | None, seed: int) -> list[int]:
    """`limit` of `count` images, each at most once, by the seed alone and in the order of the source; else all."""
    if limit is None or limit >= count:
        return list(range(count))
    import numpy as np

    drawn: list[int] = np.random.default_rng(seed).choice(count, limit, replace=False).tolist()
    return sorted(drawn)


def spread(indices: Sequence[int], most: int) -> list[int]:
    """At most so many of the indices, evenly spread."""
    count = min(most, len(indices))
    return [indices[at * len(indices) // count] for at in range(count)]


def shuffled(count: int, seed: int, start: int = 0) -> Iterator[int]:
    """Endless passes over `count` images, each in an order of its own that depends on the seed and the pass alone.

    `start` images are left out at the beginning, without going through them.
    """
    import numpy as np

    first, offset = divmod(start, count)
    for number in counting(first):
        order: list[int] = np.random.default_rng([seed, number]).permutation(count).tolist()
        yield from order[offset:]
        offset = 0


def cycled(count: int, start: int = 0) -> Iterator[int]:
    """Endless passes over `count` images in their order, without the first `start` images."""
    for at in counting(start):
        yield at % count
