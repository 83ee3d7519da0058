"""Label images, and sets of images with labels, made on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sinder_cli.tasks import LabelImage, LabelRule


def write_label(path: Path, rows: Sequence[Sequence[int]] | np.ndarray, palette: bool = False) -> Path:
    """Write indices of classes, with a palette or as greys (16 bit beyond 255)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = np.asarray(rows)
    image = Image.fromarray(found.astype(np.uint16 if found.max() > 255 else np.uint8))
    if palette:
        image = image.convert("P")
        image.putdata(found.flatten().tolist())
        image.putpalette([255 - at // 3 for at in range(768)])
    image.save(path)
    return path


def write_image(path: Path, size: tuple[int, int] = (3, 2), colour: tuple[int, int, int] = (9, 9, 9)) -> Path:
    """Write an image of one colour; `size` is width × height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def labels(folder: Path, maps: Sequence[Sequence[Sequence[int]]], classes: int) -> list[LabelImage]:
    """Write label images, 255 ignored."""
    rule = LabelRule(255, False, classes)
    return [LabelImage(write_label(folder / f"{at}.png", rows), rule) for at, rows in enumerate(maps)]


def halves(folder: Path, count: int, side: int = 80, split: str = "") -> Path:
    """Two folders of images whose left part is black and class 0, and whose right part is white and class 1.

    Image i is split a little further to the right than the one before.
    """
    for index in range(count):
        edge = side // 4 + index * side // (2 * count)
        pixels, found = np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8)
        pixels[:, edge:], found[:, edge:] = 255, 1
        path = folder / "images" / split / f"{split or 'all'}{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        write_label(folder / "labels" / split / path.name, found)
    return folder
