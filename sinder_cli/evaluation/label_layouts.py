"""Images with label images, as people have them on disk: the layouts of VOC, Cityscapes and ADE20k, or two folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sinder_cli.errors import BadInputError, NoInputError, UsageError
from sinder_cli.evaluation.contract import Dataset, Places
from sinder_cli.evaluation.labels import IGNORED, SUFFIXES, LabelImage, LabelRule
from sinder_cli.evaluation.layouts import one_folder, pairs_by_stem, split_by_seed, split_folders
from sinder_cli.events import Warned, tracked
from sinder_cli.images.sources import ImageFiles, find_images

MOST_NAMED = 8  # values in a message
LABEL_FOLDERS = ("labels", "masks", "annotations")
NAMES = "classes.txt"  # beside two folders: a name a line, in the order of the classes
VOC = (
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike,"
    " person, pottedplant, sheep, sofa, train, tvmonitor"
)
CITYSCAPES = (
    "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, rider,"
    " car, truck, bus, train, motorcycle, bicycle"
)
ADE20K_CLASSES = 150
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
TRAIN_IDS |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}  # of Cityscapes' ids; the other ids up to 33 do not count

Pair = tuple[Path, LabelImage]


@dataclass(frozen=True)
class _Found:
    """Pairs of images and labels in one layout; `train` is None if they are not split."""

    layout: str
    test: list[Pair]
    train: list[Pair] | None
    rule: LabelRule
    names: tuple[str, ...] = ()


WANTED = ("labels", "images and labels")


def labelled_images(places: Places, rule: LabelRule, train_share: float | None = None) -> Dataset:
    """Read images with a label image each, `LabelImage`, from a folder in one of the layouts.

    - VOC: `JPEGImages`, `SegmentationClass`, `ImageSets/Segmentation/{train,val}.txt`
    - Cityscapes: `leftImg8bit/{train,val}/CITY`, `gtFine`, with train ids, or ids, which are mapped to train ids
    - ADE20k: `images/{training,validation}`, `annotations/{training,validation}`; label 0 does not count
    - two folders, `images` and `labels` (or `masks`, `annotations`), with the same stems: each with the folders `train`
      and `val`, or in a folder `train` and a folder `val`, or named by `--data` and `--train`, or not split

    Without `train_share`, a task trains on nothing and gets the test split, or all images of a set that is not split.
    With it, such a set is split by the seed. All label images are read once: sizes and values are checked before
    anything is run. Where only the values say how many classes there are, and few of them occur, a warning says so.
    Raises `NoInputError` for a missing folder, and `BadInputError`, which names the file, for what is malformed.
    """
    folder = one_folder(places.data, "--data", *WANTED)
    found = _found(folder, rule)
    if places.train and train_share is not None:
        other = _found(one_folder(places.train, "--train", *WANTED), rule)
        found = replace(found, train=_ruled(other.train or other.test, found.rule))
    found = _split(found, folder, train_share, places.seed)
    pairs = [*(found.train or ()), *found.test]
    highest, seen = -1, set[int]()
    for image, label in tracked(pairs, places.emit, "label images", len(pairs), "images"):
        label.require_fitting(image)
        values = {int(value) for value in np.unique(label.read())} - {IGNORED}
        highest, seen = max(highest, *values, -1), seen | values
    if found.rule.classes is None:
        found = _counted(found, folder, highest)
        if 2 * len(seen) < highest + 1:
            lowest = ", ".join(str(found.rule.value(at)) for at in sorted(seen)[:MOST_NAMED])
            words = f"labels of {folder} go up to {found.rule.value(highest)}, but only {len(seen)} values occur"
            places.emit(
                Warned(f"{words} ({lowest}, …): a value that does not count is named by the setting ignore_label")
            )
    return _dataset(found, folder)


def _found(folder: Path, rule: LabelRule) -> _Found:
    """Return the pairs of a folder by the layout that it has. Raises `BadInputError` if it has none."""
    layouts: dict[str, Callable[[Path, LabelRule], _Found]] = {
        "SegmentationClass": _voc,
        "leftImg8bit": _cityscapes,
        "images": _two_folders,
        "train": _two_folders_a_split,
        "training": _two_folders_a_split,
    }
    for name, read in layouts.items():
        if (folder / name).is_dir():
            return read(folder, rule)
    what = "it has neither images and labels nor the folders of VOC, Cityscapes or ADE20k"
    raise BadInputError(f"cannot read labels from {folder}", what, "put them into images/ and labels/")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


def _voc(folder: Path, rule: LabelRule) -> _Found:
    def pairs(split: str) -> list[Pair]:
        path = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        try:
            names = path.read_text(encoding="utf-8").split()
        except FileNotFoundError as error:
            raise BadInputError(f"cannot read {path}", "VOC's list of images is not there", "add it") from error
        except (OSError, UnicodeDecodeError) as error:
            raise BadInputError(f"cannot read {path}", str(error)) from error
        if not names:
            raise BadInputError(f"cannot use {path}", "it names no image")
        return [pair(name) for name in names]

    def pair(name: str) -> Pair:
        image, label = folder / "JPEGImages" / f"{name}.jpg", folder / "SegmentationClass" / f"{name}.png"
        _require_file(image, label)
        _require_file(label, image)
        return image, LabelImage(label, rule)

    names = _names(VOC)
    rule, names = _known(rule, names[1:] if rule.zero_ignored else names)
    train = pairs("train") if (folder / "ImageSets" / "Segmentation" / "train.txt").is_file() else None
    return _Found("VOC's layout", pairs("val"), train, rule, names)


def _cityscapes(folder: Path, rule: LabelRule) -> _Found:
    table = tuple(TRAIN_IDS.get(value, -1) for value in range(34))
    if rule.zero_ignored:
        raise UsageError("cannot use --reduce-zero-label", "train ids of Cityscapes begin at 0", "leave it out")
    train_ids, names = _known(rule, _names(CITYSCAPES))
    ids = replace(train_ids, table=table)

    def pairs(split: str) -> list[Pair]:
        images = folder / "leftImg8bit" / split
        return [pair(path, images) for path in _images_in(images)]

    def pair(image: Path, images: Path) -> Pair:
        city = folder / "gtFine" / images.name / image.parent.relative_to(images)
        stem = image.stem.removesuffix("_leftImg8bit")
        mapped, plain = (city / f"{stem}_gtFine_{kind}.png" for kind in ("labelTrainIds", "labelIds"))
        if mapped.is_file():
            return image, LabelImage(mapped, train_ids)
        _require_file(plain, image)
        return image, LabelImage(plain, ids)

    train = pairs("train") if (folder / "leftImg8bit" / "train").is_dir() else None
    return _Found("Cityscapes' layout", pairs("val"), train, train_ids, names)


def _two_folders(folder: Path, rule: LabelRule) -> _Found:
    images, labels = folder / "images", _labels_of(folder)
    train, test = split_folders(images)
    if train is None or test is None:
        rule, names = _named(folder, rule)
        return _Found("two folders", _pairs(images, labels, rule), None, rule, names)
    ade = (train.name, test.name, labels.name) == ("training", "validation", "annotations")
    rule, names = _ade20k(folder, rule) if ade else _named(folder, rule)
    layout = "ADE20k's layout" if ade else "two folders"
    first, second = (_pairs(each, labels / each.name, rule) for each in (train, test))
    return _Found(layout, second, first, rule, names)


def _two_folders_a_split(folder: Path, rule: LabelRule) -> _Found:
    train, test = split_folders(folder)
    if train is None or test is None:
        raise BadInputError(f"cannot read labels from {folder}", "it has no folder val beside train", "add one")
    rule, names = _named(folder, rule)
    first, second = (_pairs(each / "images", _labels_of(each), rule) for each in (train, test))
    return _Found("two folders a split", second, first, rule, names)


def _labels_of(folder: Path) -> Path:
    found = next((folder / name for name in LABEL_FOLDERS if (folder / name).is_dir()), None)
    if found is None:
        why = f"there is no folder {', '.join(LABEL_FOLDERS)} beside images"
        raise BadInputError(f"cannot read labels from {folder}", why, "put the label images into labels/")
    return found


def _images_in(folder: Path) -> tuple[Path, ...]:
    try:
        return find_images([str(folder)]).paths
    except NoInputError as error:
        raise BadInputError(f"cannot use {folder}", "it has no images") from error


def _pairs(images: Path, labels: Path, rule: LabelRule) -> list[Pair]:
    """Return images and labels with the same path but for the suffix. Raises `BadInputError` for one without other."""
    found = _images_in(images)
    if not labels.is_dir():
        raise BadInputError(f"cannot use {images}", f"there is no folder {labels}", "give the labels of its images")
    files = sorted(path for path in labels.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    shown = [path for path in files if not path.name.startswith("._")]
    pairs = pairs_by_stem((images, found), (labels, shown), "label image")
    return [(image, LabelImage(label, rule)) for image, label in pairs]


def _require_file(path: Path, other: Path) -> None:
    if not path.is_file():
        raise BadInputError(f"cannot use {other}", f"there is no file {path}", "add it")


def _known(rule: LabelRule, names: tuple[str, ...]) -> tuple[LabelRule, tuple[str, ...]]:
    """Return a rule with the classes of a layout; a number that the user gives goes before, and has no names."""
    rule = replace(rule, zero_ignored=bool(rule.zero_ignored))
    if rule.classes is not None and rule.classes != len(names):
        return rule, ()
    return replace(rule, classes=len(names)), names


def _ade20k(folder: Path, rule: LabelRule) -> tuple[LabelRule, tuple[str, ...]]:
    """Return ADE20k's rule: 150 classes from label 1 on. Names come from `objectInfo150.txt`, if it is there."""
    rule = replace(rule, zero_ignored=rule.zero_ignored is not False)
    try:
        lines = (folder / "objectInfo150.txt").read_text(encoding="utf-8").splitlines()[1:]
        names = tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip())
    except (OSError, UnicodeDecodeError):
        names = ()
    if len(names) != ADE20K_CLASSES:
        names = tuple(str(value) for value in range(1, ADE20K_CLASSES + 1))
    return _known(rule, names if rule.zero_ignored else ("other", *names))


