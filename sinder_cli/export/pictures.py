"""Pictures for a check where there is none: drawn with the statistics of photographs, the same bits for a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 640  # pixels
CONTRAST = 56  # standard deviation of a channel, of 255
MIXING = ((1.0, 0.35, 0.15), (1.0, 0.0, -0.3), (1.0, -0.35, 0.15))  # channels are alike, as in photographs


def drawn_pictures(count: int, seed: int = 0) -> list[Image]:
    """Fields of colour `SIDE` × `SIDE` whose amplitude falls as 1/f, cut by a few edges."""
    import numpy as np
    from PIL import Image as pillow

    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    frequency[0, 0] = np.inf  # no mean
    pictures = []
    for number in range(count):
        drawn = np.random.default_rng([seed, number])
        noise = np.fft.rfft2(drawn.standard_normal((3, SIDE, SIDE)))
        fields = np.fft.irfft2(noise / frequency, s=(SIDE, SIDE))  # [3, SIDE, SIDE]
        rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
        for _ in range(3):  # objects: one side of a line is brighter
            angle, offset = drawn.uniform(0, np.pi), drawn.uniform(0.3, 0.7)
            side = (rows - offset) * np.cos(angle) + (columns - offset) * np.sin(angle) > 0
            fields += drawn.uniform(-1, 1, (3, 1, 1)) * fields.std() * side
        mixed = np.tensordot(np.array(MIXING), fields, 1)
        mixed = (mixed - mixed.mean((1, 2), keepdims=True)) / mixed.std()
        pixels = (128 + CONTRAST * mixed).clip(0, 255).astype(np.uint8)
        pictures.append(pillow.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))))
    return pictures
