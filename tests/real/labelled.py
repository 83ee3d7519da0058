"""Labelled sets of the photographs that scikit-image and scikit-learn bring, as `sinder evaluate` reads them.

Masks were drawn by hand, as polygons and ellipses in fractions of width and height: thing or background. Depth is that
of the stereo pair of a motorcycle, 1000 / 7 / disparity. Faces are `lfw_subset`: a hundred faces, a hundred others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

Draw = Callable[[ImageDraw.ImageDraw, int, int], None]
Points = tuple[tuple[float, float], ...]

ASTRONAUT: Points = (
    (0.30, 0.10), (0.38, 0.03), (0.50, 0.03), (0.58, 0.12), (0.57, 0.22), (0.52, 0.28), (0.58, 0.36), (0.60, 0.45),
    (0.68, 0.53), (0.71, 0.66), (0.60, 0.75), (0.54, 0.88), (0.54, 1.00), (0.03, 1.00), (0.05, 0.80), (0.04, 0.62),
    (0.12, 0.50), (0.22, 0.42), (0.22, 0.33), (0.33, 0.28), (0.30, 0.20),
)  # fmt: skip
CAT: Points = (
    (0.00, 0.42), (0.08, 0.38), (0.08, 0.00), (0.90, 0.00), (0.80, 0.20), (0.82, 0.45), (0.76, 0.70), (0.65, 1.00),
    (0.00, 1.00),
)  # fmt: skip
MOTORCYCLE: Points = (
    (0.13, 0.42), (0.20, 0.40), (0.25, 0.32), (0.40, 0.36), (0.52, 0.32), (0.66, 0.22), (0.72, 0.17), (0.78, 0.25),
    (0.76, 0.42), (0.86, 0.60), (0.92, 0.80), (0.90, 0.90), (0.80, 0.88), (0.70, 0.75), (0.60, 0.75), (0.45, 0.83),
    (0.30, 0.80), (0.17, 0.72), (0.16, 0.55),
)  # fmt: skip
ROCKET: Points = ((0.48, 0.32), (0.50, 0.29), (0.52, 0.32), (0.525, 0.95), (0.48, 0.95))
SECOND_FLOWER: Points = ((0.45, 1.0), (0.47, 0.90), (0.55, 0.86), (0.63, 0.89), (0.70, 0.95), (0.72, 1.0))


def _polygons(*shapes: Points) -> Draw:
    def draw(onto: ImageDraw.ImageDraw, width: int, height: int) -> None:
        for points in shapes:
            onto.polygon([(x * width, y * height) for x, y in points], fill=1)

    return draw


def _ellipses(*shapes: tuple[float, float, float, float]) -> Draw:
    def draw(onto: ImageDraw.ImageDraw, width: int, height: int) -> None:
        for x, y, across, down in shapes:
            box = ((x - across) * width, (y - down) * height, (x + across) * width, (y + down) * height)
            onto.ellipse(box, fill=1)

    return draw


def _both(*draws: Draw) -> Draw:
    def draw(onto: ImageDraw.ImageDraw, width: int, height: int) -> None:
        for each in draws:
            each(onto, width, height)

    return draw


@dataclass(frozen=True)
class Thing:
    """A photograph with one thing in it."""

    library: str
    file: str
    split: str
    draw: Draw

    def image(self) -> Image.Image:
        return Image.open(_file(self.library, self.file)).convert("RGB")

    def mask(self) -> Image.Image:
        """The label image: 1 where the thing is, else 0."""
        mask = Image.new("L", self.image().size)
        self.draw(ImageDraw.Draw(mask), *mask.size)
        return mask


THINGS = (
    Thing("skimage", "astronaut.png", "train", _polygons(ASTRONAUT)),
    Thing("skimage", "coffee.png", "train", _ellipses((0.46, 0.49, 0.335, 0.46), (0.49, 0.27, 0.2, 0.24))),
    Thing("skimage", "motorcycle_left.png", "train", _polygons(MOTORCYCLE)),
    Thing("skimage", "chelsea.png", "val", _polygons(CAT)),
    Thing("sklearn", "flower.jpg", "val", _both(_ellipses((0.48, 0.52, 0.215, 0.32)), _polygons(SECOND_FLOWER))),
    Thing("skimage", "rocket.jpg", "val", _polygons(ROCKET)),
)


def _file(library: str, name: str) -> Path:
    if library == "skimage":
        import skimage

        return Path(skimage.__file__).parent / "data" / name
    import sklearn

    return Path(sklearn.__file__).parent / "datasets" / "images" / name


def _halves(image: Image.Image) -> Iterator[Image.Image]:
    """An image, its mirror, and two overlapping crops: more to train on, and to judge on."""
    width, height = image.size
    yield image
    yield image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    yield image.crop((0, 0, round(0.75 * width), round(0.75 * height)))
    yield image.crop((round(0.25 * width), round(0.25 * height), width, height))


def segmentation_set(folder: Path) -> Path:
    """Two folders of images and labels, with splits: no photograph is in both."""
    for thing in THINGS:
        for at, (image, mask) in enumerate(zip(_halves(thing.image()), _halves(thing.mask()), strict=True)):
            for kind, picture in (("images", image), ("labels", mask)):
                place = folder / kind / thing.split / f"{Path(thing.file).stem}-{at}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                picture.save(place)
    return folder


def discovery_set(folder: Path) -> Path:
    """COCO's JSON, with the box around each mask."""
    (folder / "images").mkdir(parents=True)
    images, boxes = [], []
    for at, thing in enumerate(THINGS):
        image = thing.image()
        name = f"{Path(thing.file).stem}.png"
        image.save(folder / "images" / name)
        rows, columns = np.nonzero(np.asarray(thing.mask()))
        left, top = int(columns.min()), int(rows.min())
        box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
        images.append({"id": at, "file_name": name, "width": image.width, "height": image.height})
        boxes.append({"id": at, "image_id": at, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    document = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "annotations.json").write_text(json.dumps(document))
    return folder


def depth_set(folder: Path) -> Path:
    """Crops of the motorcycle with depth as NPY, 1000 / 7 / disparity: the left part to train on, the right to test."""
    image = Image.open(_file("skimage", "motorcycle_left.png")).convert("RGB")
    with np.load(_file("skimage", "motorcycle_disp.npz")) as stored:
        disparity = stored[stored.files[0]].astype(np.float32)
    depth = np.where(np.isfinite(disparity) & (disparity > 0), 1000 / 7 / np.maximum(disparity, 1e-3), 0)
    side = 250
    for at, (left, top) in enumerate((x, y) for x in range(0, image.width - side, 60) for y in (0, 125, 250)):
        split = "train" if left + side <= 400 else "val" if left >= 400 else None
        if split is None:
            continue
        for kind in ("images", "depth"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        image.crop((left, top, left + side, top + side)).save(folder / "images" / split / f"{at:02}.png")
        np.save(folder / "depth" / split / f"{at:02}.npy", depth[top : top + side, left : left + side])
    return folder


def faces_set(folder: Path) -> Path:
    """Folders of classes: faces, and other patches of the same photographs."""
    faces = np.load(_file("skimage", "lfw_subset.npy"))
    for at, patch in enumerate(faces):
        kind = "face" if at < 100 else "other"
        place = folder / ("train" if at % 2 else "val") / kind / f"{at:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((255 * patch).astype(np.uint8))
        grey.convert("RGB").resize((256, 256), Image.Resampling.BICUBIC).save(place)
    return folder
