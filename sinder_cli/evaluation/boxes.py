"""Images with boxes of objects, as people have them on disk: VOC's XML files, or COCO's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from sinder_cli.errors import BadInputError, NoInputError, UsageError
from sinder_cli.evaluation.contract import Dataset, Places
from sinder_cli.events import tracked
from sinder_cli.images.decoding import UnreadableImageError, upright_size
from sinder_cli.images.sources import ImageFiles, find_images

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels; right and bottom are the first outside
VOC_SPLIT = "trainval"  # that LOST is published on
SLACK = 1.0  # pixels that a box may reach out of its image: COCO's are rounded


@dataclass(frozen=True)
class Boxes:
    """The boxes of one image, of all classes, and its size in pixels."""

    width: int
    height: int
    boxes: tuple[Box, ...]


Boxed = tuple[Path, Boxes]


def boxed_images(places: Places, split: str | None) -> Dataset:
    """Read images with boxes; the truth of an image is its `Boxes`.

    VOC: `JPEGImages/` and `Annotations/`, perhaps below `VOCdevkit/` or `VOC2007/`; of these, the images that
    `ImageSets/Main/SPLIT.txt` lists, `trainval` unless `split` says otherwise, or all without such lists.
    COCO: a JSON file, named or in the folder or its `annotations/`, with the images anywhere below the folder; `split`
    chooses among several, such as `val2017`.
    All boxes count, VOC's difficult ones too, but not COCO's crowds; images without any box are left out.
    Raises `NoInputError` for missing files, and `BadInputError`, which names the file, for an annotation without image,
    broken XML or JSON, a size or a box that does not fit the image, or fewer than two images.
    """
    if len(places.data) != 1:
        why = "images with boxes lie in one folder" if places.data else "nothing is named"
        raise NoInputError(f"cannot read boxes from {', '.join(places.data) or '--data'}", why, "name it with --data")
    folder = Path(places.data[0])
    voc = _voc_folder(folder)
    found, how = _voc(voc, split, places) if voc else _coco(folder, split, places)
    kept = [(path, boxes) for path, boxes in found if boxes.boxes]
    if len(kept) < 2:
        why = "there is one image with boxes" if kept else "no image has a box"
        raise BadInputError(f"cannot use {folder}", why, "give two images or more")
    note = f"{len(kept):,} images with {sum(len(boxes.boxes) for _, boxes in kept):,} boxes from {how}"
    if left := len(found) - len(kept):
        note += f"; {left:,} without boxes left out"
    return Dataset(ImageFiles(tuple(path for path, _ in kept)), [boxes for _, boxes in kept], note=note)


def _voc_folder(folder: Path) -> Path | None:
    """Return the folder with `Annotations/` of XML files: this one, or the only one of its kind a level or two below.

    Raises `UsageError` for several.
    """
    if not folder.is_dir():
        return None
    found = sorted(
        path.parent
        for pattern in ("Annotations", "*/Annotations", "*/*/Annotations")
        for path in folder.glob(pattern)
        if path.parent.joinpath("JPEGImages").is_dir()
    )
    if len(found) > 1:
        raise UsageError(f"several sets in {folder}", ", ".join(map(str, found)), "name one with --data")
    return found[0] if found else None


def _voc(folder: Path, split: str | None, places: Places) -> tuple[list[Boxed], str]:
    listed = _voc_list(folder, split)
    annotations = folder / "Annotations"
    if listed is None:
        files = sorted(annotations.glob("*.xml"))
        how = str(folder)
    else:
        files = [annotations / f"{name}.xml" for name in listed]
        how = f"{folder}, {split or VOC_SPLIT}"
    images = {path.stem: path for path in _images(folder / "JPEGImages")}
    if listed is None:
        for name, path in images.items():
            if not annotations.joinpath(f"{name}.xml").is_file():
                raise BadInputError(
                    f"cannot use {path}", f"it has no XML in {annotations}", "add it, or remove the image"
                )
    found = []
    for file in tracked(files, places.emit, "boxes", len(files), "images"):
        if not file.is_file():
            raise BadInputError(f"cannot read {file}", "there is no such file", "add it, or take it off the list")
        if file.stem not in images:
            raise BadInputError(f"cannot use {file}", f"it has no image in {folder / 'JPEGImages'}", "add the image")
        found.append((images[file.stem], _voc_boxes(file, images[file.stem])))
    return found, how


def _voc_list(folder: Path, split: str | None) -> list[str] | None:
    """Return the names that a list of VOC has; None if none was asked for and the usual one is not there."""
    path = folder / "ImageSets" / "Main" / f"{split or VOC_SPLIT}.txt"
    if path.is_file():
        return [words[0] for line in path.read_text(errors="surrogateescape").splitlines() if (words := line.split())]
    if split is not None:
        raise NoInputError(f"cannot read {path}", "there is no such file", "check --set discovery.split")
    return None


def _voc_boxes(file: Path, image: Path) -> Boxes:
    """Read the boxes of an XML file, whose pixels count from 1 and whose ends are inside, as coordinates from 0."""
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:  # LookupError: an unknown encoding
        raise BadInputError(f"cannot read {file}", f"it is no XML: {error}", "replace or remove it") from error
    size = root.find("size")
    sides = None if size is None else (_number(size, "width", file), _number(size, "height", file))
    width, height = _size_of(image, sides, file)
    boxes = []
    for thing in root.iter("object"):
        corners = thing.find("bndbox")
        if corners is None:
            raise BadInputError(f"cannot read {file}", "an object has no bndbox", "replace or remove it")
        left, top, right, bottom = (_number(corners, name, file) for name in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append((left - 1, top - 1, right, bottom))
    return Boxes(width, height, _within(boxes, (width, height), file, first=1))


def _number(element: ElementTree.Element, name: str, file: Path) -> float:
    text = element.findtext(name)
    try:
        return _finite(float(text or ""))
    except ValueError as error:
        why = f"{element.tag} has no number {name}" if text is None else f"{name} is {text!r}"
        raise BadInputError(f"cannot read {file}", why, "replace or remove it") from error


def _finite(value: float) -> float:
    if value - value != 0:
        raise ValueError(value)
    return value


def _images(folder: Path) -> Sequence[Path]:
    try:
        return find_images([str(folder)]).paths
    except NoInputError as error:
        raise NoInputError(f"no images in {folder}", "images with boxes are read from it", "check --data") from error


def _size_of(image: Path, said: tuple[float, float] | None, file: Path) -> tuple[int, int]:
    """Return the size of an image. Raises `BadInputError` if its annotation says another, but for 0."""
    try:
        size = upright_size(image)
    except UnreadableImageError as error:
        raise BadInputError(f"cannot read {image}", str(error), "replace or remove it") from error
    if said is not None and all(said) and said != size:
        why = f"it has {size[0]}×{size[1]} pixels, and {file} says {said[0]:g}×{said[1]:g}"
        raise BadInputError(f"cannot use {image}", why, "give the image that was annotated")
    return size


def _within(boxes: Iterable[Box], size: tuple[int, int], file: Path, first: int = 0) -> tuple[Box, ...]:
    """Return boxes cut to their image. Raises `BadInputError` for one that is empty, or reaches out of it.

    `first` is the number that the file has for the first pixel.
    """
    width, height = size
    found = []
    for left, top, right, bottom in boxes:
        shown = f"box {left + first:g} {top + first:g} {right:g} {bottom:g}"
        if right <= left or bottom <= top:
            raise BadInputError(f"cannot use {file}", f"{shown} is empty", "remove it")
        if min(left, top) < -SLACK or right > width + SLACK or bottom > height + SLACK:
            why = f"{shown} is not within {width}×{height} pixels"
            raise BadInputError(f"cannot use {file}", why, "correct or remove it")
        found.append((max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))))
    return tuple(found)


def _coco(place: Path, split: str | None, places: Places) -> tuple[list[Boxed], str]:
    file = _coco_file(place, split)
    records, boxes, empty = _coco_records(file)
    folder = file.parent if place.is_file() else place
    if place.is_file() and folder.name == "annotations":
        folder = folder.parent
    known = _Found(folder)
    found = []
    for key, (name, sides) in tracked(list(records.items()), places.emit, "boxes", len(records), "images"):
        if key not in boxes:
            found.append((Path(name), Boxes(0, 0, ())))
            continue
        image = known.named(name)
        if image is None:
            raise BadInputError(f"cannot use {file}", f"it has no image {name} in {folder}", "add the image")
        width, height = _size_of(image, sides, file)
        within = _within(boxes[key], (width, height), file)
        found.append((image, Boxes(width, height, tuple(_rounded(box) for box in within))))
    how = f"{file}" + (f"; {empty:,} boxes without area left out" if empty else "")
    return found, how


def _rounded(box: Box) -> Box:
    """Return a box with whole pixels, as LOST takes COCO's."""
    left, top, right, bottom = (float(round(side)) for side in box)
    return left, top, right, bottom


