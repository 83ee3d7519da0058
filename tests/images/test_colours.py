"""Every mode that a file opens in → RGB, against values that are written out or computed by the formula.

No file of a known format opens as RGBX, RGBa, I;16L, I;16N or HSV: TIFF's RGBX and premultiplied RGB open as RGB and
RGBA.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from sinder_cli.images.decoding import decode

Colours = list[tuple[int, int, int]]

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8  # TIFF's PhotometricInterpretation
PREMULTIPLIED, STRAIGHT = 1, 2  # TIFF's ExtraSamples
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # TIFF's SampleFormat
FOUR = bytes([10, 20, 30, 200, 100, 50, 0, 128, 255, 90, 80, 70])  # four RGB pixels


def tiff(data: bytes, photometric: int, *bits: int, big: bool = False, **tags: tuple[int, ...]) -> bytes:
    """One row of four pixels, uncompressed; big endian if asked for."""
    entries: dict[int, tuple[int, ...]] = {
        256: (4,), 257: (1,), 258: bits, 259: (1,), 262: (photometric,), 273: (8,), 277: (len(bits),), 278: (1,),
        279: (len(data),), 320: tags.get("palette", ()), 338: tags.get("extra", ()),
        339: tags.get("form", (UNSIGNED,)) * len(bits),
    }  # fmt: skip
    order = ">" if big else "<"
    present = sorted((tag, values) for tag, values in entries.items() if values)
    start = 8 + len(data) + len(data) % 2
    behind = start + 2 + 12 * len(present) + 4
    directory, long_values = struct.pack(order + "H", len(present)), b""
    for tag, values in present:
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            packed, long_values = struct.pack(order + "I", behind + len(long_values)), long_values + packed
        directory += struct.pack(order + "HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    header = (b"MM" if big else b"II") + struct.pack(order + "HI", 42, start)
    return header + data.ljust(start - 8, b"\0") + directory + bytes(4) + long_values


def png(data: bytes, depth: int, colour: int, palette: bytes = b"", transparency: bytes = b"") -> bytes:
    """One row of four pixels."""
    header = struct.pack(">IIBBBBB", 4, 1, depth, colour, 0, 0, 0)
    chunks = {b"IHDR": header, b"PLTE": palette, b"tRNS": transparency, b"IDAT": zlib.compress(b"\0" + data)}
    written = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (chunks | {b"IEND": b""}).items()
        if body or kind == b"IEND"
    )
    return b"\x89PNG\r\n\x1a\n" + written


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(mode: str, *colour: int) -> Image.Image:
    return Image.new(mode, (16, 16), colour if len(colour) > 1 else colour[0])


def grey(*values: int) -> Colours:
    return [(value, value, value) for value in values]


def over_white(colour: tuple[int, ...], alpha: int) -> tuple[int, ...]:
    return tuple(round((alpha * part + (255 - alpha) * 255) / 255) for part in colour)


def from_inks(c: int, m: int, y: int, k: int) -> tuple[int, ...]:
    return tuple(round((255 - ink) * (255 - k) / 255) for ink in (c, m, y))


def from_ycbcr(y: int, cb: int, cr: int) -> tuple[float, ...]:
    """JFIF's formula."""
    blue, red = cb - 128, cr - 128
    return (y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue)


def u16(*values: int, big: bool = False) -> bytes:
    return struct.pack(f"{'>' if big else '<'}{len(values)}H", *values)


RGB_FOUR = [tuple(FOUR[at : at + 3]) for at in range(0, 12, 3)]
ALPHAS = (255, 0, 51, 128)
RGBA_FOUR = b"".join(bytes([*colour, alpha]) for colour, alpha in zip(RGB_FOUR, ALPHAS, strict=True))
RGBA_OVER_WHITE = [over_white(colour, alpha) for colour, alpha in zip(RGB_FOUR, ALPHAS, strict=True)]
LA_FOUR = bytes([10, 255, 10, 0, 100, 51, 200, 128])
LA_OVER_WHITE = [over_white((v, v, v), a) for v, a in zip(LA_FOUR[::2], LA_FOUR[1::2], strict=True)]
DEEP = (0, 257, 32896, 65535)
DEEP_RGB = tuple(256 * value + 99 for value in FOUR)  # of which the upper bytes are kept
INKS = ((0, 0, 0, 0), (255, 0, 0, 0), (40, 80, 120, 60), (0, 0, 0, 255))
TIFF_PALETTE = tuple(
    257 * FOUR[3 * index + channel] if index < 4 else 0 for channel in range(3) for index in range(256)
)
BYTES = bytes(range(256))

