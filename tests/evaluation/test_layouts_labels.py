"""Sets of images and labels in all four layouts, what values mean, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label_sets import write_image, write_label
from PIL import Image

from sinder_cli import BadInputError, NoInputError
from sinder_cli.evaluation.labels import LabelImage, LabelRule
from sinder_cli.images.sources import files_of
from sinder_cli.tasks import Dataset, Places, labelled_images

ROWS = ((0, 1, 2), (2, 1, 255))


def read(folder: Path, share: float | None = 0.8, seed: int = 0, train: tuple[str, ...] = (), **rule: int) -> Dataset:
    return labelled_images(Places((str(folder),), train, seed), LabelRule(**rule), share)


def names(dataset: Dataset) -> tuple[list[str], list[str]]:
    """Stems of the images to train on and to test."""
    found = [files_of(each) for each in (dataset.train, dataset.test) if each is not None]
    return tuple([path.stem for path in each.paths] if each else [] for each in found)


def two_folders(folder: Path, *stems: str, labels: str = "labels", rows: object = ROWS) -> Path:
    for stem in stems:
        write_image(folder / "images" / f"{stem}.jpg")
        write_label(folder / labels / f"{stem}.png", rows)
    return folder


def voc(folder: Path) -> Path:
    for stem in ("a", "b", "c", "d"):
        write_image(folder / "JPEGImages" / f"{stem}.jpg")
        write_label(folder / "SegmentationClass" / f"{stem}.png", ((0, 20, 255), (15, 0, 1)), palette=True)
    for split, stems in {"train": "a\nb\n", "val": "c\nd\n"}.items():
        path = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(stems)
    return folder


def test_vocs_layout_keeps_indices_of_palettes(tmp_path: Path) -> None:
    found = read(voc(tmp_path))
    assert names(found) == (["a", "b"], ["c", "d"])
    assert found.truth[0].read().tolist() == [[0, 20, -1], [15, 0, 1]]
    assert (found.classes[0], found.classes[15], len(found.classes)) == ("background", "person", 21)
    assert found.note.startswith(f"VOC's layout in {tmp_path}; 21 classes; 255 is ignored; 2 images to train on; 2 to")


def test_vocs_layout_of_other_classes_needs_their_number(tmp_path: Path) -> None:
    write_label(voc(tmp_path) / "SegmentationClass" / "c.png", ((30, 1, 2), (3, 4, 5)))
    with pytest.raises(
        BadInputError, match=r"SegmentationClass/c\.png: label 30 is out of range: there are 21 classes"
    ):
        read(tmp_path).truth[0].read()
    found = read(tmp_path, classes=31)
    assert found.truth[0].read()[0, 0] == 30
    assert found.classes[30] == "30"


@pytest.mark.parametrize(
    ("gone", "message"),
    [("JPEGImages/a.jpg", "a.png: there is no file"), ("ImageSets/Segmentation/val.txt", "val.txt: ")],
)
def test_vocs_layout_names_what_is_missing(tmp_path: Path, gone: str, message: str) -> None:
    (voc(tmp_path) / gone).unlink()
    with pytest.raises(BadInputError, match=message):
        read(tmp_path)


def ade20k(folder: Path) -> Path:
    for split in ("training", "validation"):
        for index in range(2):
            stem = f"ADE_{split}_{index}"
            write_image(folder / "images" / split / f"{stem}.jpg")
            write_label(folder / "annotations" / split / f"{stem}.png", ((0, 1, 150), (2, 2, 255)))
    return folder


def test_ade20ks_layout_ignores_label_zero_and_moves_down(tmp_path: Path) -> None:
    found = read(ade20k(tmp_path))
    assert names(found) == (["ADE_training_0", "ADE_training_1"], ["ADE_validation_0", "ADE_validation_1"])
    assert found.truth[0].read().tolist() == [[-1, 0, 149], [1, 1, -1]]
    assert (len(found.classes), found.classes[0]) == (150, "1")
    assert "0 is ignored and the others move down by one" in found.note


def test_ade20ks_names_come_from_its_list(tmp_path: Path) -> None:
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{at}\t0.1\t1\t1\t1\tthing{at}, object" for at in range(1, 151))]
    (ade20k(tmp_path) / "objectInfo150.txt").write_text("\n".join(lines))
    assert read(tmp_path).classes[149] == "thing150"


def test_ade20ks_label_zero_counts_on_request(tmp_path: Path) -> None:
    found = read(ade20k(tmp_path), zero_ignored=False)
    assert found.truth[0].read().tolist() == [[0, 1, 150], [2, 2, -1]]
    assert (len(found.classes), found.classes[0]) == (151, "other")


def cityscapes(folder: Path) -> Path:
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau"), ("val", "munster")):
        write_image(folder / "leftImg8bit" / split / city / f"{city}_0_leftImg8bit.png")
        stem = folder / "gtFine" / split / city / f"{city}_0_gtFine"
        write_label(stem.with_name(f"{stem.name}_labelIds.png"), ((7, 33, 0), (26, 255, 4)))
        write_label(stem.with_name(f"{stem.name}_instanceIds.png"), ((7, 33, 0), (26001, 255, 4)))
    return folder


def test_cityscapes_ids_become_train_ids(tmp_path: Path) -> None:
    found = read(cityscapes(tmp_path))
    assert names(found) == (
        ["aachen_0_leftImg8bit", "bochum_0_leftImg8bit"],
        ["lindau_0_leftImg8bit", "munster_0_leftImg8bit"],
    )
    assert found.truth[0].read().tolist() == [[0, 18, -1], [13, -1, -1]]
    assert (len(found.classes), found.classes[18]) == (19, "bicycle")


def test_cityscapes_train_ids_go_before_ids(tmp_path: Path) -> None:
    folder = cityscapes(tmp_path) / "gtFine" / "val" / "lindau"
    write_label(folder / "lindau_0_gtFine_labelTrainIds.png", ((5, 5, 255), (0, 0, 18)))
    assert read(tmp_path).truth[0].read().tolist() == [[5, 5, -1], [0, 0, 18]]


def test_cityscapes_unknown_ids_are_refused(tmp_path: Path) -> None:
    folder = cityscapes(tmp_path) / "gtFine" / "val" / "lindau"
    write_label(folder / "lindau_0_gtFine_labelIds.png", ((7, 34, 0), (26, 255, 4)))
    with pytest.raises(BadInputError, match=r"lindau_0_gtFine_labelIds\.png: label 34 is out of range"):
        read(tmp_path).truth[0].read()


def test_cityscapes_missing_label_is_named(tmp_path: Path) -> None:
    (cityscapes(tmp_path) / "gtFine" / "val" / "lindau" / "lindau_0_gtFine_labelIds.png").unlink()
    with pytest.raises(BadInputError, match=r"lindau_0_leftImg8bit\.png: there is no file .*labelIds\.png"):
        read(tmp_path)


@pytest.mark.parametrize("labels", ["labels", "masks", "annotations"])
def test_two_folders_count_classes_and_split_by_seed(tmp_path: Path, labels: str) -> None:
    found = read(two_folders(tmp_path, *"abcdefghij", labels=labels))
    train, test = names(found)
    assert (len(train), len(test), sorted(train + test)) == (8, 2, [*"abcdefghij"])
    assert [label.path.stem for label in found.truth] == test
    assert [label.path.stem for label in found.train_truth] == train
    assert found.classes == ("0", "1", "2")
    assert names(read(tmp_path)) == (train, test)
    assert names(read(tmp_path, seed=1)) != (train, test)


def test_two_test_images_are_left_of_three(tmp_path: Path) -> None:
    train, test = names(read(two_folders(tmp_path, *"abc")))
    assert (len(train), len(test)) == (1, 2)


def test_task_without_training_gets_all_images(tmp_path: Path) -> None:
    found = read(two_folders(tmp_path, *"ab"), share=None)
    assert found.train is None
    assert names(found) == (["a", "b"],)


def test_two_folders_have_splits_inside(tmp_path: Path) -> None:
    found = read(two_folders(tmp_path, "train/a", "train/b", "val/c", "val/city/d"))
    assert names(found) == (["a", "b"], ["c", "d"])
    assert names(read(tmp_path, share=None)) == (["c", "d"],)


def test_splits_have_two_folders_inside(tmp_path: Path) -> None:
    two_folders(tmp_path / "train", *"ab")
    two_folders(tmp_path / "val", *"cd", labels="masks")
    assert names(read(tmp_path)) == (["a", "b"], ["c", "d"])


def test_training_data_lie_elsewhere(tmp_path: Path) -> None:
    two_folders(tmp_path / "one", *"ab", rows=((4, 4, 4), (4, 4, 4)))
    two_folders(tmp_path / "other", *"cd")
    found = read(tmp_path / "other", train=(str(tmp_path / "one"),))
    assert names(found) == (["a", "b"], ["c", "d"])
    assert len(found.classes) == 5
    assert {label.rule.classes for label in (*found.truth, *found.train_truth)} == {5}


def test_training_labels_mean_what_test_labels_do(tmp_path: Path) -> None:
    two_folders(tmp_path / "one", *"ab")
    (two_folders(tmp_path / "other", *"cd") / "classes.txt").write_text("a\nb\n")
    with pytest.raises(BadInputError, match=r"one/labels/a\.png: label 2 is out of range: there are 2 classes"):
        read(tmp_path / "other", train=(str(tmp_path / "one"),))


def test_a_stray_label_is_warned_of(tmp_path: Path) -> None:
    """It makes classes that occur nowhere; of plain folders, only the user knows which values count."""
    two_folders(tmp_path, *"ab", rows=((0, 1, 2), (3, 200, 1)))
    heard: list[Any] = []
    places = Places((str(tmp_path),), emit=heard.append)
    assert len(labelled_images(places, LabelRule(ignored=255, zero_ignored=False, classes=None)).classes) == 201
    assert any(
        "go up to 200, but only 5 values occur (0, 1, 2, 3, 200, …)" in getattr(each, "text", "") for each in heard
    )


def test_cityscapes_elsewhere_keeps_its_table(tmp_path: Path) -> None:
    one, other = cityscapes(tmp_path / "one"), cityscapes(tmp_path / "other")
    found = read(other, train=(str(one),))
    assert found.train_truth[0].path.is_relative_to(one)
    assert found.train_truth[0].read().tolist() == [[0, 18, -1], [13, -1, -1]]


def test_names_of_classes_come_from_a_file(tmp_path: Path) -> None:
    (two_folders(tmp_path, *"abc") / "classes.txt").write_text("sky\nsea\n\nsand\nsun\n")
    assert read(tmp_path).classes == ("sky", "sea", "sand", "sun")


def test_other_ignored_label_and_moved_labels(tmp_path: Path) -> None:
    two_folders(tmp_path, *"abc", rows=((0, 1, 2), (3, 2, 1)))
    found = read(tmp_path, ignored=2, zero_ignored=True)
    assert found.truth[0].read().tolist() == [[-1, 0, -1], [2, -1, 0]]
    assert found.classes == ("1", "2", "3")


def test_deep_labels_are_read(tmp_path: Path) -> None:
    two_folders(tmp_path, *"abc", rows=((0, 300, 2), (3, 2, 65535)))
    with pytest.raises(BadInputError, match="label 65535 is out of range: there are at most 1000 classes"):
        read(tmp_path)
    assert read(tmp_path, ignored=65535).truth[0].read().tolist() == [[0, 300, 2], [3, 2, -1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (((255,) * 3,) * 2, "no label counts"),
        (((255, 0, 0),) * 2, "the only label that counts is 0; if 255 is a class, set ignore_label"),
    ],
)
def test_fewer_than_two_classes_are_refused(tmp_path: Path, rows: object, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        read(two_folders(tmp_path, *"abc", rows=rows))


@pytest.mark.parametrize(
    ("stems", "share", "message"),
    [
        ("ab", 0.8, "only 2 images; give 3"),
        ("a", 0.8, "only 1 image; give 3"),
        ("a", None, "only 1 image to test on; give 2"),
    ],
)
def test_too_few_images_are_refused(tmp_path: Path, stems: str, share: float | None, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        read(two_folders(tmp_path, *stems), share)


def test_same_stem_twice_is_refused(tmp_path: Path) -> None:
    write_image(two_folders(tmp_path, *"abc") / "images" / "a.png")
    with pytest.raises(BadInputError, match=r"images/a\.png: a\.jpg has the same name"):
        read(tmp_path)


def test_folder_without_a_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="it has neither images and labels nor the folders of VOC"):
        read(tmp_path)
    write_image(tmp_path / "images" / "a.png")
    with pytest.raises(BadInputError, match="there is no folder labels, masks, annotations beside images"):
        read(tmp_path)
    with pytest.raises(NoInputError):
        read(tmp_path / "nothing")


def test_rotated_photograph_is_compared_upright(tmp_path: Path) -> None:
    two_folders(tmp_path, *"abc")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    Image.new("RGB", (2, 3)).save(tmp_path / "images" / "a.jpg", exif=exif)  # 3 × 2 upright
    assert len(read(tmp_path).classes) == 3
    Image.new("RGB", (3, 2)).save(tmp_path / "images" / "a.jpg", exif=exif)
    with pytest.raises(BadInputError, match=r"it has 3×2 pixels, and a\.jpg has 2×3"):
        read(tmp_path)


def test_unreadable_image_is_left_to_its_decoding(tmp_path: Path) -> None:
    (two_folders(tmp_path, *"abc") / "images" / "a.jpg").write_bytes(b"no image")
    assert len(read(tmp_path).classes) == 3


def test_one_bit_labels_are_zero_and_one(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(np.array([[True, False]])).save(path)
    assert LabelImage(path, LabelRule(classes=2)).read().tolist() == [[1, 0]]


def test_negative_values_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.tif"
    Image.fromarray(np.array([[-1, 2]], dtype=np.int32)).save(path)
    with pytest.raises(BadInputError, match="label -1 is out of range"):
        LabelImage(path, LabelRule()).read()
