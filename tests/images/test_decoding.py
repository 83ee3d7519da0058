"""Files → RGB images: what is read, and what is refused."""

from __future__ import annotations

import errno
import io
import os
import resource
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

from sinder_cli.errors import TryAgainError
from sinder_cli.images import decoding
from sinder_cli.images.decoding import LATER_PAGES, UnreadableImageError, decode
from sinder_cli.images.preprocessing import Preprocessing


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


def test_the_transparent_entry_of_a_palette_is_white(astronaut: Image.Image, tmp_path: Path) -> None:
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


def test_a_damaged_header_cannot_ask_for_too_much(astronaut: Image.Image, tmp_path: Path) -> None:
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


TURN, RESOLUTION = 0x0112, 0x011A


def exif_of(*entries: bytes, data: bytes = b"") -> bytes:
    """EXIF of one directory; what does not fit an entry of 12 bytes comes after it, at 14 + 12 × entries."""
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    return head + b"".join(entries) + struct.pack("<I", 0) + data


ODD_EXIF = {
    "one over none, negative": exif_of(
        struct.pack("<HHIHH", TURN, 3, 1, 6, 0), struct.pack("<HHII", RESOLUTION, 10, 1, 38),
        data=struct.pack("<ii", -1, 0),
    ),
    "two orientations": exif_of(struct.pack("<HHIHH", TURN, 3, 2, 6, 6)),
}  # fmt: skip
NO_EXIF = {
    "cut short": b"Exif\0\0II*\0\x08",
    "no directory": b"Exif\0\0" + b"\xff" * 40,
    "an orientation in words": exif_of(struct.pack("<HHI4s", TURN, 2, 4, b"six\0")),
    "an orientation that there is not": exif_of(struct.pack("<HHIHH", TURN, 3, 1, 99, 0)),
}


def saved(image: Image.Image, path: Path, exif: bytes) -> Path:
    """In WebP, EXIF goes in as it is; for JPEG and PNG as well."""
    image.save(path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))
    return path


@pytest.mark.filterwarnings("ignore:Metadata Warning")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("name", ODD_EXIF)
def test_an_odd_tag_costs_neither_pixels_nor_the_turn(name: str, suffix: str, cat: Image.Image, tmp_path: Path) -> None:
    plain, odd = saved(cat, tmp_path / f"plain{suffix}", b""), saved(cat, tmp_path / f"odd{suffix}", ODD_EXIF[name])
    np.testing.assert_array_equal(pixels_of(odd), np.rot90(pixels_of(plain), -1))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("name", NO_EXIF)
def test_exif_that_says_nothing_turns_nothing(name: str, suffix: str, cat: Image.Image, tmp_path: Path) -> None:
    plain, odd = saved(cat, tmp_path / f"plain{suffix}", b""), saved(cat, tmp_path / f"odd{suffix}", NO_EXIF[name])
    np.testing.assert_array_equal(pixels_of(odd), pixels_of(plain))


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum or zlib.crc32(kind + data))


LARGE = zlib.compress(b"x" * 2_000_000)
BAD_CHUNKS = {
    "2 MB of text": chunk(b"zTXt", b"prompt\0\0" + LARGE),
    "2 MB of international text": chunk(b"iTXt", b"prompt\0\1\0\0\0" + LARGE),
    "2 MB of colour profile": chunk(b"iCCP", b"icc\0\0" + LARGE),
    "70 MB of text in parts": b"".join(
        chunk(b"zTXt", b"%d\0\0" % at + zlib.compress(b"x" * 1_000_000)) for at in range(70)
    ),
    "text packed in a way that there is not": chunk(b"zTXt", b"prompt\0\7text"),
    "text with another checksum": chunk(b"tEXt", b"prompt\0text", checksum=1),
    "half a gamma": chunk(b"gAMA", b"\0\1"),
}


