"""Image files → normalized tensors."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from sinder_cli.ahead import loaded_ahead
from sinder_cli.errors import BadInputError, NoInputError
from sinder_cli.events import Emit, Warned

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".ppm", ".pgm"})
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "PPM")  # what Pillow may try; MPO opens as JPEG
MAX_PIXELS = 178_956_970  # Pillow's own limit, by header, which a program may have lifted; no resizing beyond it
READ_AHEAD = 4  # images decoded ahead of the computation


class UnreadableImageError(Exception):
    """One image cannot be decoded; the message says why. Callers skip it, name it and count it."""


class ImageSource(Protocol):
    """Images by index, each with a name."""

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
            size = path.stat().st_size if path.exists() else -1
            digest.update(f"{path}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class DrawnImages:
    """Images that a plugin draws itself, from a count and a seed."""

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


def find_images(places: Sequence[str], stdin: IO[str] | None = None) -> ImageFiles:
    """Image files in folders (searched in sorted order), named one by one, or listed on standard input for `-`.

    A file that is named counts whatever its suffix; in folders, files with an image's suffix count, `._*` do not.
    Raises `NoInputError` for a place that does not exist and where nothing was found.
    """
    found: list[Path] = []
    for place in places:
        if place == "-":
            found += [Path(line) for line in (stdin or sys.stdin).read().splitlines() if line.strip()]
            continue
        path = Path(place)
        if path.is_dir():
            found += sorted(_inside(path))
        elif path.exists():
            found.append(path)
        else:
            raise NoInputError(f"cannot read images from {place}", "there is no such file or folder", "check --data")
    if not found:
        raise NoInputError(
            f"no images in {', '.join(places)}", f"looked for {', '.join(sorted(SUFFIXES))}", "check --data"
        )
    return ImageFiles(tuple(dict.fromkeys(found)))


def _inside(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):  # symbolic links to folders are not followed: no loops
        for name in names:
            path = Path(root, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("._") and path.is_file():
                yield path


def decode(path: Path) -> Image:
    """One file as an RGB image, EXIF rotation applied; the first frame of an animation.

    16-bit and float greyscale is scaled to 8 bits, a palette is looked up, transparency is laid over white.
    """
    from PIL import Image as pillow
    from PIL import ImageOps

    try:
        pillow.init()
        formats = [name for name in FORMATS if name in pillow.OPEN]  # one that it was built without is a KeyError
        with pillow.open(path, formats=formats) as file:
            if file.width * file.height > MAX_PIXELS:
                raise UnreadableImageError(f"{file.width}×{file.height} pixels are too many")
            file.load()
            return _to_rgb(ImageOps.exif_transpose(file))
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, … on bad files
        raise UnreadableImageError(str(error) or type(error).__name__) from error


def _to_rgb(image: Image) -> Image:
    import numpy as np
    from PIL import Image as pillow

    if image.mode.startswith(("I", "F")):  # 16- and 32-bit greyscale, which convert("RGB") would clip
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max(initial=0.0)), 1.0)
        return pillow.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = pillow.new("RGBA", rgba.size, "white")
        return pillow.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def centre_crop(image: Image, size: int) -> Image:
    """The shorter side resized to `size` (bicubic, antialiased), then the centre `size` × `size`.

    Raises `UnreadableImageError` for an image so narrow that resizing it would fill the memory.
    """
    from PIL import Image as pillow

    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(f"{image.width}×{image.height} pixels are too narrow to be cropped at {size}")
    resized = image.resize((width, height), pillow.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB image becomes the input of a backbone: a centre crop of `size` pixels, normalized."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: Image) -> Tensor:
        """`[3, size, size]` float32."""
        import numpy as np
        import torch

        pixels = np.asarray(centre_crop(image, self.size), dtype=np.float32) / 255.0
        mean, std = np.asarray(self.mean, dtype=np.float32), np.asarray(self.std, dtype=np.float32)
        normalized = (pixels - mean) / std
        return torch.from_numpy(np.ascontiguousarray(normalized.transpose(2, 0, 1)))


@dataclass(frozen=True)
class LoadedImage:
    """One image ready for the backbone, or the reason why it could not be read."""

    index: int
    name: str
    pixels: Tensor | None
    problem: str = ""


def load_in_order(source: ImageSource, preprocess: Preprocessing, indices: Iterable[int]) -> Iterator[LoadedImage]:
    """Decode ahead of the consumer, in a thread, and give the images back in the order of `indices`."""

    def load(index: int) -> LoadedImage:
        try:
            return LoadedImage(index, source.name(index), preprocess(source.load(index)))
        except UnreadableImageError as error:
            return LoadedImage(index, source.name(index), None, str(error))

    yield from loaded_ahead(load, indices, READ_AHEAD)


def readable(loaded: Iterable[LoadedImage], unreadable: dict[str, str], emit: Emit) -> Iterator[tuple[str, Tensor]]:
    """Name and pixels of the images that could be decoded; each other one is told once and added to `unreadable`."""
    for image in loaded:
        if image.pixels is not None:
            yield image.name, image.pixels
        elif image.name not in unreadable:
            emit(Warned(f"skipped {image.name}: {image.problem}"))
            unreadable[image.name] = image.problem


def shuffled(count: int, seed: int) -> Iterator[int]:
    """Endless passes over `count` images, each in an order of its own that depends on the seed and the pass alone."""
    import itertools

    import numpy as np

    for epoch in itertools.count():
        yield from np.random.default_rng([seed, epoch]).permutation(count).tolist()


def require_some(read: int, skipped: int) -> None:
    """Refuse to go on when not one image could be decoded. Raises `BadInputError`."""
    if read == 0 and skipped > 0:
        raise BadInputError("no image could be decoded", f"all {skipped} failed", "check --data")
