"""Pictures drawn from a seed: their bytes, their statistics, and how they stand beside files."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sinder_cli.images import drawn
from sinder_cli.images.drawn import DrawnPictures
from sinder_cli.images.sources import DrawnImages, ImageFiles, ImageSource, JoinedImages, files_of

SIZE = 128


def drawn_pictures(count: int, size: int, seed: int) -> list[Image.Image]:
    source = DrawnPictures(count, size, seed)
    return [source.load(index) for index in range(count)]


def radial_slope(grey: np.ndarray) -> float:
    """The slope of log amplitude against log frequency, from rings of the two-dimensional spectrum."""
    size = len(grey)
    window = np.hanning(size)  # a border that does not continue on the other side would be a spectrum of its own
    amplitude = np.abs(np.fft.fft2((grey - grey.mean()) * np.outer(window, window)))
    f = np.fft.fftfreq(size) * size
    radius = np.hypot(f[:, None], f)
    edges = np.geomspace(4, size / 2, 12)
    rings = [amplitude[(radius >= low) & (radius < high)].mean() for low, high in pairwise(edges)]
    return float(np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(rings), 1)[0])


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=float)


@pytest.mark.parametrize("size", [2, 15, 70])
def test_pictures_are_rgb_and_of_the_size_asked_for(size: int) -> None:
    pictures = drawn_pictures(4, size, 0)
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (size, size))] * 4


def test_a_picture_depends_on_seed_index_and_size_alone() -> None:
    first = drawn_pictures(4, 32, 5)
    assert [picture.tobytes() for picture in drawn_pictures(6, 32, 5)[:4]] == [picture.tobytes() for picture in first]
    others = (*drawn_pictures(4, 32, 6), *first)
    assert len({picture.tobytes() for picture in others}) == 8


def test_the_pixels_change_with_the_version_of_the_drawing_alone() -> None:
    """Whoever changes these numbers raises `DRAWING_VERSION`: a run that is resumed must not see other pictures."""
    assert drawn.DRAWING_VERSION == 1
    corners = [picture.getpixel((0, 0)) for picture in drawn_pictures(4, 32, 0)]
    assert corners == [(197, 164, 168), (156, 178, 210), (142, 124, 161), (145, 137, 144)]


@pytest.mark.parametrize("seed", range(4))
def test_the_spectrum_of_even_pictures_falls_as_that_of_photographs(seed: int) -> None:
    for picture in drawn_pictures(3, SIZE, seed)[::2]:
        assert -2 < radial_slope(pixels(picture).mean(-1)) < -0.7


def test_the_falloff_is_the_one_that_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    for alpha in (0.5, 1.0, 1.5):
        monkeypatch.setattr(drawn, "FALLOFF", (alpha, alpha))
        fields = drawn._noise(np.random.default_rng(0), 256)
        assert radial_slope(fields[..., 0]) == pytest.approx(-alpha, abs=0.1)
        assert np.allclose(fields.mean((0, 1)), 0)
        assert np.allclose(fields.std((0, 1)), 1)


def test_odd_pictures_are_made_of_areas_of_one_colour() -> None:
    for picture in drawn_pictures(4, SIZE, 0)[1::2]:
        rows = pixels(picture)
        assert (rows[:, 1:] == rows[:, :-1]).all(-1).mean() > 0.5
        assert 50 < len(np.unique(rows.reshape(-1, 3), axis=0)) < SIZE * SIZE / 4


@pytest.mark.parametrize("seed", range(4))
def test_channels_correlate_and_values_use_the_range(seed: int) -> None:
    for picture in drawn_pictures(4, SIZE, seed):
        channels = pixels(picture).reshape(-1, 3)
        correlations = np.corrcoef(channels.T)[np.triu_indices(3, 1)]
        assert 0.2 < correlations.min() < 0.99  # alike, but not grey
        low, high = np.percentile(channels, [1, 99])
        assert high - low > 90
        assert ((channels == 0) | (channels == 255)).mean() < 0.15


def painted_slowly(front: np.ndarray, y: np.ndarray, x: np.ndarray, r: np.ndarray, first: int) -> None:
    """Each empty pixel gets the number of the first disc that covers it."""
    for row, column in np.argwhere(front < 0):
        for disc in range(len(r)):
            if (row - y[disc]) ** 2 + (column - x[disc]) ** 2 <= r[disc] ** 2:
                front[row, column] = first + disc
                break


@pytest.mark.parametrize("seed", range(5))
def test_leaves_are_painted_as_the_slow_painter_does(seed: int) -> None:
    random = np.random.default_rng(seed)
    size, count = 13, 12
    fast = np.full((size, size), -1)
    slow = fast.copy()
    for first in (0, count):  # the second dozen is seen through the holes of the first
        y, x = random.uniform(-6, size + 6, (2, count))
        r = random.uniform(0.2, 6, count)
        drawn._paint_behind(fast, y, x, r, first)
        painted_slowly(slow, y, x, r, first)
        assert (fast == slow).all()
    assert len(np.unique(slow)) > 5


def test_leaves_cover_the_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few leaves at once there is a hole after the first of them; no pixel keeps the number of one."""
    monkeypatch.setattr(drawn, "LEAVES_AT_ONCE", 16)
    fronts = []
    paint = drawn._paint_behind

    def watched(front: np.ndarray, y: np.ndarray, x: np.ndarray, r: np.ndarray, first: int) -> None:
        paint(front, y, x, r, first)
        fronts.append(front.copy())

    monkeypatch.setattr(drawn, "_paint_behind", watched)
    drawn._dead_leaves(np.random.default_rng(0), 40)
    assert all((front < 0).any() for front in fronts[:-1])
    assert (fronts[-1] >= 0).all()
    assert len(fronts) > 2
    for number, (earlier, later) in enumerate(pairwise(fronts), 1):
        assert (later[earlier >= 0] == earlier[earlier >= 0]).all()  # the front stays in front
        new = later[(earlier < 0) & (later >= 0)]
        assert (
            (16 * number <= new) & (new < 16 * (number + 1))
        ).all()  # each disc has a number, so a colour, of its own


