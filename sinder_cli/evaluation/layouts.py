"""Data as people have them on disk: class folders, and images with a label file each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from sinder_cli.errors import BadInputError, NoInputError, UsageError
from sinder_cli.evaluation.contract import Dataset, Places
from sinder_cli.images.sources import ImageFiles, find_images

T = TypeVar("T")
TRAIN = ("train", "training")
TEST = ("val", "validation", "test", "testing")


def split_folders(folder: Path) -> tuple[Path | None, Path | None]:
    """Return the folders of a set that are called as the training and the test split usually are."""
    found = [next((folder / name for name in names if (folder / name).is_dir()), None) for names in (TRAIN, TEST)]
    return found[0], found[1]


def class_folders(places: Places, train_share: float) -> Dataset:
    """Read one folder per class: `DATA/train/CLASS/…` and `DATA/val/CLASS/…`, or `--train` and `--data`.

    A set without splits is split by the seed, class by class, `train_share` of each to train on.
    Raises `NoInputError` for a missing folder, and `BadInputError` for a folder of no classes, an empty class, a class
    that only one split has, or fewer than two classes.
    """
    folder = one_folder(places.data, "--data")
    if places.train:
        train, test = one_folder(places.train, "--train"), folder
    else:
        first, second = split_folders(folder)
        if first is None or second is None:
            return _split_classes(folder, train_share, places.seed)
        train, test = first, second
    classes, known = _images_by_class(train), _images_by_class(test)
    for name in known:
        if name not in classes:
            raise BadInputError(f"cannot use {test / name}", f"the class is not in {train}", "give both the classes")
    names = tuple(classes)
    _require_classes(names, train)
    images, truth = _flat({name: known.get(name, []) for name in names}, names)
    train_images, train_truth = _flat(classes, names)
    note = f"{len(names)} classes; {len(train_images):,} images to train on from {train}, {len(images):,} from {test}"
    return Dataset(ImageFiles(images), truth, ImageFiles(train_images), train_truth, names, note)


def one_folder(places: Sequence[str], option: str, wanted: str = "classes", lying: str = "class folders") -> Path:
    """Return the one folder that is named. Raises `NoInputError` for none, several, or what is no folder."""
    if len(places) != 1 or not Path(places[0]).is_dir():
        why = f"{lying} lie in one folder" if places else "nothing is named"
        raise NoInputError(f"cannot read {wanted} from {', '.join(places) or option}", why, f"name it with {option}")
    return Path(places[0])


def require_apart(places: Places) -> None:
    """Raise `UsageError` if images to train on are the ones to test on."""
    both = {Path(place).resolve() for place in places.train} & {Path(place).resolve() for place in places.data}
    if both:
        raise UsageError(f"cannot train and test on {both.pop()}", "it is --train and --data", "name two sets")


def split_by_seed(items: Sequence[T], train_share: float, key: str, least: int = 1) -> tuple[list[T], list[T]]:
    """Draw a share of the items to train on; at least one, and at least `least` are left to test. Orders are drawn."""
    drawn = random.Random(key).sample(items, len(items))
    count = min(max(1, round(train_share * len(items))), len(items) - least)
    return drawn[:count], drawn[count:]


def pairs_by_stem(
    images: tuple[Path, Sequence[Path]], truths: tuple[Path, Sequence[Path]], what: str
) -> list[tuple[Path, Path]]:
    """Return images with their truths: of two folders, the files of the same path but for what follows the last dot.

    `what` is what a truth is called. Raises `BadInputError` for one without the other, and two of one path.
    """
    of_image, of_truth = _by_stem(*images), _by_stem(*truths)
    for stem, path in of_image.items():
        if stem not in of_truth:
            raise without_partner(path, what, truths[0])
    for stem, path in of_truth.items():
        if stem not in of_image:
            raise without_partner(path, "image", images[0])
    return [(path, of_truth[stem]) for stem, path in of_image.items()]


def without_partner(path: Path, partner: str, folder: Path) -> BadInputError:
    """Return the error for a file whose partner should be in a folder."""
    return BadInputError(f"cannot use {path}", f"it has no {partner} in {folder}", f"add the {partner}, or remove it")


def _by_stem(folder: Path, paths: Sequence[Path]) -> dict[Path, Path]:
    found: dict[Path, Path] = {}
    for path in paths:
        other = found.setdefault(path.relative_to(folder).with_suffix(""), path)
        if other != path:
            raise BadInputError(f"cannot use {path}", f"{other.name} has the same name", "remove or rename one")
    return found


def _images_by_class(folder: Path) -> dict[str, list[Path]]:
    """Return the images of each class. Raises `BadInputError` for a folder of no classes, or an empty class."""
    found: dict[str, list[Path]] = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        found[place.name] = _images_of_class(place)
    if not found:
        raise BadInputError(f"cannot read classes from {folder}", "it has no folders", "put each class into a folder")
    return found


def _images_of_class(folder: Path) -> list[Path]:
    try:
        return list(find_images([str(folder)]).paths)
    except NoInputError as error:
        raise BadInputError(f"cannot use {folder}", "the class has no images", "remove its folder") from error


def _require_classes(names: Sequence[str], folder: Path) -> None:
    if len(names) < 2:
        raise BadInputError(f"cannot read classes from {folder}", f"there is only {names[0]}", "give two or more")


def _flat(by_class: dict[str, list[Path]], names: Sequence[str]) -> tuple[tuple[Path, ...], list[int]]:
    pairs = [(path, at) for at, name in enumerate(names) for path in by_class[name]]
    return tuple(path for path, _ in pairs), [at for _, at in pairs]


def _split_classes(folder: Path, train_share: float, seed: int) -> Dataset:
    by_class = _images_by_class(folder)
    names = tuple(by_class)
    _require_classes(names, folder)
    train: dict[str, list[Path]] = {}
    test: dict[str, list[Path]] = {}
    for name, paths in by_class.items():
        if len(paths) < 2:
            raise BadInputError(
                f"cannot split {folder / name}", "the class has one image", "give every class two or more"
            )
        train[name], test[name] = map(sorted, split_by_seed(paths, train_share, f"{seed} {name}"))
    images, truth = _flat(test, names)
    train_images, train_truth = _flat(train, names)
    note = (
        f"{len(names)} classes of {folder}, split by the seed: {len(train_images):,} images to train on,"
        f" {len(images):,} to test"
    )
    return Dataset(ImageFiles(images), truth, ImageFiles(train_images), train_truth, names, note)