@pytest.mark.parametrize("place", ["before the pixels", "after them"])
@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_a_pngs_metadata_costs_no_pixels(name: str, place: str, cat: Image.Image, tmp_path: Path) -> None:
    clear = cat.quantize(32)
    turned = Image.Exif()
    turned[TURN] = 6
    clear.save(tmp_path / "plain.png", transparency=3, exif=turned)
    data = (tmp_path / "plain.png").read_bytes()
    at = data.index(b"IDAT" if place == "before the pixels" else b"IEND") - 4
    (tmp_path / "odd.png").write_bytes(data[:at] + BAD_CHUNKS[name] + data[at:])
    np.testing.assert_array_equal(pixels_of(tmp_path / "odd.png"), pixels_of(tmp_path / "plain.png"))


def test_a_bomb_is_refused_with_bad_metadata_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png_of(60_000, 60_000)
    (tmp_path / "bomb.png").write_bytes(bomb[:33] + BAD_CHUNKS["2 MB of text"] + bomb[33:])
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        decode(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UnreadableImageError, match="60000×60000 pixels are too many"):
        decode(tmp_path / "bomb.png")


def test_a_broken_png_says_what_is_broken(cat: Image.Image, tmp_path: Path) -> None:
    cat.save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[:33] + BAD_CHUNKS["2 MB of text"] + data[33 : len(data) // 2])
    with pytest.raises(UnreadableImageError, match="truncated"):
        decode(tmp_path / "half.png")


@pytest.mark.parametrize("suffix", [".tif", ".gif", ".webp", ".png"])
def test_the_first_of_several_pages_says_so(suffix: str, tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / f"one{suffix}")
    first.save(tmp_path / f"two{suffix}", save_all=True, append_images=[second], lossless=True)
    assert (pixels_of(tmp_path / f"two{suffix}") == (255, 0, 0)).all()
    assert decode(tmp_path / f"two{suffix}").info == {LATER_PAGES: True}
    assert decode(tmp_path / f"one{suffix}").info == {}


def test_a_photograph_with_previews_is_one_page(cat: Image.Image, tmp_path: Path) -> None:
    cat.save(tmp_path / "stereo.jpg", "MPO", save_all=True, append_images=[cat.resize((90, 60))])
    assert decode(tmp_path / "stereo.jpg").info == {}


def test_a_broken_second_frame_costs_nothing(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    data = (tmp_path / "moving.gif").read_bytes()
    for left_out in (1, 5, 20):
        (tmp_path / "cut.gif").write_bytes(data[:-left_out])
        assert (pixels_of(tmp_path / "cut.gif") == (255, 0, 0)).all()


HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(100)
AVIF = b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf" + bytes(100)


def test_heic_and_avif_that_nothing_reads_say_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    for name in ("HEIF", "AVIF"):
        monkeypatch.delitem(Image.OPEN, name, raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    for content, how in ((HEIC, r"pip install 'sinder-cli\[heic\]'"), (AVIF, "pip install --upgrade pillow")):
        (tmp_path / "photo.jpg").write_bytes(content)
        with pytest.raises(UnreadableImageError, match=how):
            decode(tmp_path / "photo.jpg")


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_heic_is_read_upright_with_the_extra(orientation: int, cat: Image.Image, tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    turned = Image.Exif()
    turned[TURN] = orientation
    for name, exif in (("plain", None), ("turned", turned.tobytes())):
        heif.from_pillow(cat).save(tmp_path / f"{name}.heic", quality=95, exif=exif)
    plain, found = pixels_of(tmp_path / "plain.heic"), pixels_of(tmp_path / "turned.heic")
    expected = np.rot90(plain, {1: 0, 3: 2, 6: -1}[orientation])
    assert np.abs(found.astype(int) - expected).mean() < 3  # colours are stored at half the resolution


def jpeg_with(marker: int, data: bytes, image: Image.Image, **options: Any) -> bytes:
    """A JPEG with one more segment at its start."""
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=95, **options)
    content = buffer.getvalue()
    return content[:2] + bytes([0xFF, marker]) + (len(data) + 2).to_bytes(2, "big") + data + content[2:]


@pytest.mark.parametrize(
    ("marker", "data"),
    [
        (0xE2, b"ICC_PROFILE\0"),  # cut short
        (0xED, b"Photoshop 3.0\x008BIM\x04"),
        (0xE0, b"JFIF"),
    ],
)
def test_a_damaged_segment_costs_a_jpeg_no_pixel(marker: int, data: bytes, tmp_path: Path) -> None:
    drawn = Image.linear_gradient("L").resize((40, 24)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "odd.jpg").write_bytes(jpeg_with(marker, data, drawn, exif=exif))
    drawn.save(tmp_path / "plain.jpg", quality=95, exif=exif)
    found, expected = decode(tmp_path / "odd.jpg"), decode(tmp_path / "plain.jpg")
    assert found.size == (24, 40)
    assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("tag", [270, 34665, 34853])
def test_a_pointer_out_of_range_costs_a_tiff_no_pixel(tag: int, tmp_path: Path) -> None:
    drawn = Image.linear_gradient("L").resize((40, 24)).convert("RGB")
    drawn.save(tmp_path / "plain.tif", tiffinfo={270: "a description that is long enough to have an offset"})
    content = bytearray((tmp_path / "plain.tif").read_bytes())
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    places = range(start + 2, start + 2 + 12 * count, 12)
    at = next(place for place in places if struct.unpack_from("<H", content, place)[0] == 270)
    kind, length = (2, 99) if tag == 270 else (4, 1)
    struct.pack_into("<HHII", content, at, tag, kind, length, 0x7FFFFFF0)
    (tmp_path / "odd.tif").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of what it reads first
        found = decode(tmp_path / "odd.tif")
    assert np.array_equal(np.asarray(found), np.asarray(drawn))


def large_jpeg(path: Path, name: str, turned: int | None = None) -> Path:
    """A photograph of 3072 × 2304 pixels with grain, as JPEG; `turned` is its EXIF orientation."""
    photograph = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    pixels = np.asarray(photograph.resize((3072, 2304), Image.Resampling.LANCZOS), dtype=np.float32)
    grain = np.random.default_rng(0).normal(0, 4, (2304, 3072, 1))
    exif = Image.Exif()
    if turned is not None:
        exif[0x0112] = turned
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90, exif=exif)
    return path


@pytest.mark.parametrize("name", ["astronaut.png", "chelsea.png", "rocket.jpg"])
def test_a_reduced_jpeg_gives_the_same_scaled_image(name: str, tmp_path: Path) -> None:
    """Within 1/255 on average, with as few pixels to spare as are allowed."""
    path = large_jpeg(tmp_path / "large.jpg", name)
    whole = decode(path)
    for side, factor in ((98, 8), (115, 8), (230, 4), (576, 2)):
        small = decode(path, side)
        assert (whole.width // factor, whole.height // factor) == small.size
        fit = Preprocessing(side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "short").fit
        assert np.abs(fit(small).astype(float) - fit(whole).astype(float)).mean() < 1


def test_a_jpeg_is_reduced_by_what_divides_it_and_leaves_pixels_to_spare() -> None:
    assert [decoding.reduction((4000, 3000), side) for side in (150, 151, 300, 301, 750, 751)] == [8, 4, 4, 2, 2, 1]
    assert [decoding.reduction(size, 100) for size in ((4000, 3001), (4002, 3002), (4004, 3004))] == [1, 2, 4]


def test_a_reduced_jpeg_is_turned_and_other_formats_are_whole(tmp_path: Path) -> None:
    path = large_jpeg(tmp_path / "large.jpg", "coffee.png", turned=6)
    assert decode(path, 518).size == (1152, 1536)
    assert decode(path, 4000).size == (2304, 3072)
    decode(path).save(tmp_path / "large.png")
    assert decode(tmp_path / "large.png", 126).size == (2304, 3072)
