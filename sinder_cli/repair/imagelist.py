"""The images of a run as its directory lists them: which they are, and whether they are still what they were."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

from sinder_cli.errors import BadInputError
from sinder_cli.escaping import printable
from sinder_cli.events import Emit, tracked
from sinder_cli.files import write_text
from sinder_cli.images.sources import FileState, ImageFiles

READERS = 8  # threads: it is the disk that they wait for
DIGEST_BYTES = 16


@dataclass(frozen=True)
class ListedImage:
    """One image when the run began: where it was, its size, the time of its last change, and a hash of its bytes."""

    path: str  # absolute
    bytes: int  # −1 where it could not be looked at
    changed_ns: int
    digest: str  # empty where it could not be read

    def is_at(self, path: Path, state: FileState) -> bool:
        """Whether it has the same place, size and time, which is enough."""
        return (self.path, self.bytes, self.changed_ns) == (str(path.absolute()), *state)


def listed_images(files: ImageFiles, emit: Emit) -> list[ListedImage]:
    """The list of a run that begins. Every file is read once."""
    digests = tracked(_digests(files.paths), emit, "listing images", len(files), "images")
    return [
        ListedImage(str(path.absolute()), *state, digest)
        for path, state, digest in zip(files.paths, files.states, digests, strict=True)
    ]


def write_list(path: Path, images: Sequence[ListedImage]) -> None:
    """One image a line."""
    write_text(path, "".join(json.dumps(astuple(image)) + "\n" for image in images))


def read_list(path: Path) -> list[ListedImage]:
    """Raises `BadInputError` for a list that is torn."""
    try:
        return [ListedImage(*json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise BadInputError(f"cannot read {path}", str(error), "start anew with --force") from error


def first_difference(images: Sequence[ListedImage], files: ImageFiles, emit: Emit) -> str | None:
    """What first tells some files from those of a list, in words; None where all their bytes are the same.

    Only files at another place or of another time than listed are read.
    """
    pairs = list(zip(images, files.paths, files.states, strict=False))
    doubted = [(image, path, state) for image, path, state in pairs if not image.is_at(path, state)]
    digests = _digests([path for _, path, _ in doubted])
    compared = tracked(zip(doubted, digests, strict=True), emit, "comparing images", len(doubted), "images")
    for (image, path, state), digest in compared:
        if state[0] != image.bytes or digest != image.digest:
            return _difference(image, path, state[0])
    counts = f"there were {len(images)} images and are {len(files)}"
    if len(files) > len(images):
        return f"{counts}, {printable(str(files.paths[len(images)]))} is new"
    if len(files) < len(images):
        return f"{counts}, {printable(images[len(files)].path)} is gone"
    return None


def _difference(image: ListedImage, path: Path, size: int) -> str:
    place = str(path.absolute())
    now = printable(place)
    if place != image.path:
        return f"image {printable(image.path)} is now {now}, which is another"
    if size != image.bytes:
        return f"image {now} had {image.bytes} bytes and has {size}"
    return f"image {now} has other contents of the same size"


def _digests(paths: Sequence[Path]) -> Iterator[str]:
    with ThreadPoolExecutor(READERS) as readers:
        yield from readers.map(_digest, paths)


def _digest(path: Path) -> str:
    """A hash of a regular file's bytes; empty where it cannot be read, which is told when it is decoded."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return ""
    return digest.hexdigest()