EXACT = {
    "1, PNG": (png(b"\x50", 1, 0), grey(0, 255, 0, 255)),
    "1, PNG, white is transparent": (png(b"\x40", 1, 0, transparency=b"\0\0"), grey(255, 255, 255, 255)),
    "1, TIFF, black is 0": (tiff(b"\x50", BLACK_IS_ZERO, 1), grey(0, 255, 0, 255)),
    "1, TIFF, white is 0": (tiff(b"\x50", WHITE_IS_ZERO, 1), grey(255, 0, 255, 0)),
    "1, PBM, black is 1": (b"P4 4 1\n\x50", grey(255, 0, 255, 0)),
    "L of 2 bits, PNG": (png(b"\x1b", 2, 0), grey(0, 85, 170, 255)),
    "L of 4 bits, TIFF": (tiff(b"\x01\xef", BLACK_IS_ZERO, 4), grey(0, 17, 238, 255)),
    "L, PNG": (png(FOUR[:4], 8, 0), grey(10, 20, 30, 200)),
    "L, PNG, one grey is transparent": (png(FOUR[:4], 8, 0, transparency=b"\0\x14"), grey(10, 255, 30, 200)),
    "L, TIFF, white is 0": (tiff(FOUR[:4], WHITE_IS_ZERO, 8), grey(245, 235, 225, 55)),
    "L, PGM": (b"P5 4 1 255\n" + FOUR[:4], grey(10, 20, 30, 200)),
    "L, PGM of fewer greys": (b"P5 4 1 5\n\x00\x01\x04\x05", grey(0, 51, 204, 255)),
    "LA, PNG": (png(LA_FOUR, 8, 4), LA_OVER_WHITE),
    "LA, TIFF": (tiff(LA_FOUR, BLACK_IS_ZERO, 8, 8, extra=(STRAIGHT,)), LA_OVER_WHITE),
    "LA of 16 bits, PNG": (png(b"".join(bytes([b, 7]) for b in LA_FOUR), 16, 4), LA_OVER_WHITE),
    "P, PNG": (png(b"\0\1\2\3", 8, 3, palette=FOUR), RGB_FOUR),
    "P of 2 bits, PNG": (png(b"\x1b", 2, 3, palette=FOUR), RGB_FOUR),
    "P, PNG, an alpha for each entry": (
        png(b"\0\1\2\3", 8, 3, palette=FOUR, transparency=bytes(ALPHAS)), RGBA_OVER_WHITE
    ),
    "P, PNG, alphas for some entries": (
        png(b"\0\1\2\3", 8, 3, palette=FOUR, transparency=b"\xff\0"), [RGB_FOUR[0], (255, 255, 255), *RGB_FOUR[2:]]
    ),
    "P, TIFF": (tiff(b"\0\1\2\3", PALETTE, 8, palette=TIFF_PALETTE), RGB_FOUR),
    "PA, TIFF": (
        tiff(b"".join(bytes([i, a]) for i, a in enumerate(ALPHAS)), PALETTE, 8, 8, palette=TIFF_PALETTE,
             extra=(STRAIGHT,)), RGBA_OVER_WHITE
    ),
    "RGB, PNG": (png(FOUR, 8, 2), RGB_FOUR),
    "RGB, PNG, one colour is transparent": (
        png(FOUR, 8, 2, transparency=struct.pack(">HHH", *FOUR[:3])), [(255, 255, 255), *RGB_FOUR[1:]]
    ),
    "RGB of 16 bits, PNG": (png(u16(*DEEP_RGB, big=True), 16, 2), RGB_FOUR),
    "RGB of 16 bits, TIFF": (tiff(u16(*DEEP_RGB), RGB, 16, 16, 16), RGB_FOUR),
    "RGB of 16 bits, big-endian TIFF": (tiff(u16(*DEEP_RGB, big=True), RGB, 16, 16, 16, big=True), RGB_FOUR),
    "RGB, PPM": (b"P6 4 1 255\n" + FOUR, RGB_FOUR),
    "RGBX, TIFF: the fourth is no alpha": (tiff(RGBA_FOUR, RGB, 8, 8, 8, 8, extra=(0,)), RGB_FOUR),
    "RGBA, PNG": (png(RGBA_FOUR, 8, 6), RGBA_OVER_WHITE),
    "RGBA of 16 bits, PNG": (png(b"".join(bytes([b, 7]) for b in RGBA_FOUR), 16, 6), RGBA_OVER_WHITE),
    "RGBA, TIFF": (tiff(RGBA_FOUR, RGB, 8, 8, 8, 8, extra=(STRAIGHT,)), RGBA_OVER_WHITE),
    "CMYK, TIFF": (tiff(bytes(sum(INKS, ())), CMYK, 8, 8, 8, 8), [from_inks(*inks) for inks in INKS]),
    "CMYK of 16 bits, TIFF": (
        tiff(u16(*(257 * ink for ink in sum(INKS, ()))), CMYK, 16, 16, 16, 16), [from_inks(*inks) for inks in INKS]
    ),
    "YCbCr, TIFF, grey": (tiff(bytes([9, 128, 128] * 3 + [250, 128, 128]), YCBCR, 8, 8, 8), grey(9, 9, 9, 250)),
    "I;16, PNG": (png(u16(*DEEP, big=True), 16, 0), grey(0, 1, 128, 255)),
    "I;16, PNG, one grey is transparent": (
        png(u16(*DEEP, big=True), 16, 0, transparency=b"\x01\x01"), grey(0, 255, 128, 255)
    ),
    "I;16, TIFF": (tiff(u16(*DEEP), BLACK_IS_ZERO, 16), grey(0, 1, 128, 255)),
    "I;16B, TIFF": (tiff(u16(*DEEP, big=True), BLACK_IS_ZERO, 16, big=True), grey(0, 1, 128, 255)),
    "I from 16 bits, PGM": (b"P5 4 1 65535\n" + u16(*DEEP, big=True), grey(0, 1, 128, 255)),
    "I from 16 bits with a sign, TIFF": (
        tiff(struct.pack("<4h", -5, 0, 257, 32767), BLACK_IS_ZERO, 16, form=(SIGNED,)), grey(0, 0, 1, 127)
    ),
    "I of 32 bits, TIFF": (
        tiff(struct.pack("<4i", -5, 257, 65535, 2**30), BLACK_IS_ZERO, 32, form=(SIGNED,)), grey(0, 1, 255, 255)
    ),
    "F to 1, TIFF": (
        tiff(struct.pack("<4f", -1, 0, 0.2, 1), BLACK_IS_ZERO, 32, form=(FLOAT,)), grey(0, 0, 51, 255)
    ),
    "F beyond 1, big-endian TIFF": (
        tiff(struct.pack(">4f", 0, 1, 2, 5), BLACK_IS_ZERO, 32, form=(FLOAT,), big=True), grey(0, 51, 102, 255)
    ),
    "F with NaN and infinities, TIFF": (
        tiff(struct.pack("<2f", 4, float("nan")) + struct.pack("<2f", float("inf"), float("-inf")),
             BLACK_IS_ZERO, 32, form=(FLOAT,)), grey(255, 0, 255, 0)
    ),
    "F with a signalling NaN, TIFF": (
        tiff(struct.pack("<I3f", 0x7F800001, 1, 0, 1), BLACK_IS_ZERO, 32, form=(FLOAT,)), grey(0, 255, 0, 255)
    ),
    "F, PFM": (b"Pf\n4 1\n-1.0\n" + struct.pack("<4f", 0, 0.2, 0.4, 1), grey(0, 51, 102, 255)),
}  # fmt: skip

