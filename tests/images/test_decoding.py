"""Files → RGB images: what is read, and what is refused."""

from __future__ import annotations

import errno
import io
import os
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from sinder_cli.errors import TryAgainError
from sinder_cli.images import decoding
from sinder_cli.images.decoding import UnreadableImageError, decode


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


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_rotation_is_applied_once(orientation: int, suffix: str, tmp_path: Path) -> None:
    upright = np.asarray(Image.fromarray(skimage.data.chelsea()).resize((48, 32)))
    # what a camera stores so that its orientation tag makes it upright again
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1), 7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    np.testing.assert_array_equal(pixels_of(path), upright)


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


@pytest.mark.timeout(20)
def test_a_pipe_a_device_and_a_folder_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(UnreadableImageError, match="not a regular file"):
            decode(path)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_memory_that_runs_out_says_nothing_about_an_image(
    error: Exception, astronaut: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise error

    astronaut.save(tmp_path / "good.png")
    monkeypatch.setattr(decoding, "to_rgb", fails)
    with pytest.raises(type(error)):
        decode(tmp_path / "good.png")


def test_too_many_open_files_say_nothing_about_an_image(astronaut: Image.Image, tmp_path: Path) -> None:
    astronaut.save(tmp_path / "good.png")
    decode(tmp_path / "good.png")  # imports what it needs
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(TryAgainError, match="Too many open files; raise ulimit -n, or lower --workers") as caught:
            decode(tmp_path / "good.png")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.exit_code == 75
    assert decode(tmp_path / "good.png").size == astronaut.size


def test_a_name_that_no_file_can_have_is_unreadable() -> None:
    with pytest.raises(UnreadableImageError):
        decode(Path("nul\0.png"))


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
    why = "decompression bomb" if limited else "60000×60000 pixels are too many$"
    with pytest.raises(UnreadableImageError, match=why):
        decode(tmp_path / "bomb.png")


def test_a_damaged_header_cannot_ask_for_more_than_the_file_can_hold(astronaut: Image.Image, tmp_path: Path) -> None:
    """A JPEG decoder makes up for missing data at full size: 900 MB for this one, without a limit."""
    small = io.BytesIO()
    astronaut.resize((90, 72)).save(small, "JPEG")
    damaged = small.getvalue().replace(struct.pack(">HH", 72, 90), struct.pack(">HH", 9000, 8000), 1)
    (tmp_path / "damaged.jpg").write_bytes(damaged)
    with pytest.raises(UnreadableImageError, match="8000×9000 pixels are too many for a file of"):
        decode(tmp_path / "damaged.jpg")


def test_a_large_image_of_one_colour_is_no_damaged_header(tmp_path: Path) -> None:
    for suffix, size in ((".webp", (4096, 4096)), (".png", (4200, 4200)), (".jpg", (4200, 4200))):
        path = tmp_path / f"flat{suffix}"
        Image.new("RGB", size, (9, 9, 9)).save(path, lossless=True)
        assert decode(path).size == size


def test_a_format_that_is_not_listed_is_not_decoded(astronaut: Image.Image, tmp_path: Path) -> None:
    astronaut.save(tmp_path / "page.png", "PCX")
    with pytest.raises(UnreadableImageError, match="cannot identify"):
        decode(tmp_path / "page.png")