def _named(folder: Path, rule: LabelRule) -> tuple[LabelRule, tuple[str, ...]]:
    """Return the rule of two folders: classes by the user's number, or by the file of names, or not known yet."""
    rule = replace(rule, zero_ignored=bool(rule.zero_ignored))
    path = folder / NAMES
    if not path.is_file():
        return rule, ()
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"cannot read {path}", str(error)) from error
    return _known(rule, names)


def _split(found: _Found, folder: Path, train_share: float | None, seed: int) -> _Found:
    """Return the pairs as a task needs them. Raises `BadInputError` for fewer than two test images."""
    if train_share is None:
        found = replace(found, train=None)
    elif found.train is None:
        _require_images(len(found.test), 3, "", folder)
        parts = split_by_seed(found.test, train_share, f"{seed} labels", least=2)
        train, test = (sorted(part, key=lambda pair: pair[0]) for part in parts)
        found = replace(found, train=train, test=test, layout=f"{found.layout}, split by the seed")
    _require_images(len(found.test), 2, " to test on", folder)
    return found


def _require_images(count: int, least: int, use: str, folder: Path) -> None:
    if count < least:
        why = f"there {'is' if count == 1 else 'are'} only {count} image{'' if count == 1 else 's'}{use}"
        raise BadInputError(f"cannot evaluate on {folder}", why, f"give {least} or more")