def test_radii_follow_the_power_law_and_centres_lie_outside_too(monkeypatch: pytest.MonkeyPatch) -> None:
    radii: list[np.ndarray] = []
    centres: list[np.ndarray] = []
    paint = drawn._paint_behind

    def watched(front: np.ndarray, y: np.ndarray, x: np.ndarray, r: np.ndarray, first: int) -> None:
        radii.append(r)
        centres.append(np.stack([y, x]))
        paint(front, y, x, r, first)

    monkeypatch.setattr(drawn, "_paint_behind", watched)
    drawn._dead_leaves(np.random.default_rng(0), 300)
    for centre in np.concatenate(centres, axis=1):  # a disc that reaches in from the side is as likely as any other
        assert np.histogram(centre, [-100, 0, 300, 400])[0] / len(centre) == pytest.approx([0.2, 0.6, 0.2], abs=0.02)
    r = np.concatenate(radii)
    assert r.min() >= 3
    assert r.max() <= 100
    for bound in (4, 6, 12):  # ∫ r^−3 from a to the bound, against ∫ r^−3 from a to b
        assert (r < bound).mean() == pytest.approx((3**-2 - bound**-2) / (3**-2 - 100**-2), abs=0.02)


def test_the_source_draws_each_picture_when_it_is_loaded() -> None:
    source = pickle.loads(pickle.dumps(DrawnPictures(4, 32, 7)))  # as for another process
    assert len(source) == 4
    assert source.in_memory
    assert source.name(3) == "drawn image 3"
    assert [source.load(index).tobytes() for index in range(4)] == [p.tobytes() for p in drawn_pictures(4, 32, 7)]
    for outside in (-1, 4):
        with pytest.raises(IndexError):
            source.load(outside)


def test_the_fingerprint_of_drawn_pictures_changes_with_each_argument(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = DrawnPictures(4, 32, 7)
    assert first.fingerprint() == DrawnPictures(4, 32, 7).fingerprint()
    others = [DrawnPictures(5, 32, 7), DrawnPictures(4, 33, 7), DrawnPictures(4, 32, 8)]
    fingerprints = {source.fingerprint() for source in (first, *others)}
    monkeypatch.setattr(drawn, "DRAWING_VERSION", 0)
    assert len(fingerprints | {first.fingerprint()}) == 5


def test_joined_images_are_those_of_their_parts_one_after_another(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), (9, 8, 7)).save(path)
    files, none, pictures = ImageFiles((path,)), DrawnImages((), "none"), DrawnPictures(2, 16, 0)
    joined = JoinedImages((files, none, pictures))
    assert len(joined) == 3
    assert [joined.name(index) for index in range(3)] == [str(path), "drawn image 0", "drawn image 1"]
    assert joined.load(0).getpixel((0, 0)) == (9, 8, 7)
    assert joined.load(2).tobytes() == pictures.load(1).tobytes()
    for call in (joined.name, joined.load):
        with pytest.raises(IndexError):
            call(3)
    assert files_of(joined) is files


def test_joined_images_are_in_memory_where_all_parts_are() -> None:
    pictures, files = DrawnPictures(1, 16, 0), ImageFiles(())
    assert JoinedImages((pictures, pictures)).in_memory
    assert not JoinedImages((files, pictures)).in_memory
    assert not JoinedImages((pictures, files)).in_memory


def test_the_fingerprint_of_joined_images_changes_with_parts_and_order() -> None:
    one, other = DrawnPictures(1, 16, 0), DrawnPictures(1, 16, 1)
    several: list[tuple[ImageSource, ...]] = [(one,), (other,), (one, other), (other, one), (one, one)]
    assert len({JoinedImages(parts).fingerprint() for parts in several}) == 5
