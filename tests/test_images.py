"""Image files → tensors, against Pillow used in the plainest way."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from sinder_cli import images
from sinder_cli.errors import BadInputError, NoInputError
from sinder_cli.images import (
    DrawnImages,
    ImageFiles,
    Preprocessing,
    UnreadableImageError,
    centre_crop,
    decode,
    find_images,
    load_in_order,
    require_some,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def astronaut() -> Image.Image:
    return Image.fromarray(skimage.data.astronaut())


@pytest.fixture
def cat() -> Image.Image:
    """Wider than high: 451 × 300."""
    return Image.fromarray(skimage.data.chelsea())


def pixels_of(path: Path) -> np.ndarray:
    image = decode(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_a_photograph_is_decoded_as_it_was_saved(astronaut: Image.Image, tmp_path: Path) -> None:
    for suffix in (".png", ".bmp", ".tif", ".webp"):
        path = tmp_path / f"photo{suffix}"
        astronaut.save(path, lossless=True)
        np.testing.assert_array_equal(pixels_of(path), np.asarray(astronaut))


def test_a_16_bit_png_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    expected = np.round(ramp / 257.0)
    np.testing.assert_array_equal(pixels_of(tmp_path / "deep.png"), np.stack([expected] * 3, axis=-1))


def test_a_float_image_is_scaled_to_its_largest_value(tmp_path: Path) -> None:
    values = np.linspace(-1, 8, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "float.tif")
    np.testing.assert_array_equal(pixels_of(tmp_path / "float.tif")[..., 0], np.round(values.clip(0) * 255 / 8))


def test_a_float_image_within_one_is_not_brightened(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "float.tif")
    assert (pixels_of(tmp_path / "float.tif") == 128).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_rotation_is_applied(orientation: int, tmp_path: Path) -> None:
    upright = np.asarray(Image.fromarray(skimage.data.chelsea()).resize((48, 32)))
    # what a camera stores so that its orientation tag makes it upright again
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1), 7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(pixels_of(tmp_path / "turned.png"), upright)


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[0, 0] = (200, 0, 0, 255)
    rgba[0, 1] = (200, 0, 0, 0)
    rgba[1, 0] = (0, 0, 100, 51)  # a fifth
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    found = pixels_of(tmp_path / "clear.png")
    assert found[0].tolist() == [[200, 0, 0], [255, 255, 255]]
    assert found[1, 0].tolist() == pytest.approx([204, 204, 224], abs=1)


def test_grey_transparency_is_laid_over_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[10, 255], [10, 0]]], dtype=np.uint8), "LA").save(tmp_path / "clear.png")
    assert pixels_of(tmp_path / "clear.png")[0].tolist() == [[10] * 3, [255] * 3]


def test_a_palette_is_looked_up_and_its_transparent_entry_is_white(astronaut: Image.Image, tmp_path: Path) -> None:
    palette = astronaut.quantize(16)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(pixels_of(tmp_path / "palette.png"), np.asarray(palette.convert("RGB")))
    palette.save(tmp_path / "hole.gif", transparency=3)
    hole = np.asarray(palette) == 3
    assert hole.any()
    found = pixels_of(tmp_path / "hole.gif")
    assert (found[hole] == 255).all()
    np.testing.assert_array_equal(found[~hole], np.asarray(palette.convert("RGB"))[~hole])


def test_cmyk_and_greyscale_become_rgb(astronaut: Image.Image, tmp_path: Path) -> None:
    astronaut.convert("CMYK").save(tmp_path / "print.tif")
    np.testing.assert_array_equal(pixels_of(tmp_path / "print.tif"), np.asarray(astronaut))
    camera = skimage.data.camera()
    Image.fromarray(camera).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(pixels_of(tmp_path / "grey.png"), np.stack([camera] * 3, axis=-1))


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    assert (pixels_of(tmp_path / "moving.gif") == (255, 0, 0)).all()


def test_a_truncated_jpeg_is_unreadable(astronaut: Image.Image, tmp_path: Path) -> None:
    whole = io.BytesIO()
    astronaut.save(whole, "JPEG")
    (tmp_path / "half.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(UnreadableImageError, match="truncated"):
        decode(tmp_path / "half.jpg")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_image_is_unreadable(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "odd.png").write_bytes(content)
    with pytest.raises(UnreadableImageError):
        decode(tmp_path / "odd.png")


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match="No such file"):
        decode(tmp_path / "gone.png")


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header announces a size and whose data hold almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("limited", [True, False], ids=["by Pillow", "by us"])
def test_a_decompression_bomb_is_refused_by_its_header(
    limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not limited:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(png_of(60_000, 60_000))
    why = "decompression bomb" if limited else "60000×60000 pixels are too many"
    with pytest.raises(UnreadableImageError, match=why):
        decode(tmp_path / "bomb.png")


def test_an_image_too_narrow_to_be_resized_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert centre_crop(Image.new("RGB", (1, 100)), 64).size == (64, 64)
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 6400 - 1)  # so that a missing guard costs no memory
    with pytest.raises(UnreadableImageError, match="1×100 pixels are too narrow"):
        centre_crop(Image.new("RGB", (1, 100)), 64)


def test_a_format_that_is_not_listed_is_not_decoded(astronaut: Image.Image, tmp_path: Path) -> None:
    astronaut.save(tmp_path / "page.png", "PCX")
    with pytest.raises(UnreadableImageError, match="cannot identify"):
        decode(tmp_path / "page.png")


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


def test_preprocessing_normalizes_channel_by_channel(cat: Image.Image) -> None:
    found = Preprocessing(28, MEAN, STD)(cat)
    crop = np.asarray(centre_crop(cat, 28))
    assert (found.shape, found.dtype, found.is_contiguous()) == ((3, 28, 28), torch.float32, True)
    for channel in range(3):
        expected = (crop[..., channel].astype(np.float64) / 255 - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(found[channel].numpy(), expected, atol=1e-6)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_folders_are_searched_in_sorted_order_for_the_suffixes_of_images(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.png", "notes.txt", "._a.png", "sub/c.webp", "sub/.d.jpeg/e.gif", "a/z.tiff")
    (tmp_path / "folder.png").mkdir()
    found = find_images([str(tmp_path)]).paths
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["a/z.tiff", "a.png", "b.JPG", "sub/.d.jpeg/e.gif", "sub/c.webp"]


def test_a_link_to_a_folder_above_makes_no_loop(tmp_path: Path) -> None:
    touch(tmp_path, "sub/a.png")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    assert len(find_images([str(tmp_path)])) == 1


def test_a_named_file_counts_whatever_its_suffix_and_only_once(tmp_path: Path) -> None:
    touch(tmp_path, "scan.dat", "a.png")
    places = [str(tmp_path / "scan.dat"), str(tmp_path), str(tmp_path / "a.png")]
    assert [path.name for path in find_images(places).paths] == ["scan.dat", "a.png"]


def test_a_dash_reads_a_list_from_standard_input() -> None:
    listed = io.StringIO("two words.png\n\n  \nb.jpg\r\n")
    assert find_images(["-"], listed).paths == (Path("two words.png"), Path("b.jpg"))


def test_a_missing_place_is_no_input(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="there is no such file or folder") as caught:
        find_images([str(tmp_path / "gone")])
    assert caught.value.exit_code == 66


@pytest.mark.parametrize("listed", [None, ""])
def test_nothing_found_is_no_input(listed: str | None, tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    with pytest.raises(NoInputError, match="no images in"):
        find_images([str(tmp_path)] if listed is None else ["-"], io.StringIO(listed or ""))


def test_the_fingerprint_of_files_changes_with_names_sizes_and_order(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    first = ImageFiles((a, b)).fingerprint()
    assert ImageFiles((a, b)).fingerprint() == first
    others = {ImageFiles((b, a)).fingerprint(), ImageFiles((a,)).fingerprint()}
    a.write_bytes(b"x")
    others.add(ImageFiles((a, b)).fingerprint())
    a.unlink()
    others.add(ImageFiles((a, b)).fingerprint())
    assert len(others | {first}) == 5


def test_the_fingerprint_of_drawn_images_changes_with_one_pixel() -> None:
    image = Image.new("RGB", (4, 4))
    changed = image.copy()
    changed.putpixel((1, 2), (0, 0, 1))
    assert DrawnImages((image,), "drawn").fingerprint() != DrawnImages((changed,), "drawn").fingerprint()


def test_images_come_back_in_the_order_asked_for_with_the_unreadable_named(tmp_path: Path) -> None:
    paths = []
    for index in range(12):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (8, 8), (20 * index, 0, 0)).save(path)
        paths.append(path)
    paths[5].write_bytes(b"broken")
    order = [7, 5, 0, 11, 3, 3, 9, 1, 2]
    loaded = list(load_in_order(ImageFiles(tuple(paths)), Preprocessing(8, (0, 0, 0), (1, 1, 1)), order))
    assert [image.index for image in loaded] == order
    for image in loaded:
        assert image.name == str(paths[image.index])
        if image.index == 5:
            assert image.pixels is None
            assert "cannot identify" in image.problem
        else:
            assert image.pixels is not None
            assert image.pixels[0, 0, 0].item() == pytest.approx(20 * image.index / 255)


def test_an_endless_order_is_read_only_a_little_ahead() -> None:
    asked = []

    def endless() -> object:
        while True:
            asked.append(0)
            yield 0

    drawn = DrawnImages((Image.new("RGB", (2, 2)),), "drawn")
    loaded = load_in_order(drawn, Preprocessing(2, (0, 0, 0), (1, 1, 1)), endless())  # type: ignore[arg-type]
    next(loaded)
    assert len(asked) <= 6
    loaded.close()  # type: ignore[attr-defined]


def test_not_one_readable_image_is_bad_input() -> None:
    with pytest.raises(BadInputError, match="all 4 failed") as caught:
        require_some(0, 4)
    assert caught.value.exit_code == 65
    require_some(1, 4)
    require_some(0, 0)