def _counted(found: _Found, folder: Path, highest: int) -> _Found:
    """Return the pairs with as many classes as the labels have. Raises `BadInputError` for fewer than two."""
    if highest < 1:
        why = "no label counts" if highest < 0 else f"the only label that counts is {found.rule.value(0)}"
        remedy = f"if {found.rule.ignored} is a class, set ignore_label of the task to a value that does not occur"
        raise BadInputError(f"cannot use the labels of {folder}", why, remedy)
    rule = replace(found.rule, classes=highest + 1)
    return replace(found, rule=rule, test=_ruled(found.test, rule), train=found.train and _ruled(found.train, rule))


def _ruled(pairs: Sequence[Pair], rule: LabelRule) -> list[Pair]:
    """Return pairs with another rule; each keeps its table."""
    return [(image, replace(label, rule=replace(rule, table=label.rule.table))) for image, label in pairs]


def _dataset(found: _Found, folder: Path) -> Dataset:
    rule, test, train = found.rule, found.test, found.train
    names = found.names or tuple(str(rule.value(at)) for at in range(rule.classes or 0))
    meaning = [f"{rule.ignored} is ignored"] if rule.ignored is not None else []
    meaning += ["0 is ignored and the others move down by one"] if rule.zero_ignored else []
    counts = [f"{len(train):,} images to train on"] if train is not None else []
    parts = [f"{found.layout} in {folder}", f"{len(names)} classes", *meaning, *counts, f"{len(test):,} to test"]
    return Dataset(
        test=ImageFiles(tuple(image for image, _ in test)),
        truth=[label for _, label in test],
        train=None if train is None else ImageFiles(tuple(image for image, _ in train)),
        train_truth=[label for _, label in train or ()],
        classes=names,
        note="; ".join(parts),
    )
