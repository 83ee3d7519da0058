"""Task `depth`: losses and errors by hand, a plane that a probe solves, and depth maps as people have them."""

from __future__ import annotations

import json
import math
import sys
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
from sinder_plugins.tasks import enlarging
from sinder_plugins.tasks.depth import (
    FLIPPED,
    PLAIN,
    TASK,
    DepthSettings,
    Head,
    Truth,
    counting,
    errors,
    gradient_loss,
    log_loss,
    schedule,
)
from torch.nn.functional import interpolate

from sinder_cli import BadInputError, ModelRequest, NoInputError, UnavailableError, UsageError, api
from sinder_cli.cli.main import main
from sinder_cli.evaluation.contract import Dataset, Figure, Places, Scoring, SideFeatures, View
from sinder_cli.evaluation.settings import EvaluateSettings
from sinder_cli.evaluation.views import ViewPreprocessing
from sinder_cli.events import Warned
from sinder_cli.images.sources import DrawnImages
from sinder_cli.requests import EvaluateRequest
from sinder_cli.tasks import read_depth

SETTINGS = DepthSettings(scale=1000)
NO_SCALE = DepthSettings()


def random_maps(seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((7, 9), (8, 6))
    return [
        (
            1 + torch.rand(shape, generator=draw),
            1 + torch.rand(shape, generator=draw),
            torch.rand(shape, generator=draw) > 0.3,
        )
        for shape in shapes
    ]


@pytest.mark.parametrize("at_a_time", [1, 300, 2**18])
def test_enlarged_sums_are_those_of_interpolate(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient, for rows that are split as they may be."""
    monkeypatch.setitem(enlarging.AT_A_TIME, "cpu", at_a_time)
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 3, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, 2, generator=draw, dtype=torch.float64)
    large = interpolate(scores[None].permute(0, 3, 1, 2), scale_factor=4, mode="bilinear", align_corners=False)[0]
    expected = torch.einsum("khw,km->hwm", large.relu(), weights)
    given = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    (slope,) = torch.autograd.grad(expected, scores, given)
    found = enlarging.enlarged_sums(scores, weights, 4)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, scores, given)[0], slope)


def test_the_log_loss_is_that_of_a_loop() -> None:
    maps = random_maps()
    g = [
        math.log(predicted[y, x] + 0.001) - math.log(depth[y, x] + 0.001)
        for predicted, depth, valid in maps
        for y in range(valid.shape[0])
        for x in range(valid.shape[1])
        if valid[y, x]
    ]
    mean = sum(g) / len(g)
    variance = sum((each - mean) ** 2 for each in g) / (len(g) - 1)
    assert log_loss(maps).item() == pytest.approx(math.sqrt(variance + 0.15 * mean**2), rel=1e-5)
    assert log_loss(maps, warming=True).item() == pytest.approx(math.sqrt(0.15) * abs(mean), rel=1e-4)


def test_the_gradient_loss_is_that_of_a_loop() -> None:
    maps = random_maps()
    total = 0.0
    for stride in (1, 2, 4, 6):
        changes, count = 0.0, 0
        for whole in maps:
            predicted, depth, valid = (each[::stride, ::stride].tolist() for each in whole)
            rows, columns = len(valid), len(valid[0])
            for y in range(rows):
                for x in range(columns):
                    if not valid[y][x]:
                        continue
                    count += 1
                    here = math.log(predicted[y][x] + 0.001) - math.log(depth[y][x] + 0.001)
                    for down, right in ((2, 0), (0, 2)):
                        to_y, to_x = y + down, x + right
                        if to_y < rows and to_x < columns and valid[to_y][to_x]:
                            there = math.log(predicted[to_y][to_x] + 0.001) - math.log(depth[to_y][to_x] + 0.001)
                            changes += abs(here - there)
        total += changes / count
    assert gradient_loss(maps).item() == pytest.approx(total, rel=1e-4)


def test_losses_ignore_what_is_not_valid() -> None:
    maps = random_maps()
    broken = [(p, torch.where(valid, depth, torch.nan), valid) for p, depth, valid in maps]
    assert gradient_loss(broken).item() == pytest.approx(gradient_loss(maps).item())
    assert log_loss(broken).item() == pytest.approx(log_loss(maps).item())


def test_losses_have_slopes_at_their_minimum() -> None:
    depth = torch.full((8, 8), 2.0)
    found = depth.clone().requires_grad_()
    maps = [(found, depth, torch.ones(8, 8, dtype=torch.bool))]
    (log_loss(maps) + gradient_loss(maps)).backward()
    assert found.grad is not None
    assert bool(found.grad.isfinite().all())


def test_errors_by_hand() -> None:
    truth = torch.tensor([[1.0, 2.0, 4.0, 9.0]])
    found = torch.tensor([[1.2, 2.0, 2.0, 1.0]])
    rmse, relative, near = errors(found, truth, torch.tensor([[True, True, True, False]]))
    assert rmse == pytest.approx(math.sqrt((0.04 + 0 + 4) / 3))
    assert relative == pytest.approx((0.2 + 0 + 0.5) / 3)
    assert near == pytest.approx(2 / 3)
    assert all(math.isnan(value) for value in errors(found, truth, torch.zeros(1, 4, dtype=torch.bool)))


@pytest.mark.parametrize("has_cls", [True, False])
def test_scores_are_upsampled_as_features_would_be(has_cls: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    patches, cls = torch.randn(3, 4, 6, generator=draw), torch.randn(6, generator=draw)
    head = Head.drawn(6, has_cls, NO_SCALE, 0, "cpu")
    both = torch.cat([patches, cls.expand(3, 4, 6)], dim=2) if has_cls else patches
    large = interpolate(both.permute(2, 0, 1)[None], scale_factor=4, mode="bilinear", align_corners=False)
    weight = torch.cat([head.weight, head.cls_weight], dim=1) if head.cls_weight is not None else head.weight
    scores = torch.einsum("nhw,kn->khw", large[0], weight) + head.bias[:, None, None]
    weights = scores.relu() + 0.1
    bins = torch.linspace(0.001, 10, 256)
    expected = (weights / weights.sum(dim=0) * bins[:, None, None]).sum(dim=0)
    torch.testing.assert_close(head.depth(patches, cls if has_cls else None, (12, 16)), expected, atol=1e-4, rtol=1e-4)


def test_the_rate_warms_up_and_ends_near_zero() -> None:
    rates = [schedule(step, 300) for step in range(300)]
    assert rates[0] == pytest.approx(0.001)
    assert max(rates) == rates[100] == pytest.approx(0.75)
    assert rates[99] < rates[100] > rates[101]
    assert rates[299] < 1e-3
    assert schedule(0, 1) == 1


def columns(count: int) -> torch.Tensor:
    """Patches that say in which column they are, `[6, 6, 12]`."""
    return torch.eye(12)[:6].expand(count, 6, 6, 12).clone()


def saved(folder: Path, depth: np.ndarray[Any, Any], count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index}.npy" for index in range(count)]
    for path in paths:
        np.save(path, depth)
    return paths


def probe(
    features: torch.Tensor, cls: torch.Tensor, paths: list[Path], settings: DepthSettings, has_cls: bool = True
) -> Scoring:
    views = {PLAIN: KeptFeatures({"patches": list(features), "cls": list(cls)})}
    if settings.flip:
        views[FLIPPED] = KeptFeatures({"patches": [each.flip(1) for each in features], "cls": list(cls)})
    side = SideFeatures(views, views)
    source = DrawnImages((None,) * len(paths), "drawn")  # type: ignore[arg-type]  # no image is decoded
    truth = [Truth(path, settings) for path in paths]
    return Scoring(side, Dataset(source, truth, source, truth), settings, side, has_cls=has_cls)


def value(figure: Figure) -> float:
    return float(figure.value(figure.statistics.sum(dim=0)))


@pytest.mark.parametrize("has_cls", [True, False])
def test_a_plane_is_solved_by_the_probe(tmp_path: Path, has_cls: bool) -> None:
    plane = np.broadcast_to(np.linspace(2, 6, 24, dtype=np.float32), (24, 24)).copy()
    plane[:3] = 0
    plane[3, 3] = np.nan
    settings = DepthSettings(steps=200, rate=0.04, batch=2)
    scoring = probe(columns(3), torch.zeros(3, 12), saved(tmp_path, plane, 3), settings, has_cls)
    scores = TASK.score(scoring)
    rmse, relative, near = map(value, scores.figures)
    assert rmse < 0.1
    assert relative < 0.02
    assert near > 0.999
    assert [figure.better for figure in scores.figures] == ["lower", "lower", "higher"]
    assert bool(scores.notes) is not has_cls
    assert scores.picture is not None
    assert TASK.truth is not None
    found, true = scores.picture(0), TASK.truth(scoring.dataset, 0)
    assert found.shape == true.shape == (24, 24, 3)
    assert not true[:3].any()
    assert np.abs(found[4:].astype(int) - true[4:]).mean() < 10


def test_the_same_seed_trains_the_same_probe(tmp_path: Path) -> None:
    depth = np.full((24, 24), 3, np.float32)
    scoring = probe(columns(3), torch.zeros(3, 12), saved(tmp_path, depth, 3), DepthSettings(steps=5))
    first, again, other = (TASK.score(replace(scoring, seed=seed)).figures[0].statistics for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_features_that_are_not_finite_are_no_disaster(tmp_path: Path) -> None:
    features = columns(2)
    features[0, 0, 0] = math.nan
    depth = np.full((24, 24), 3, np.float32)
    scoring = probe(features, torch.zeros(2, 12), saved(tmp_path, depth, 2), DepthSettings(steps=5, flip=False))
    assert all(math.isfinite(value(figure)) for figure in TASK.score(scoring).figures)


def test_a_flipped_view_is_the_mirrored_image() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8))
    plain, flipped = (
        ViewPreprocessing(30, (0, 0, 0), (1, 1, 1), patch=4, view=View((), 30, flip=flip)).fit(image)
        for flip in (False, True)
    )
    assert np.array_equal(flipped, plain[:, ::-1])


def test_only_a_crop_of_nyud_counts() -> None:
    depth = np.full((480, 640), 2, np.float32)
    depth[100, 100:103] = (0, math.nan, 11)
    mask = counting(Path("sync_depth_00001.png"), depth, SETTINGS)
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (45, 471, 41, 601)
    assert mask.sum() == 426 * 560 - 3
    assert counting(Path("other.png"), depth, SETTINGS).sum() == 480 * 640 - 3
    garg = counting(Path("other.png"), np.ones((375, 1242), np.float32), DepthSettings(crop="garg"))
    rows, columns = np.nonzero(garg)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (153, 371, 44, 1197)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_depth must be below"):
        DepthSettings(min_depth=10, max_depth=10)


# Data as people have them.

WIDTH, HEIGHT = 12, 10


def photo(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(path)
    return path


def map_of(path: Path, depth: float = 2.0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full(size, depth, np.float32)
    if path.suffix == ".png":
        Image.fromarray((values * 1000).astype(np.uint16)).save(path)
    elif path.suffix == ".npy":
        np.save(path, values)
    else:
        import OpenEXR

        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        OpenEXR.File(header, {"Z": values}).write(str(path))
    return path


def nyu(scene: Path, *numbers: int) -> None:
    for number in numbers:
        photo(scene / f"rgb_{number:05}.jpg")
        map_of(scene / f"sync_depth_{number:05}.png")


def folders(root: Path, *names: str, suffix: str = ".png") -> None:
    for name in names:
        photo(root / "images" / f"{name}.jpg")
        map_of(root / "depth" / f"{name}{suffix}")


def read(*data: Path, settings: DepthSettings = SETTINGS, train: tuple[Path, ...] = (), seed: int = 0) -> Dataset:
    return TASK.read(Places(tuple(map(str, data)), tuple(map(str, train)), seed), settings)


def names(dataset: Dataset) -> tuple[list[str], list[str]]:
    splits = (dataset.train, dataset.train_truth), (dataset.test, dataset.truth)
    found = []
    for source, truths in splits:
        assert source is not None
        assert len(source) == len(truths)
        found.append([f"{Path(source.name(at)).stem}/{truth.path.name}" for at, truth in enumerate(truths)])
    return found[0], found[1]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("nyu_depth_v2/sync", "nyu_depth_v2/official_splits/test"),
        ("official_splits/train", "official_splits/test"),
    ],
)
def test_nyud_is_read_as_bts_lays_it_out(tmp_path: Path, train: str, test: str) -> None:
    nyu(tmp_path / train / "kitchen", 0, 1)
    nyu(tmp_path / test / "bathroom", 45)
    expected = ["rgb_00000/sync_depth_00000.png", "rgb_00001/sync_depth_00001.png"], ["rgb_00045/sync_depth_00045.png"]
    assert names(read(tmp_path)) == expected


def test_nyud_is_read_by_its_lists(tmp_path: Path) -> None:
    nyu(tmp_path / "kitchen", 0, 1)
    nyu(tmp_path / "bathroom", 2)
    line = "/{0}/rgb_0000{1}.jpg /{0}/sync_depth_0000{1}.png 518.8579\n"
    none = "/kitchen/rgb_00001.jpg None 518.8579\n"
    (tmp_path / "nyu_train.txt").write_text(line.format("kitchen", 0) + none)
    (tmp_path / "nyu_test.txt").write_text(line.format("bathroom", 2))
    assert names(read(tmp_path)) == (["rgb_00000/sync_depth_00000.png"], ["rgb_00002/sync_depth_00002.png"])
    (tmp_path / "kitchen" / "sync_depth_00000.png").unlink()
    with pytest.raises(BadInputError, match=r"sync_depth_00000.png: .*nyu_train.txt names it"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".npy", ".exr"])
def test_two_folders_are_split_by_the_seed(tmp_path: Path, suffix: str) -> None:
    folders(tmp_path, *"abcdef", suffix=suffix)
    settings = DepthSettings(scale=1000 if suffix == ".png" else None, train_share=0.5)
    train, test = names(read(tmp_path, settings=settings))
    assert sorted(train + test) == [f"{name}/{name}{suffix}" for name in "abcdef"]
    assert len(train) == len(test) == 3
    assert len({tuple(names(read(tmp_path, settings=settings, seed=seed))[0]) for seed in range(4)}) > 1


@pytest.mark.parametrize("inside", [True, False])
def test_two_folders_have_splits_inside_or_outside(tmp_path: Path, inside: bool) -> None:
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        images, depth = (f"{kind}/{split}" if inside else f"{split}/{kind}" for kind in ("images", "depth"))
        photo(tmp_path / images / f"{name}.png")
        map_of(tmp_path / depth / f"{name}.png")
    assert names(read(tmp_path)) == (["a/a.png", "b/b.png"], ["c/c.png"])


def test_folders_to_train_on_can_be_named(tmp_path: Path) -> None:
    folders(tmp_path / "one", "a")
    nyu(tmp_path / "two", 7)
    dataset = read(tmp_path / "one", train=(tmp_path / "two",))
    assert names(dataset) == (["rgb_00007/sync_depth_00007.png"], ["a/a.png"])


@pytest.mark.parametrize("suffix", [".png", ".npy", ".exr"])
def test_every_format_gives_metres(tmp_path: Path, suffix: str) -> None:
    path = map_of(tmp_path / f"a{suffix}", 1.5)
    depth = read_depth(path, 1000 if suffix == ".png" else None)
    assert depth.dtype == np.float32
    assert depth.shape == (HEIGHT, WIDTH)
    assert np.allclose(depth, 1.5)
    assert np.allclose(read_depth(path, 500), 3 if suffix == ".png" else 0.003)


def test_an_image_is_compared_as_its_exif_turns_it(tmp_path: Path) -> None:
    folders(tmp_path, "a", "b", "c")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "images" / "a.jpg", exif=exif)
    assert len(read(tmp_path).test) == 2


@pytest.mark.parametrize(("most", "warned"), [(10.0, False), (1.5, True)])
def test_depth_beyond_the_range_is_not_left_out_in_silence(tmp_path: Path, most: float, warned: bool) -> None:
    folders(tmp_path, "a", "b", "c")
    for path in (tmp_path / "depth").iterdir():
        with Image.open(path) as file:
            values = np.asarray(file).copy()
        values[: len(values) // 2] //= 2  # 1 m above, 2 m below
        Image.fromarray(values).save(path)
    heard: list[Any] = []
    settings = SETTINGS.model_copy(update={"max_depth": most})
    TASK.read(Places((str(tmp_path),), (), 0, heard.append), settings)
    words = [event.text for event in heard if isinstance(event, Warned)]
    assert len(words) == warned
    assert all("% of the pixels with depth lie outside 0.001 to 1.5 m" in text for text in words)


@pytest.mark.parametrize("count", [3, 4, 7])
def test_two_images_at_least_are_left_to_test(tmp_path: Path, count: int) -> None:
    folders(tmp_path, *"abcdefg"[:count])
    found = read(tmp_path)
    assert found.train is not None
    assert (len(found.test) >= 2, len(found.test) + len(found.train)) == (True, count)


def broken_png(root: Path) -> None:
    (root / "depth" / "a.png").write_bytes(b"no image")


def cut_npy(root: Path) -> None:
    (root / "depth" / "a.png").unlink()
    (root / "depth" / "a.npy").write_bytes(b"\x93NUMPY")


def bad_exr(root: Path) -> None:
    (root / "depth" / "a.png").unlink()
    (root / "depth" / "a.exr").write_bytes(b"v/1\x01" + bytes(60))


def colour(root: Path) -> None:
    photo(root / "depth" / "a.png")


def cube(root: Path) -> None:
    (root / "depth" / "a.png").unlink()
    np.save(root / "depth" / "a.npy", np.ones((HEIGHT, WIDTH, 3), np.float32))


def smaller(root: Path) -> None:
    map_of(root / "depth" / "a.png", size=(5, 5))


def empty(root: Path) -> None:
    map_of(root / "depth" / "a.png", 0)


def too_far(root: Path) -> None:
    map_of(root / "depth" / "a.png", 60)


def no_depth(root: Path) -> None:
    (root / "depth" / "a.png").unlink()


def no_image(root: Path) -> None:
    (root / "images" / "a.jpg").unlink()


def twice(root: Path) -> None:
    map_of(root / "depth" / "a.npy")


def alone(root: Path) -> None:
    for name in "bc":
        (root / "images" / f"{name}.jpg").unlink()
        (root / "depth" / f"{name}.png").unlink()


def broken_image(root: Path) -> None:
    (root / "images" / "a.jpg").write_bytes(b"no image")


MALFORMED: list[tuple[Callable[[Path], None], str]] = [
    (broken_png, r"cannot read .*depth/a\.png: cannot identify"),
    (cut_npy, r"cannot read .*depth/a\.npy: "),
    (bad_exr, r"cannot read .*depth/a\.exr: "),
    (colour, r"cannot use .*depth/a\.png: it is RGB; give a PNG of one channel"),
    (cube, r"cannot use .*depth/a\.npy: it is float32 of shape \(10, 12, 3\)"),
    (smaller, r"cannot use .*depth/a\.png: it has 5×5 pixels, and .*images/a\.jpg has 12×10"),
    (empty, r"cannot use .*depth/a\.png: no pixel has a depth within the range; check the scale"),
    (too_far, r"cannot use .*depth/a\.png: no pixel has a depth within the range; it has 60 to 60"),
    (no_depth, r"cannot use .*images/a\.jpg: it has no depth in .*depth"),
    (no_image, r"cannot use .*depth/a\.png: it has no image in .*images"),
    (twice, r"cannot use .*depth/a\.png: a\.npy has the same name; remove or rename one"),
    (alone, r"cannot split .*: it has .*images/a\.jpg alone; give 3 images or more"),
    (broken_image, r"cannot read .*images/a\.jpg: "),
]


@pytest.mark.parametrize(("spoil", "message"), MALFORMED, ids=lambda value: getattr(value, "__name__", ""))
def test_malformed_data_is_named(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    folders(tmp_path, *"abc")
    spoil(tmp_path)
    with pytest.raises(BadInputError, match=message) as caught:
        read(tmp_path)
    assert caught.value.exit_code == 65
    assert "\n" not in str(caught.value)


def test_a_missing_partner_is_named_in_nyud(tmp_path: Path) -> None:
    nyu(tmp_path / "train" / "kitchen", 0, 1)
    nyu(tmp_path / "test" / "kitchen", 2)
    (tmp_path / "train" / "kitchen" / "sync_depth_00001.png").unlink()
    with pytest.raises(BadInputError, match=r"rgb_00001\.jpg: it has no depth"):
        read(tmp_path)
    (tmp_path / "train" / "kitchen" / "rgb_00001.jpg").unlink()
    map_of(tmp_path / "train" / "kitchen" / "sync_depth_00009.png")
    with pytest.raises(BadInputError, match=r"sync_depth_00009\.png: it has no image"):
        read(tmp_path)


def test_integers_need_a_scale(tmp_path: Path) -> None:
    folders(tmp_path, "a", "b", "c")
    with pytest.raises(UsageError, match=r"no scale for .*depth/.\.png: .*depth\.scale=1000") as caught:
        read(tmp_path, settings=NO_SCALE)
    assert caught.value.exit_code == 2


def test_exr_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, "a", "b", "c", suffix=".exr")
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(UnavailableError, match=r"sinder-cli\[evaluate\]") as caught:
        read(tmp_path)
    assert caught.value.exit_code == 69


@pytest.mark.parametrize("place", [(), ("one", "two"), ("nothing",)])
def test_one_folder_is_needed(tmp_path: Path, place: tuple[str, ...]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with pytest.raises(NoInputError, match="cannot read depth from"):
        read(*(tmp_path / name for name in place))


def test_a_folder_without_depth_says_what_was_looked_for(tmp_path: Path) -> None:
    photo(tmp_path / "holiday.jpg")
    with pytest.raises(NoInputError, match=r"images/ and depth/ .*sync_depth_00000\.png"):
        read(tmp_path)


# Whole evaluations.


def crops(folder: Path, count: int, side: int) -> None:
    """Crops of scikit-image's stereo pair, with depth in metres from its disparity."""
    data = pytest.importorskip("skimage.data")
    try:
        left, _, disparity = data.stereo_motorcycle()
    except Exception as error:  # no network, or no pooch
        pytest.skip(f"stereo_motorcycle cannot be had: {error}")
    depth = 994.978 * 193.001 / (disparity + 31.086) / 1000  # of its calibration, as scikit-image documents it
    draw = np.random.default_rng(0)
    for index in range(count):
        top, edge = (int(draw.integers(0, length - side)) for length in depth.shape)
        there = slice(top, top + side), slice(edge, edge + side)
        for kind in ("images", "depth"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(left[there]).save(folder / "images" / f"{index}.png")
        np.save(folder / "depth" / f"{index}.npy", np.where(np.isfinite(depth[there]), depth[there], 0).astype("f4"))


@pytest.mark.slow
def test_real_depth_is_learnt(tmp_path: Path, weights: Path) -> None:
    crops(tmp_path / "data", 8, 112)
    settings = EvaluateSettings(image_size=112, workers=0, resamples=100, no_placebos=True)
    request = EvaluateRequest(ModelRequest("dinov2_custom", weights), ["depth"], [tmp_path / "data"], settings)
    values = []
    for steps in (1, 60):
        options = {"depth": {"steps": steps, "rate": 0.01, "max_depth": 20}}
        result = api.evaluate(replace(request, options=options, features=tmp_path / "features"))
        values.append({figure.name: figure.values[0].value for figure in result.evaluation.tasks[0].figures})
    untrained, trained = values
    assert trained["RMSE"] < 0.7 * untrained["RMSE"]
    assert trained["δ₁"] > untrained["δ₁"]


def ended(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


@pytest.mark.slow
def test_depth_is_evaluated_whole(
    tmp_path: Path, weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in pictures.iterdir():
        image = Image.open(path)
        photo(tmp_path / "data" / "images" / path.name, image.size)
        image.save(tmp_path / "data" / "images" / path.name)
        map_of(tmp_path / "data" / "depth" / path.name, 3, (image.height, image.width))
    arguments = ["evaluate", "dinov2_custom", "depth", "--weights", str(weights), "--data", str(tmp_path / "data")]
    options = [
        "--image-size",
        "84",
        "--workers",
        "0",
        "--resamples",
        "100",
        "--set",
        "depth.steps=3",
        "--set",
        "depth.train_share=0.6",
    ]
    assert ended([*arguments, *options, "--set", "depth.scale=1000", "--format", "json"]) == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    assert [figure["name"] for figure in task["figures"]] == ["RMSE", "AbsRel", "δ₁"]
    assert (task["images"], task["trained_on"]) == (2, 3)
    assert ended([*arguments, *options]) == 2
    map_of(tmp_path / "data" / "depth" / "0.png", 0, (84, 90))
    assert ended([*arguments, *options, "--set", "depth.scale=1000"]) == 65
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "depth/0.png" in error
