"""Pictures drawn from a seed, for a repair with few images or none, and for the check of an export.

They share two statistics with photographs: the spectrum, by 1/f noise, and the edges, by dead leaves.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Floats = np.ndarray[Any, np.dtype[np.float64]]
    Numbers = np.ndarray[Any, np.dtype[np.int64]]

DRAWING_VERSION = 1  # raise it with any change of the pixels: it is part of the seed and of the fingerprint

FALLOFF = (1.0, 1.5)  # α of a spectrum of amplitude f^−α; photographs have about 1 (Field 1987), blurred ones more
CONTRAST = (35.0, 65.0)  # standard deviation of the field that all channels share, of 255
MEAN = (100.0, 155.0)  # of a picture, of 255
CAST = 20.0  # largest difference between the mean of a channel and that of the picture, of 255
BRIGHTNESS, CHROMA = (0.8, 1.0), 0.35  # in a channel: weight of the shared field, and limit for each other field

SMALLEST_RADIUS = 1 / 100  # of the side of a picture; at least 1 pixel
LARGEST_RADIUS = 1 / 3  # of the side; at least 2 pixels
LEAVES_AT_ONCE = 4096


@dataclass(frozen=True)
class DrawnPictures:
    """`count` RGB pictures of `size` × `size` pixels (2 or more), alternately 1/f noise and dead leaves.

    Each is drawn when it is loaded. Picture i depends on `seed` (0 or more), i and `size` alone.
    """

    in_memory: ClassVar[bool] = True  # no file to decode, so no process to decode it in

    count: int
    size: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"drawn image {index}"

    def load(self, index: int, side: int | None = None) -> Image:  # noqa: ARG002
        if not 0 <= index < self.count:
            raise IndexError(index)
        return _picture(index, self.size, self.seed)

    def fingerprint(self) -> str:
        determined_by = f"drawn pictures {DRAWING_VERSION} {self.count} {self.size} {self.seed}"
        return hashlib.sha256(determined_by.encode()).hexdigest()


def _picture(index: int, size: int, seed: int) -> Image:
    import numpy as np
    from PIL import Image as pillow

    random = np.random.default_rng([seed, index, size, DRAWING_VERSION])
    mean, mixing = _colouring(random)
    plain = _noise(random, size) if index % 2 == 0 else _dead_leaves(random, size)  # [size, size, 3]
    pixels = np.rint(mean + (plain[..., None, :] * mixing).sum(-1))  # no BLAS: its sums depend on the machine
    return pillow.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _colouring(random: np.random.Generator) -> tuple[Floats, Floats]:
    """Draw the mean colour, [3], and the mixing of three independent fields of unit variance, [3, 3].

    The first field is brightness. The other two weigh so little that any two channels correlate, as in photographs.
    """
    import numpy as np

    mean = random.uniform(*MEAN) + random.uniform(-CAST, CAST, 3)
    brightness = random.uniform(*BRIGHTNESS, (3, 1))
    mixing = np.concatenate([brightness, random.uniform(-CHROMA, CHROMA, (3, 2))], axis=1)
    return mean, random.uniform(*CONTRAST) * mixing


def _noise(random: np.random.Generator, size: int) -> Floats:
    """Draw three fields of 1/f noise, [size, size, 3], each of mean 0 and variance 1.

    The amplitude at frequency f is that of white noise times f^−α. Source: Field 1987, "Relations between the
    statistics of natural images and the response properties of cortical cells".
    """
    import numpy as np

    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])  # cycles per pixel
    f[0, 0] = np.inf  # mean 0
    white = np.fft.rfft2(random.standard_normal((3, size, size)))
    fields = np.fft.irfft2(white * f ** -random.uniform(*FALLOFF), s=(size, size))
    return np.moveaxis(fields / fields.std((1, 2), keepdims=True), 0, -1)


def _dead_leaves(random: np.random.Generator, size: int) -> Floats:
    """Draw discs of uniform colour that hide one another, [size, size, 3]; colours have mean 0 and variance 1.

    The density of the radius is proportional to r^−3 between the smallest and the largest, so that the picture looks
    alike at each scale. Source: Lee, Mumford and Huang 2001, "Occlusion models for natural images: a statistical study
    of the scale-invariant dead leaves model". Discs are drawn from the front to the back until no pixel is empty: discs
    behind them would not be visible.
    """
    import numpy as np

    a, b = max(1.0, SMALLEST_RADIUS * size), max(2.0, LARGEST_RADIUS * size)
    colours: list[Floats] = []
    front = np.full((size, size), -1)  # the number of the visible disc at each pixel; −1: none yet
    while (front < 0).any():
        r = (a**-2 + random.random(LEAVES_AT_ONCE) * (b**-2 - a**-2)) ** -0.5  # the inverse of its distribution
        y, x = random.uniform(-b, size + b, (2, LEAVES_AT_ONCE))  # discs with a centre outside may reach in
        _paint_behind(front, y, x, r, len(colours) * LEAVES_AT_ONCE)
        colours.append(random.uniform(-(3**0.5), 3**0.5, (LEAVES_AT_ONCE, 3)))
    return np.concatenate(colours)[front]


def _paint_behind(front: Numbers, y: Floats, x: Floats, r: Floats, first: int) -> None:
    """Paint discs with centres (y, x) and radii r, the foremost first, on the pixels of `front` that are empty (−1).

    A disc covers the pixels whose centre, at whole numbers, is at most r away. Discs are numbered from `first` on, and
    pixels get the number of their disc.
    """
    import numpy as np

    size = len(front)
    top, left = (np.maximum(np.ceil(centre - r), 0).astype(int) for centre in (y, x))
    bottom, right = (np.minimum(np.floor(centre + r) + 1, size).astype(int) for centre in (y, x))
    before = np.zeros((size + 1, size + 1), int)  # the empty pixels above and left of each corner: a summed-area table
    before[1:, 1:] = (front < 0).cumsum(0).cumsum(1)
    some = np.flatnonzero((top < bottom) & (left < right))  # discs whose box holds a pixel, and below an empty pixel
    t, b, w, e = top[some], bottom[some], left[some], right[some]
    some = some[before[b, e] - before[t, e] - before[b, w] + before[t, w] > 0]
    at = np.arange(size)
    for disc in some.tolist():
        rows, columns = slice(top[disc], bottom[disc]), slice(left[disc], right[disc])
        box = front[rows, columns]
        inside = (at[rows, None] - y[disc]) ** 2 + (at[columns] - x[disc]) ** 2 <= r[disc] ** 2
        box[inside & (box < 0)] = first + disc
