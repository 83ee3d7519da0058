"""Images by index: files on disk, or pictures that a plugin has drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from sinder_cli.images.decoding import UnreadableImageError, decode

if TYPE_CHECKING:
    from PIL.Image import Image

CHANGED = "the file has changed since the run began"  # so begins what is told of one that has, or has vanished
FileState = tuple[int, int]  # bytes, and nanoseconds of the last change


class ImageSource(Protocol):
    """Images by index, each with a name."""

    @property
    def in_memory(self) -> bool:
        """Whether the images are decoded already, so that other processes could only copy them."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """How the image is called in messages."""
        ...

    def load(self, index: int) -> Image:
        """Decode to RGB. Raises `UnreadableImageError`."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 that changes when the list of images does."""
        ...


@dataclass(frozen=True)
class ImageFiles:
    """Image files on disk, as they are when the list is made: one that changes later is refused."""

    in_memory: ClassVar[bool] = False

    paths: tuple[Path, ...]
    states: tuple[FileState, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "states", tuple(map(_state, self.paths)))

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def load(self, index: int) -> Image:
        try:
            image = decode(self.paths[index])
        except UnreadableImageError as error:
            if self._has_changed(index):
                raise UnreadableImageError(f"{CHANGED}: {error}") from error
            raise
        if self._has_changed(index):
            raise UnreadableImageError(CHANGED)
        return image

    def _has_changed(self, index: int) -> bool:
        return _state(self.paths[index]) != self.states[index]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path, (size, _) in zip(self.paths, self.states, strict=True):
            digest.update(f"{path.absolute()}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class DrawnImages:
    """Images that a plugin draws itself, from a count and a seed."""

    in_memory: ClassVar[bool] = True

    images: tuple[Image, ...]
    label: str

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.label} #{index}"

    def load(self, index: int) -> Image:
        return self.images[index]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(f"{image.size}".encode() + image.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class SomeImages:
    """Some images of a source, by their index there."""

    source: ImageSource
    indices: Sequence[int]

    @property
    def in_memory(self) -> bool:
        return self.source.in_memory

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def load(self, index: int) -> Image:
        return self.source.load(self.indices[index])

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.source.fingerprint()} {list(self.indices)}".encode()).hexdigest()


@dataclass(frozen=True)
class JoinedImages:
    """The images of several sources, one after another."""

    parts: tuple[ImageSource, ...]

    @property
    def in_memory(self) -> bool:
        return all(part.in_memory for part in self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def name(self, index: int) -> str:
        part, at = self._place(index)
        return part.name(at)

    def load(self, index: int) -> Image:
        part, at = self._place(index)
        return part.load(at)

    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(part.fingerprint() for part in self.parts).encode()).hexdigest()

    def _place(self, index: int) -> tuple[ImageSource, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)


def _state(path: Path) -> FileState:
    """Size and time; −1 for a file that cannot be looked at, which is told when it is decoded."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return -1, -1
    return found.st_size, found.st_mtime_ns


def whole_of(source: ImageSource) -> ImageSource:
    """The source that some images were chosen from, or the source itself."""
    return source.source if isinstance(source, SomeImages) else source


def files_of(source: ImageSource) -> ImageFiles | None:
    """The image files of a source, if it has any: those of its first part, where others are drawn."""
    if isinstance(source, JoinedImages):
        return files_of(source.parts[0])
    return source if isinstance(source, ImageFiles) else None
