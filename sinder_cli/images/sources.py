"""Images by index: files on disk, or pictures that a plugin has drawn."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from sinder_cli.images.decoding import decode

if TYPE_CHECKING:
    from PIL.Image import Image


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
    """Image files on disk."""

    in_memory: ClassVar[bool] = False

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def load(self, index: int) -> Image:
        return decode(self.paths[index])

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path}\0{_size(path)}\n".encode(errors="surrogateescape"))
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


def _size(path: Path) -> int:
    """Bytes; −1 for a file that cannot be looked at, which is told when it is decoded."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return -1