def _coco_file(place: Path, split: str | None) -> Path:
    """Return the JSON file of a COCO set. Raises `NoInputError` for none, `UsageError` for several."""
    if place.is_file():
        return place
    files = sorted([*place.glob("annotations/*.json"), *place.glob("*.json")])
    if split is not None:
        files = [path for path in files if path.stem == split or path.stem.endswith(f"_{split}")]
    instances = [path for path in files if path.name.startswith("instances")]
    files = instances or files
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(path.name for path in files)
        raise UsageError(f"several JSON files in {place}", names, "choose with --set discovery.split=, such as val2017")
    looked = "looked for JPEGImages/ with Annotations/, and for annotations/*.json and *.json"
    raise NoInputError(f"no boxes in {place}", looked, "check --data and --set discovery.split")


Records = dict[int, tuple[str, tuple[float, float] | None]]  # file name and size by the identity of an image


def _coco_records(file: Path) -> tuple[Records, dict[int, list[Box]], int]:
    """Return the images of a JSON file, their boxes, and how many boxes without area were left out."""
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise BadInputError(f"cannot read {file}", f"it is no JSON: {error}", "replace it") from error
    records: Records = {}
    boxes: dict[int, list[Box]] = {}
    empty = 0
    try:
        for image in document["images"]:
            sides = (_finite(float(image["width"])), _finite(float(image["height"]))) if "width" in image else None
            records[image["id"]] = (str(image["file_name"]), sides)
        for thing in document["annotations"]:
            if thing.get("iscrowd") == 1:
                continue
            if not isinstance(thing["bbox"], list) or len(thing["bbox"]) != 4:
                raise ValueError(f"annotation {thing.get('id')} has no bbox of four numbers")
            left, top, width, height = (_finite(float(side)) for side in thing["bbox"])
            if thing["image_id"] not in records:
                raise ValueError(f"annotation {thing.get('id')} is of image {thing['image_id']}, which is not listed")
            if min(width, height) == 0:  # COCO itself has some
                empty += 1
                continue
            boxes.setdefault(thing["image_id"], []).append((left, top, left + width, top + height))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise BadInputError(f"cannot read {file}", f"it is no COCO file of boxes: {why}", "replace it") from error
    return records, boxes, empty


class _Found:
    """The images below a folder, found by the names that a JSON file has for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_name: dict[str, list[Path]] = {}
        for path in _images(folder):
            self.by_name.setdefault(path.name, []).append(path)

    def named(self, name: str) -> Path | None:
        """Return the image of a name or path: in `images/`, in the folder, or the only one below it."""
        for path in (self.folder / "images" / name, self.folder / name):
            if path.is_file():
                return path
        found = self.by_name.get(Path(name).name, [])
        return found[0] if len(found) == 1 else None
