"""Resizing, cropping and normalizing, against Pillow used in the plainest way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sinder_cli.images import preprocessing
from sinder_cli.images.decoding import UnreadableImageError
from sinder_cli.images.preprocessing import Preprocessing, Resize, centre_crop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_an_image_too_narrow_to_be_resized_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert centre_crop(Image.new("RGB", (1, 100)), 64).size == (64, 64)
    monkeypatch.setattr(preprocessing, "MAX_PIXELS", 64 * 6400 - 1)  # so that a missing guard costs no memory
    for resize in ("square", "short"):
        with pytest.raises(UnreadableImageError, match="1×100 pixels are too narrow"):
            Preprocessing(64, MEAN, STD, resize).fit(Image.new("RGB", (1, 100)))


@pytest.mark.parametrize("size", [64, 300, 518])
@pytest.mark.parametrize("turned", [False, True], ids=["wide", "high"])
def test_the_centre_crop_is_pillows_resize_and_crop(cat: Image.Image, size: int, turned: bool) -> None:
    image = cat.transpose(Image.Transpose.ROTATE_90) if turned else cat
    long = round(451 * size / 300)
    start = (long - size) // 2
    resized = image.resize((size, long) if turned else (long, size), Image.Resampling.BICUBIC)
    box = (0, start, size, start + size) if turned else (start, 0, start + size, size)
    np.testing.assert_array_equal(np.asarray(centre_crop(image, size)), np.asarray(resized.crop(box)))


@pytest.mark.parametrize("shape", [(1, 1), (3, 1000), (517, 519), (518, 518), (1036, 519)])
def test_a_centre_crop_has_the_size_asked_for(shape: tuple[int, int]) -> None:
    assert centre_crop(Image.new("RGB", shape), 518).size == (518, 518)


def test_bytes_travel_and_only_normalizing_is_left(cat: Image.Image) -> None:
    preprocess = Preprocessing(28, MEAN, STD)
    pixels = preprocess.fit(cat)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (28, 28, 3))
    assert torch.equal(preprocess.normalize(pixels), preprocess(cat))


def test_square_gives_the_bits_that_it_always_gave(cat: Image.Image) -> None:
    scaled = np.asarray(centre_crop(cat, 64), dtype=np.float32) / 255.0
    expected = (scaled - np.asarray(MEAN, dtype=np.float32)) / np.asarray(STD, dtype=np.float32)
    assert np.array_equal(Preprocessing(64, MEAN, STD)(cat).numpy(), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("turned", [False, True], ids=["wide", "high"])
def test_short_keeps_the_longer_side_in_proportion(cat: Image.Image, turned: bool) -> None:
    image = cat.transpose(Image.Transpose.ROTATE_90) if turned else cat
    long = round(451 * 70 / 300)  # 105: 7 patches of 14 and 7 pixels more
    resized = np.asarray(image.resize((70, long) if turned else (long, 70), Image.Resampling.BICUBIC))
    expected = resized[3:101] if turned else resized[:, 3:101]
    np.testing.assert_array_equal(Preprocessing(70, MEAN, STD, "short", 14).fit(image), expected)


def test_none_crops_part_of_a_patch_and_resizes_nothing(cat: Image.Image) -> None:
    expected = np.asarray(cat)[3:297, 1:449]  # 300 = 21 · 14 + 6, 451 = 32 · 14 + 3
    np.testing.assert_array_equal(Preprocessing(518, MEAN, STD, "none", 14).fit(cat), expected)


@pytest.mark.parametrize("resize", ["square", "short", "none"])
@pytest.mark.parametrize("shape", [(70, 70), (71, 83), (500, 70), (70, 999)])
def test_every_way_gives_whole_patches(resize: Resize, shape: tuple[int, int]) -> None:
    pixels = Preprocessing(84, MEAN, STD, resize, 14).fit(Image.new("RGB", shape))
    assert [side % 14 for side in pixels.shape[:2]] == [0, 0]
    assert min(pixels.shape[:2]) == (70 if resize == "none" else 84)


def test_too_few_patches_are_unreadable_unless_the_image_is_resized() -> None:
    preprocess = Preprocessing(70, MEAN, STD, "none", 14)
    assert preprocess.fit(Image.new("RGB", (70, 70))).shape == (70, 70, 3)
    with pytest.raises(UnreadableImageError, match="300×69 pixels make under 5 × 5 patches of 14"):
        preprocess.fit(Image.new("RGB", (300, 69)))
    assert Preprocessing(70, MEAN, STD, "short", 14).fit(Image.new("RGB", (60, 40))).shape == (70, 98, 3)


def test_preprocessing_normalizes_channel_by_channel(cat: Image.Image) -> None:
    found = Preprocessing(28, MEAN, STD)(cat)
    crop = np.asarray(centre_crop(cat, 28))
    assert (found.shape, found.dtype, found.is_contiguous()) == ((3, 28, 28), torch.float32, True)
    for channel in range(3):
        expected = (crop[..., channel].astype(np.float64) / 255 - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(found[channel].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("resize", ["short", "none"])
@pytest.mark.parametrize("shape", [(700, 700), (710, 3000), (4000, 301), (900, 1411)])
@pytest.mark.parametrize("most", [100, 400, 1601])
def test_an_image_of_too_many_tokens_is_scaled_down(resize: Resize, shape: tuple[int, int], most: int) -> None:
    preprocess = Preprocessing(280, MEAN, STD, resize, 14, most)
    unbounded = Preprocessing(280, MEAN, STD, resize, 14).fit(Image.new("RGB", shape)).shape
    bounded = preprocess.bounded_size(*shape)
    if unbounded[0] * unbounded[1] <= most * 14**2:
        assert bounded is None
        return
    assert bounded is not None
    if min(bounded) < 5 * 14:
        with pytest.raises(UnreadableImageError, match=r"too narrow: scaled down to .* tokens .*; raise --max-tokens"):
            preprocess.fit(Image.new("RGB", shape))
        return
    height, width, _ = preprocess.fit(Image.new("RGB", shape)).shape
    assert (width % 14, height % 14) == (0, 0)
    assert bounded[0] - 14 < width <= bounded[0]
    assert bounded[1] - 14 < height <= bounded[1]
    assert (width // 14) * (height // 14) <= most
    assert bounded[0] * bounded[1] > 0.95 * most * 14**2
    assert bounded[0] / bounded[1] == pytest.approx(shape[0] / shape[1], rel=0.02)


def test_a_bounded_image_is_resized_once_from_its_own_pixels(cat: Image.Image) -> None:
    preprocess = Preprocessing(280, MEAN, STD, "short", 14, 100)  # 451 × 300 → 420.9 × 280 → 171 × 114
    resized = np.asarray(cat.resize((171, 114), Image.Resampling.BICUBIC))
    assert preprocess.bounded_size(*cat.size) == (171, 114)
    np.testing.assert_array_equal(preprocess.fit(cat), resized[1:113, 1:169])


def test_an_image_within_the_bound_keeps_its_bits(cat: Image.Image) -> None:
    for resize in ("short", "none"):
        unbounded = Preprocessing(280, MEAN, STD, resize, 14)
        tokens = unbounded.fit(cat).shape[0] * unbounded.fit(cat).shape[1] // 14**2
        np.testing.assert_array_equal(Preprocessing(280, MEAN, STD, resize, 14, tokens).fit(cat), unbounded.fit(cat))


def test_a_square_has_the_tokens_of_its_size() -> None:
    assert Preprocessing(280, MEAN, STD, "square", 14, 25).bounded_size(300, 9000) is None


@pytest.mark.timeout(20)
def test_a_line_of_pixels_is_refused_but_not_a_strip() -> None:
    preprocess = Preprocessing(280, MEAN, STD, "short", 14, 1600)
    with pytest.raises(UnreadableImageError, match="1×5000 pixels are too narrow"):
        preprocess.fit(Image.new("RGB", (1, 5000)))
    assert preprocess.fit(Image.new("RGB", (1024, 32))).shape == (98, 3164, 3)