NEAR = {
    "La, TIFF: premultiplied": (
        tiff(bytes([10, 255, 0, 0, 20, 51, 100, 128]), BLACK_IS_ZERO, 8, 8, extra=(PREMULTIPLIED,)),
        grey(10, 255, 20 + 204, 100 + 127), 1,
    ),
    "RGBa, TIFF: premultiplied": (
        tiff(bytes([10, 20, 30, 255, 0, 0, 0, 0, 20, 10, 0, 51, 0, 64, 128, 128]), RGB, 8, 8, 8, 8,
             extra=(PREMULTIPLIED,)),
        [(10, 20, 30), (255, 255, 255), (224, 214, 204), (127, 191, 255)], 1,
    ),
    "YCbCr, TIFF": (
        tiff(bytes([90, 130, 120, 120, 100, 150, 200, 128, 140, 60, 110, 128]), YCBCR, 8, 8, 8),
        [from_ycbcr(90, 130, 120), from_ycbcr(120, 100, 150), from_ycbcr(200, 128, 140), from_ycbcr(60, 110, 128)], 1,
    ),
}  # fmt: skip

FLAT = {
    "L, JPEG": (encoded(flat("L", 77), "JPEG"), (77, 77, 77), 1),
    "YCbCr in a JPEG": (encoded(flat("RGB", 200, 60, 90), "JPEG", quality=100), (200, 60, 90), 2),
    "CMYK, Adobe's JPEG": (encoded(flat("CMYK", 40, 80, 120, 60), "JPEG", quality=100), from_inks(40, 80, 120, 60), 2),
    "P, GIF": (encoded(flat("RGB", 200, 60, 90).quantize(2), "GIF"), (200, 60, 90), 0),
    "P, GIF, transparent": (encoded(flat("RGB", 200, 60, 90).quantize(2), "GIF", transparency=0), (255, 255, 255), 0),
    "P, BMP": (encoded(flat("RGB", 200, 60, 90).quantize(2), "BMP"), (200, 60, 90), 0),
    "RGB, BMP": (encoded(flat("RGB", 200, 60, 90), "BMP"), (200, 60, 90), 0),
    "RGBX, BMP: the fourth is no alpha": (encoded(flat("RGBA", 200, 60, 90, 51), "BMP"), (200, 60, 90), 0),
    "RGB, WebP": (encoded(flat("RGB", 200, 60, 90), "WEBP", lossless=True), (200, 60, 90), 0),
    "RGBA, WebP": (encoded(flat("RGBA", 200, 60, 90, 51), "WEBP", lossless=True), over_white((200, 60, 90), 51), 0),
}


