"""An RGB image → uint8 pixels of the size asked for → the normalized tensor that a backbone reads."""

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
MIN_PATCHES = 5  # a side: no defect is looked for at the border, and a target needs a neighbourhood


def centre_crop(image: Image, size: int) -> Image:
    """The shorter side resized to `size` (bicubic, antialiased), then the centre `size` × `size`.

    Raises `UnreadableImageError` for an image so narrow that resizing it would fill the memory.
    """
    return _centre(_resized(image, size), size, size)


def whole_patches(image: Image, patch: int) -> Image:
    """The centre of the image, less than one patch narrower and lower, in multiples of `patch`."""
    return _centre(image, image.width - image.width % patch, image.height - image.height % patch)


def _short_side(width: int, height: int, size: int) -> tuple[int, int]:
    """The width and the height where the shorter side is `size` and the shape is kept."""
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
    """How an RGB image becomes the input of a backbone; no way of resizing distorts it.

    `square`: the centre `size` × `size` of the image with its shorter side resized to `size`.
    `short`: the same without the crop to a square; the longer side keeps its proportion, in multiples of `patch`.
    `none`: as it is, in multiples of `patch`.

    `short` and `none` scale an image of more than `max_tokens` patches down to that many, its shape kept.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Resize = "square"
    patch: int = 1
    max_tokens: int | None = None

    def __call__(self, image: Image) -> Tensor:
        """`[3, H, W]` float32. Raises `UnreadableImageError` as `fit` does."""
        return self.normalize(self.fit(image))

    def fit(self, image: Image) -> Pixels:
        """Resize and crop an RGB image to `[H, W, 3]` uint8.

        Raises `UnreadableImageError` for one too narrow to be resized, or, not resized, under 5 × 5 patches.
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
        """The width and height in pixels that make at most `max_tokens` patches; None for an image that does already.

        With w·h pixels to start from (for `short`, those it would be resized to), both sides shrink by
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
        """`[H, W, 3]` uint8 → `[3, H, W]` float32, contiguous: (pixels / 255 − mean) / std."""
        import numpy as np
        import torch

        scaled = pixels.astype(np.float32) / 255.0
        mean, std = np.asarray(self.mean, dtype=np.float32), np.asarray(self.std, dtype=np.float32)
        normalized = (scaled - mean) / std
        return torch.from_numpy(np.ascontiguousarray(normalized.transpose(2, 0, 1)))
