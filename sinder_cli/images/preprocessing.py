"""An RGB image → uint8 pixels of the requested size → the normalized tensor that a backbone reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sinder_cli.images.decoding import MAX_PIXELS, UnreadableImageError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    Pixels = np.ndarray[Any, np.dtype[np.uint8]]

Resize = Literal["short", "square", "none"]
MIN_PATCHES = 5  # per side: defects at the border are ignored, and a target needs a neighbourhood


def centre_crop(image: Image, size: int) -> Image:
    """Resize the shorter side to `size` (bicubic, antialiased), and return the centre `size` × `size`.

    Raises `UnreadableImageError` for an image so narrow that resizing it would fill the memory.
    """
    return _centre(_resized(image, size), size, size)


def whole_patches(image: Image, patch: int) -> Image:
    """Return the largest centre of the image whose width and height are multiples of `patch`."""
    return _centre(image, image.width - image.width % patch, image.height - image.height % patch)


def _short_side(width: int, height: int, size: int) -> tuple[int, int]:
    """Return the width and height at which the shorter side is `size` and the aspect ratio is kept."""
    scale = size / min(width, height)
    return max(size, round(width * scale)), max(size, round(height * scale))


def _resized(image: Image, size: int) -> Image:
    width, height = _short_side(*image.size, size)
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(f"{image.width}×{image.height} pixels are too narrow to be resized to {size}")
    return _scaled(image, (width, height))


def _scaled(image: Image, size: tuple[int, int]) -> Image:
    from PIL import Image as pillow

    return image.resize(size, pillow.Resampling.BICUBIC)


def _centre(image: Image, width: int, height: int) -> Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class Preprocessing:
    """Conversion of an RGB image to the input of a backbone; no way of resizing distorts the image.

    `square`: the shorter side is resized to `size`, and the centre `size` × `size` is cropped.
    `short`: the shorter side is resized to `size`; then both sides are cropped to multiples of `patch`.
    `none`: no resizing; both sides are cropped to multiples of `patch`.

    `short` and `none` scale an image of more than `max_tokens` patches down to at most that many, with the same shape.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Resize = "square"
    patch: int = 1
    max_tokens: int | None = None

    def __call__(self, image: Image) -> Tensor:
        """Return the image as `[3, H, W]` float32. Raises `UnreadableImageError` as `fit` does."""
        return self.normalize(self.fit(image))

    @property
    def decoded_for(self) -> int | None:
        """The shorter side, in pixels, to which every image is scaled; None if images keep their size."""
        return None if self.resize == "none" else self.size

    def fit(self, image: Image) -> Pixels:
        """Resize and crop an RGB image to `[H, W, 3]` uint8.

        Raises `UnreadableImageError` for an image too narrow to be resized, or, if not resized, under 5 × 5 patches.
        """
        import numpy as np

        if self.resize == "square":
            return np.asarray(centre_crop(image, self.size))
        if bounded := self.bounded_size(*image.size):
            return np.asarray(whole_patches(_scaled(image, self._wide_enough(image, bounded)), self.patch))
        if self.resize == "short":
            return np.asarray(whole_patches(_resized(image, self.size), self.patch))
        if min(image.size) < MIN_PATCHES * self.patch:
            raise UnreadableImageError(
                f"{image.width}×{image.height} pixels make under {MIN_PATCHES} × {MIN_PATCHES} patches of {self.patch}"
            )
        return np.asarray(whole_patches(image, self.patch))

    def bounded_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Return the width and height in pixels that give at most `max_tokens` patches; None if no scaling is needed.

        For an image of w·h pixels (for `short`, after its resizing), both sides are multiplied by
        √(max_tokens · patch² / (w·h)).
        """
        if self.max_tokens is None or self.resize == "square":
            return None
        if self.resize == "short":
            width, height = _short_side(width, height, self.size)
        if (width // self.patch) * (height // self.patch) <= self.max_tokens:
            return None
        scale = math.sqrt(self.max_tokens * self.patch**2 / (width * height))
        return int(width * scale), int(height * scale)

    def _wide_enough(self, image: Image, size: tuple[int, int]) -> tuple[int, int]:
        if min(size) < MIN_PATCHES * self.patch:
            raise UnreadableImageError(
                f"{image.width}×{image.height} pixels are too narrow: scaled down to {self.max_tokens} tokens they make"
                f" under {MIN_PATCHES} × {MIN_PATCHES} patches of {self.patch}; raise --max-tokens, or crop"
            )
        return size

    def normalize(self, pixels: Pixels) -> Tensor:
        """Convert `[H, W, 3]` uint8 to `[3, H, W]` float32, contiguous: (pixels / 255 − mean) / std."""
        import numpy as np
        import torch

        scaled = pixels.astype(np.float32) / 255.0
        mean, std = np.asarray(self.mean, dtype=np.float32), np.asarray(self.std, dtype=np.float32)
        normalized = (scaled - mean) / std
        return torch.from_numpy(np.ascontiguousarray(normalized.transpose(2, 0, 1)))