def decoded(content: bytes, folder: Path) -> np.ndarray:
    path = folder / "image"
    path.write_bytes(content)
    image = decode(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", EXACT)
def test_four_pixels_become_these_colours(name: str, tmp_path: Path) -> None:
    content, expected = EXACT[name]
    assert decoded(content, tmp_path).tolist() == [[list(colour) for colour in expected]]


@pytest.mark.parametrize("name", NEAR)
def test_four_pixels_become_nearly_these_colours(name: str, tmp_path: Path) -> None:
    content, expected, tolerance = NEAR[name]
    np.testing.assert_allclose(decoded(content, tmp_path), [np.clip(expected, 0, 255)], atol=tolerance)


@pytest.mark.parametrize("name", FLAT)
def test_a_flat_colour_is_kept(name: str, tmp_path: Path) -> None:
    content, expected, tolerance = FLAT[name]
    found = decoded(content, tmp_path)
    assert found.shape == (16, 16, 3)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=tolerance)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
@pytest.mark.parametrize("alpha", [255, 51])
def test_avif_is_laid_over_white(alpha: int, tmp_path: Path) -> None:
    image = flat("RGB", 200, 60, 90)
    if alpha < 255:
        image.putalpha(alpha)
    found = decoded(encoded(image, "AVIF", quality=100), tmp_path)
    np.testing.assert_allclose(found, np.broadcast_to(over_white((200, 60, 90), alpha), found.shape), atol=3)


@pytest.mark.skipif(not features.check("littlecms2"), reason="Pillow was built without LittleCMS")
def test_lab_is_converted(tmp_path: Path) -> None:
    lab = [(0, 0, 0), (100, 0, 0), (60, 20, -30), (40, -10, 25)]
    data = b"".join(struct.pack("Bbb", 255 * L // 100, a, b) for L, a, b in lab)
    found = decoded(tiff(data, LAB, 8, 8, 8), tmp_path)
    np.testing.assert_allclose(found, [[from_lab(*colour) for colour in lab]], atol=2)


def from_lab(L: float, a: float, b: float) -> list[float]:
    """CIE's formula from L*a*b* to XYZ under D50, and sRGB's matrix, adapted to D50, and gamma (brucelindbloom.com)."""
    y = (L + 16) / 116
    f = np.array([y + a / 500, y, y - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.96422, 1.0, 0.82521)
    to_linear = [[3.13386, -1.61687, -0.49061], [-0.97877, 1.91614, 0.03345], [0.07195, -0.22899, 1.40524]]
    linear = np.clip(to_linear @ xyz, 0, 1)
    return (255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)).tolist()
