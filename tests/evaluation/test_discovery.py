"""Task `discovery`: LOST against a slow one of our own, boxes by hand, and sets as VOC and COCO lay them out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept_features import KeptFeatures
from PIL import Image
from pydantic import ValidationError
from sinder_plugins.tasks.discovery import (
    TASK,
    DiscoverySettings,
    best_figure,
    in_pixels,
    iou,
    lost_box,
)
from tiny_vit import GRID, PATCH, N, plant

from sinder_cli import BadInputError, ModelRequest, NoInputError, UsageError, api
from sinder_cli.cli.main import main
from sinder_cli.evaluation.contract import Dataset, Figure, Places, Scoring, SideFeatures, View
from sinder_cli.evaluation.settings import EvaluateSettings
from sinder_cli.evaluation.views import Observer
from sinder_cli.images.sources import DrawnImages
from sinder_cli.requests import EvaluateRequest
from sinder_cli.tasks import Box, Boxes

SETTINGS = DiscoverySettings()


def slow_lost(tokens: torch.Tensor, k: int, threshold: float = 0.0) -> Box:
    """LOST with loops, from the paper: degrees, seed, expansion, and a flood fill from the seed."""
    h, w, _ = tokens.shape
    rows = tokens.flatten(0, 1).double().tolist()
    count = len(rows)
    products = [[sum(a * b for a, b in zip(one, other, strict=True)) - threshold for other in rows] for one in rows]
    degrees = [sum(products[p][q] > 0 for q in range(count) if q != p) for p in range(count)]
    order = sorted(range(count), key=lambda p: (degrees[p], p))
    seed = order[0]
    near = [p for p in order[:k] if products[p][seed] > 0]
    mask = [sum(products[p][q] for q in near) > 0 for p in range(count)]
    found, waiting = {seed}, [seed]
    while waiting:
        y, x = divmod(waiting.pop(), w)
        for to_y, to_x in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            to = to_y * w + to_x
            if 0 <= to_y < h and 0 <= to_x < w and mask[to] and to not in found:
                found.add(to)
                waiting.append(to)
    ys, xs = [p // w for p in found], [p % w for p in found]
    return float(min(xs)), float(min(ys)), float(max(xs) + 1), float(max(ys) + 1)


@pytest.mark.parametrize("k", [1, 5, 100])
@pytest.mark.parametrize("seed", range(6))
def test_lost_is_that_of_loops(k: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randn(6, 7, 5, generator=draw) + 0.3 * torch.randn(5, generator=draw)
    assert lost_box(tokens, k) == slow_lost(tokens, k)


@pytest.mark.parametrize("bias", [0.3, 0.6])
def test_a_bias_is_a_quantile_of_dot_products(bias: float) -> None:
    tokens = 1 + torch.randn(6, 7, 5, generator=torch.Generator().manual_seed(0))
    flat = tokens.flatten(0, 1)
    pairs = [(flat[p] @ flat[q]).item() for p in range(42) for q in range(42) if p != q]
    assert lost_box(tokens, 10, bias) == slow_lost(tokens, 10, float(np.quantile(pairs, bias)))


def test_patches_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randn(6, 7, 5, generator=torch.Generator().manual_seed(3))
    whole = lost_box(tokens, 10)
    monkeypatch.setattr("sinder_plugins.tasks.discovery.AT_A_TIME", 5)
    assert lost_box(tokens, 10) == whole


def scene(box: tuple[int, int, int, int], size: tuple[int, int] = (8, 10)) -> torch.Tensor:
    """One object on a flat background: keys that are opposed, with a little noise."""
    keys = torch.tensor([1.0, 0.2, 0.0]).expand(*size, 3).clone()
    left, top, right, bottom = box
    keys[top:bottom, left:right] = torch.tensor([-1.0, 0.2, 0.5])
    return keys + 0.01 * torch.randn(*size, 3, generator=torch.Generator().manual_seed(0))


def test_lost_boxes_the_object() -> None:
    assert lost_box(scene((3, 2, 6, 7)), 100) == (3, 2, 6, 7)
    assert lost_box(scene((0, 0, 2, 3)), 100) == (0, 0, 2, 3)


def test_only_the_part_with_the_seed_is_boxed() -> None:
    keys = scene((1, 1, 3, 3))
    keys[6:8, 6:9] = keys[1, 1]
    keys[1, 1] *= 1.5
    assert lost_box(keys, 100) in {(1, 1, 3, 3), (6, 6, 9, 8)}


def test_keys_that_are_not_finite_give_a_box() -> None:
    keys = scene((3, 2, 6, 7))
    keys[5, 9] = math.nan
    assert lost_box(keys, 100) == (9, 5, 10, 6)
    assert lost_box(torch.zeros(4, 4, 2), 100) == (0, 0, 1, 1)


def test_iou_by_hand() -> None:
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert iou((0, 0, 2, 2), (2, 0, 3, 2)) == 0
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0


def test_patches_become_pixels_of_the_image() -> None:
    assert in_pixels((1, 0, 3, 2), (5, 5), (64, 60), 12) == (14, 0, 38, 24)  # 2 pixels are cut off on each side
    assert in_pixels((1, 0, 4, 5), (5, 4), (100, 200), None) == (25, 0, 100, 200)


def scoring(keys: list[torch.Tensor], truths: list[Boxes], settings: DiscoverySettings = SETTINGS) -> Scoring:
    draw = torch.Generator().manual_seed(1)
    parts: dict[str, list[torch.Tensor]] = {"key": keys}
    for part in ("query", "value"):
        parts[part] = [torch.randn(each.shape, generator=draw) for each in keys]
    side = SideFeatures({"native -1": KeptFeatures(parts)})
    if settings.sweep:
        noise = [torch.randn(each.shape, generator=draw) for each in keys]
        side = SideFeatures(dict(side.test) | {"native -2": KeptFeatures(dict.fromkeys(parts, noise))})
    images = tuple(Image.new("RGB", (truth.width, truth.height)) for truth in truths)
    return Scoring(side, Dataset(DrawnImages(images, "drawn"), truths), settings, side, patch_size=14)


def objects() -> tuple[list[torch.Tensor], list[Boxes]]:
    """Three images of 142 × 112 pixels; the boxes of two are found."""
    keys = [scene((3, 2, 6, 7)), scene((1, 1, 4, 4)), scene((5, 5, 9, 8))]
    boxes: list[tuple[Box, ...]] = [
        ((0, 0, 9, 9), (1 + 42, 28, 1 + 84, 98)),
        ((1 + 14, 14, 1 + 56, 56),),
        ((1 + 70, 70, 1 + 70 + 56, 70 + 20),),
    ]
    return keys, [Boxes(142, 112, each) for each in boxes]


def value(figure: Figure) -> float:
    return float(figure.value(figure.statistics.sum(dim=0)))


def test_corloc_counts_images_with_a_found_box() -> None:
    scores = TASK.score(scoring(*objects()))
    (figure,) = scores.figures
    assert (figure.name, figure.better, value(figure)) == ("CorLoc", "higher", pytest.approx(2 / 3))
    assert scores.by_image is not None
    assert scores.by_image.tolist() == pytest.approx([1, 1, 20 / 42])


def test_boxes_of_images_that_were_scaled_down_are_in_their_own_pixels() -> None:
    keys, truths = objects()
    large = Boxes(1000, 800, ((300, 200, 600, 700),))  # of which 10 × 8 patches are kept
    (figure,) = TASK.score(scoring(keys[:1], [large], DiscoverySettings(most_tokens=80))).figures
    assert value(figure) == 1
    scores = TASK.score(scoring(keys, [large, *truths[1:]], DiscoverySettings(most_tokens=80)))
    assert scores.notes == ("1 images scaled down to at most 80 patches",)
    assert TASK.score(scoring(keys, truths)).notes == ()


def test_pictures_show_the_boxes() -> None:
    given = scoring(*objects())
    scores = TASK.score(given)
    assert scores.picture is not None
    assert TASK.truth is not None
    found, true = scores.picture(1), TASK.truth(given.dataset, 1)
    assert found.shape == (8 * 51, 10 * 51, 3)
    assert true.shape == (112, 142, 3)
    assert found[51 * 2, 51].tolist() == true[20, 15].tolist() == [255, 255, 0]
    assert true[20, 30].tolist() == [0, 0, 0]


def test_a_sweep_tries_everything_and_reports_the_best() -> None:
    settings = DiscoverySettings(sweep=True, sweep_biases=(0.5,))
    keys, truths = objects()
    given = scoring(keys, truths, settings)
    usual, best = TASK.score(given).figures
    assert best.name == "CorLoc, best of 12"  # two blocks, three parts, two thresholds
    assert value(best) >= value(usual) == pytest.approx(2 / 3)
    side = given.features.test["native -1"]
    assert isinstance(side, KeptFeatures)
    swapped = {"key": side.parts["value"], "query": side.parts["query"], "value": side.parts["key"]}
    features = SideFeatures(dict(given.features.test) | {"native -1": KeptFeatures(swapped)})
    scores = TASK.score(replace(given, features=features))
    assert value(scores.figures[1]) == pytest.approx(value(best))
    assert "value of the last block, threshold 0" in scores.notes[0]


def test_the_best_is_chosen_anew_in_resamples() -> None:
    hits = torch.tensor([[True, False], [True, False], [False, True]])
    figure = best_figure("best", hits)
    assert value(figure) == pytest.approx(2 / 3)
    assert figure.value(figure.statistics[[2, 2, 0]].sum(dim=0)).item() == pytest.approx(2 / 3)
    both = torch.stack([figure.statistics.sum(dim=0), figure.statistics[[2, 2]].sum(dim=0)])
    assert figure.value(both).tolist() == pytest.approx([2 / 3, 1])


@pytest.mark.parametrize("block", [-1, -2, -6])
def test_keys_are_those_of_the_block_asked_for(block: int) -> None:
    planted = plant(False, torch.float32)
    view = View(("key", "query"), GRID * PATCH, block=block)
    observer = Observer.of(planted.backbone, planted.module, view, 3.0, "float32", False, "cpu")
    image = planted.image(0, torch.float32)[None]
    found = observer.observe(image)
    before = planted.module.embed(image)
    for earlier in planted.module.blocks[:block]:
        before = earlier(before)
    attention = planted.module.blocks[block]
    weight = attention.qkv.weight
    tokens = attention.norm1(before)[:, 1:].unflatten(1, (GRID, GRID))
    torch.testing.assert_close(found["query"], tokens @ weight[:N].T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found["key"], tokens @ weight[N : 2 * N].T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "given"), [("bias", 1), ("sweep_biases", "0.5,2"), ("part", "norm"), ("k", 0)])
def test_settings_out_of_range_are_refused(name: str, given: object) -> None:
    with pytest.raises(ValidationError):
        DiscoverySettings.model_validate({name: given})
    assert DiscoverySettings.model_validate({"sweep_biases": "0.1, 0.2"}).sweep_biases == (0.1, 0.2)


# Data as people have them.

WIDTH, HEIGHT = 40, 30


def photo(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(path)
    return path


def xml(folder: Path, name: str, *boxes: tuple[Any, Any, Any, Any], size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    """An annotation as VOC has them, with a part of the object, which is none itself."""
    things = "".join(
        f"<object><name>cat</name><difficult>1</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox><part><bndbox><xmin>1</xmin></bndbox></part></object>"
        for a, b, c, d in boxes
    )
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    path = folder / "Annotations" / f"{name}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><filename>{name}.jpg</filename>{sides}{things}</annotation>")
    return path


def voc(folder: Path, *names: str) -> None:
    for name in names:
        photo(folder / "JPEGImages" / f"{name}.jpg")
        xml(folder, name, (1, 1, 10, 20), (3, 4, 40, 30))


def coco(root: Path, file: str = "annotations/instances_val2017.json", images: str = "images") -> dict[str, Any]:
    document: dict[str, Any] = {"images": [], "annotations": []}
    for at, name in enumerate(("a.jpg", "b.jpg", "c.jpg")):
        photo(root / images / name)
        document["images"].append({"id": at, "file_name": name, "width": WIDTH, "height": HEIGHT})
    for at, box in ((0, (1.4, 2, 10, 10)), (0, (0, 0, 40.6, 5)), (1, (5, 5, 5, 5))):
        document["annotations"].append({"id": 7, "image_id": at, "bbox": box, "iscrowd": 0})
    document["annotations"].append({"id": 8, "image_id": 2, "bbox": [0, 0, 9, 9], "iscrowd": 1})
    written(root / file, document)
    return document


def written(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def read(*data: Path, settings: DiscoverySettings = SETTINGS) -> Dataset:
    return TASK.read(Places(tuple(map(str, data))), settings)


def names(dataset: Dataset) -> list[str]:
    assert len(dataset.test) == len(dataset.truth)
    return [Path(dataset.test.name(at)).name for at in range(len(dataset.test))]


@pytest.mark.parametrize("below", ["", "VOC2007", "VOCdevkit/VOC2012"])
def test_voc_is_read_with_boxes_from_zero(tmp_path: Path, below: str) -> None:
    voc(tmp_path / below, "a", "b", "c")
    xml(tmp_path / below, "c")
    dataset = read(tmp_path)
    assert names(dataset) == ["a.jpg", "b.jpg"]
    assert dataset.truth[0] == Boxes(WIDTH, HEIGHT, ((0, 0, 10, 20), (2, 3, 40, 30)))
    assert "2 images with 4 boxes" in dataset.note
    assert "1 without boxes left out" in dataset.note


def test_voc_is_read_by_its_lists(tmp_path: Path) -> None:
    voc(tmp_path, "a", "b", "c", "d")
    main_ = tmp_path / "ImageSets" / "Main"
    main_.mkdir(parents=True)
    (main_ / "trainval.txt").write_text("a\nc\n")
    (main_ / "cat_val.txt").write_text("b  1\nd -1\n")
    assert names(read(tmp_path)) == ["a.jpg", "c.jpg"]
    assert names(read(tmp_path, settings=DiscoverySettings(split="cat_val"))) == ["b.jpg", "d.jpg"]
    with pytest.raises(NoInputError, match=r"test\.txt"):
        read(tmp_path, settings=DiscoverySettings(split="test"))


def test_several_sets_in_a_folder_must_be_told_apart(tmp_path: Path) -> None:
    voc(tmp_path / "VOC2007", "a", "b")
    voc(tmp_path / "VOC2012", "a", "b")
    with pytest.raises(UsageError, match="several sets"):
        read(tmp_path)


@pytest.mark.parametrize("images", ["images", "", "val2017", "images/val2017"])
@pytest.mark.parametrize("file", ["annotations/instances_val2017.json", "boxes.json"])
def test_coco_is_read_wherever_images_lie(tmp_path: Path, images: str, file: str) -> None:
    document = coco(tmp_path, file, images)
    dataset = read(tmp_path)
    assert names(dataset) == ["a.jpg", "b.jpg"]
    assert dataset.truth[0].boxes == ((1, 2, 11, 12), (0, 0, 40, 5))
    assert dataset.note == read(tmp_path / file).note
    document["annotations"].append({"id": 9, "image_id": 1, "bbox": [3, 3, 2, 0]})
    written(tmp_path / file, document)
    assert "1 boxes without area left out" in read(tmp_path).note


def test_several_json_files_are_told_apart(tmp_path: Path) -> None:
    coco(tmp_path, "annotations/instances_val2017.json")
    coco(tmp_path, "annotations/captions_val2017.json")
    assert len(read(tmp_path).test) == 2
    coco(tmp_path, "annotations/instances_train2017.json")
    with pytest.raises(UsageError, match=r"several JSON files .*instances_train2017\.json"):
        read(tmp_path)
    assert "val2017" in read(tmp_path, settings=DiscoverySettings(split="val2017")).note
    with pytest.raises(NoInputError, match="no boxes in"):
        read(tmp_path, settings=DiscoverySettings(split="test2017"))


@pytest.mark.parametrize("places", [(), ("one", "two"), ("one",)])
def test_one_place_with_boxes_is_needed(tmp_path: Path, places: tuple[str, ...]) -> None:
    for name in ("one", "two"):
        photo(tmp_path / name / "a.jpg")
    with pytest.raises(NoInputError, match="boxes"):
        read(*(tmp_path / name for name in places))


def no_xml(root: Path) -> None:
    (root / "Annotations" / "a.xml").write_text("<annotation><object>")


def no_image(root: Path) -> None:
    (root / "JPEGImages" / "a.jpg").unlink()


def no_annotation(root: Path) -> None:
    (root / "Annotations" / "a.xml").unlink()


def not_on_disk(root: Path) -> None:
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("a\nz\n")


def no_box(root: Path) -> None:
    (root / "Annotations" / "a.xml").write_text("<annotation><object><name>cat</name></object></annotation>")


def no_number(root: Path) -> None:
    xml(root, "a", (1, "many", 5, 5))


def not_a_number(root: Path) -> None:
    xml(root, "a", (1, "nan", 5, 5))


def turned(root: Path) -> None:
    xml(root, "a", (9, 1, 5, 5))


def outside(root: Path) -> None:
    xml(root, "a", (1, 1, 42, 5))


def other_size(root: Path) -> None:
    xml(root, "a", (1, 1, 9, 5), size=(50, 30))


def broken_image(root: Path) -> None:
    (root / "JPEGImages" / "a.jpg").write_bytes(b"no image")


def alone(root: Path) -> None:
    for name in ("b", "c"):
        (root / "JPEGImages" / f"{name}.jpg").unlink()
        (root / "Annotations" / f"{name}.xml").unlink()


MALFORMED: list[tuple[Callable[[Path], None], str]] = [
    (no_xml, r"cannot read .*a\.xml: it is no XML"),
    (no_image, r"cannot use .*a\.xml: it has no image in .*JPEGImages"),
    (no_annotation, r"cannot use .*a\.jpg: it has no XML in .*Annotations"),
    (not_on_disk, r"cannot read .*z\.xml: there is no such file"),
    (no_box, r"cannot read .*a\.xml: an object has no bndbox"),
    (no_number, r"cannot read .*a\.xml: ymin is 'many'"),
    (not_a_number, r"cannot read .*a\.xml: ymin is 'nan'"),
    (turned, r"cannot use .*a\.xml: box 9 1 5 5 is empty"),
    (outside, r"cannot use .*a\.xml: box 1 1 42 5 is not within 40×30 pixels"),
    (other_size, r"cannot use .*a\.jpg: it has 40×30 pixels, and .*a\.xml says 50×30"),
    (broken_image, r"cannot read .*a\.jpg: "),
    (alone, r"cannot use .*: there is one image with boxes"),
]


@pytest.mark.parametrize(("spoil", "message"), MALFORMED, ids=lambda value: getattr(value, "__name__", ""))
def test_malformed_voc_is_named(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    voc(tmp_path, "a", "b", "c")
    spoil(tmp_path)
    with pytest.raises(BadInputError, match=message) as caught:
        read(tmp_path)
    assert caught.value.exit_code == 65
    assert "\n" not in str(caught.value)


BROKEN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda document: document.pop("images"), "no COCO file of boxes: 'images' is missing"),
    (lambda document: document["annotations"][0].pop("bbox"), "'bbox' is missing"),
    (lambda document: document["annotations"][0].update(bbox=[1, 2]), "no COCO file of boxes"),
    (lambda document: document["annotations"][0].update(bbox=[1, 2, math.nan, 3]), "no COCO file of boxes"),
    (lambda document: document["annotations"][0].update(image_id=77), "image 77, which is not listed"),
    (lambda document: document["annotations"][0].update(bbox=[1, 2, -3, 3]), "box 1 2 -2 5 is empty"),
    (lambda document: document["annotations"][0].update(bbox=[1, 2, 50, 3]), "is not within 40×30"),
    (lambda document: document["images"][0].update(width=50), r"a\.jpg: it has 40×30 .*says 50×30"),
    (lambda document: document["images"][0].update(file_name="z.jpg"), r"it has no image z\.jpg"),
    (lambda document: document["annotations"].clear(), "no image has a box"),
]


@pytest.mark.parametrize(("spoil", "message"), BROKEN, ids=range(len(BROKEN)))
def test_malformed_coco_is_named(tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], message: str) -> None:
    document = coco(tmp_path, "boxes.json")
    spoil(document)
    written(tmp_path / "boxes.json", document)
    with pytest.raises(BadInputError, match=message) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_json_that_is_none_is_named(tmp_path: Path) -> None:
    coco(tmp_path, "boxes.json")
    for content in ("{", "[1, 2]", '"text"'):
        (tmp_path / "boxes.json").write_text(content)
        with pytest.raises(BadInputError, match=r"cannot read .*boxes\.json"):
            read(tmp_path)


# Whole evaluations.


@pytest.fixture
def set_with_boxes(pictures: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "VOC2007"
    for path in pictures.iterdir():
        image = Image.open(path)
        photo(folder / "JPEGImages" / f"{path.stem}.jpg", image.size)
        image.save(folder / "JPEGImages" / f"{path.stem}.jpg")
        xml(folder, path.stem, (1, 1, image.width, image.height), size=image.size)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 84])
def test_discovery_is_evaluated_whole(set_with_boxes: Path, weights: Path, tmp_path: Path, size: int | None) -> None:
    settings = EvaluateSettings(image_size=size, workers=0, resamples=100)
    options = {"discovery": {"sweep": True, "sweep_blocks": 2, "sweep_biases": [0.5]}}
    request = EvaluateRequest(
        ModelRequest("dinov2_custom", weights), ["discovery"], [set_with_boxes], settings, options=options
    )
    (task,) = api.evaluate(request, tmp_path / "out").evaluation.tasks
    assert [figure.name for figure in task.figures] == ["CorLoc", "CorLoc, best of 12"]
    usual, best = ({value.side: value.value for value in figure.values} for figure in task.figures)
    assert set(usual) == {"original", "inpainted", "smoothed", "blurred"}
    assert all(best[side] >= usual[side] for side in usual)
    assert all("chosen on the images" in note for (note,) in task.notes.values())


@pytest.mark.slow
def test_a_sweep_is_a_flag(
    set_with_boxes: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(set_with_boxes)
    arguments = ["evaluate", "dinov2_custom", "discovery", "--weights", str(weights), "--data", "."]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--workers", "0", "--resamples", "100", "--sweep", "--format", "json"])
    assert end.value.code == 0
    assert "CorLoc, best of 36" in capsys.readouterr().out
    (set_with_boxes / "Annotations" / "0.xml").write_text("<")
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 65
    assert "0.xml: it is no XML" in capsys.readouterr().err
