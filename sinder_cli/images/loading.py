"""Images in a given order, decoded ahead of the computation, and what becomes of those that cannot be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sinder_cli.ahead import loaded_ahead
from sinder_cli.errors import BadInputError
from sinder_cli.events import Emit, Warned
from sinder_cli.images.decoding import UnreadableImageError
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.processes import in_processes
from sinder_cli.images.sources import ImageSource

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.images.preprocessing import Pixels

READ_AHEAD = 4  # images decoded ahead of the computation, by each process where there are several


@dataclass(frozen=True)
class LoadedImage:
    """One image ready for the backbone, or the reason why it could not be read."""

    index: int
    name: str
    pixels: Tensor | None
    problem: str = ""


@dataclass(frozen=True)
class FittedImage:
    """What one process hands to another: a quarter of the bytes of a normalized image."""

    index: int
    pixels: Pixels | None
    problem: str = ""


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
        return FittedImage(index, preprocess.fit(source.load(index)))
    except UnreadableImageError as error:
        return FittedImage(index, None, str(error))


def _loaded(source: ImageSource, preprocess: Preprocessing, fitted: FittedImage) -> LoadedImage:
    pixels = None if fitted.pixels is None else preprocess.normalize(fitted.pixels)
    return LoadedImage(fitted.index, source.name(fitted.index), pixels, fitted.problem)


def readable(loaded: Iterable[LoadedImage], unreadable: dict[str, str], emit: Emit) -> Iterator[tuple[str, Tensor]]:
    """Name and pixels of the images that could be decoded; each other one is told once and added to `unreadable`."""
    for image in loaded:
        if image.pixels is not None:
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
