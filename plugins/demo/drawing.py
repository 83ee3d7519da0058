"""Sample images, drawn from a seed: a graded sky, shapes in front of it, and patches of texture."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

SIDE = 320  # pixels; a little more than the model's input


def draw_images(count: int, seed: int) -> list[Image.Image]:
    """Draw `count` RGB images of 320 × 320 pixels; image i depends only on the seed and on i."""
    return [_draw(np.random.default_rng([seed, index])) for index in range(count)]


def _draw(rng: np.random.Generator) -> Image.Image:
    image = Image.fromarray(_gradient(rng))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 9))):
        _shape(pen, rng)
    pixels = np.asarray(image, dtype=np.float64)
    for _ in range(int(rng.integers(2, 5))):
        pixels = _textured(pixels, rng)
    pixels = pixels + rng.normal(0.0, 4.0, pixels.shape)  # sensor noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _gradient(rng: np.random.Generator) -> np.ndarray:
    """Draw a linear gradient between two colours at a random angle, `[SIDE, SIDE, 3]` uint8."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE - 0.5
    share = (np.cos(angle) * x + np.sin(angle) * y + 0.75) / 1.5
    first, second = rng.uniform(0, 255, (2, 3))
    return (first + share[..., None] * (second - first)).astype(np.uint8)


def _shape(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Draw one filled ellipse, rectangle or polygon."""
    colour = tuple(int(c) for c in rng.integers(0, 256, 3))
    x, y = rng.uniform(0, SIDE, 2)
    w, h = rng.uniform(SIDE / 10, SIDE / 2, 2)
    kind = rng.integers(3)
    if kind == 0:
        pen.ellipse((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=colour)
    elif kind == 1:
        pen.rectangle((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=colour)
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
        pen.polygon([(x + w / 2 * np.cos(a), y + h / 2 * np.sin(a)) for a in angles], fill=colour)


def _textured(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return `pixels` with a sinusoidal grating of random pitch inside a random disc."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    cx, cy = rng.uniform(0, SIDE, 2)
    inside = np.hypot(x - cx, y - cy) < rng.uniform(SIDE / 10, SIDE / 4)
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(4, 30)
    wave = np.sin(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / pitch)
    return pixels + (inside * wave)[..., None] * rng.uniform(20, 80, 3)
