"""Ten thousand damaged image files: each is decoded or refused, and nothing else happens."""

from __future__ import annotations

import io
import random
import resource
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import tifffile
from PIL import Image, features

from sinder_cli.images.decoding import UnreadableImageError, decode
from sinder_cli.images.preprocessing import Preprocessing

CASES = 10_000
EXTREMES = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
MOST_SECONDS, MOST_BYTES = 10, 10**9  # for one file of 30 kB at most
HEADER = 64  # bytes in which most formats keep their sizes


def valid_files() -> dict[str, bytes]:
    """A small file of every format and of the ways in which it is commonly stored."""
    photo = Image.fromarray(skimage.data.chelsea()).resize((90, 72))
    clear = photo.copy()
    clear.putalpha(Image.linear_gradient("L").resize(photo.size))
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    turned[0x010F] = "camera"
    palette = photo.quantize(32)
    frames = [palette, palette.rotate(90), palette.rotate(180)]
    stored: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "plain.jpeg": (photo, {}),
        "progressive.jpeg": (photo, {"progressive": True, "exif": turned}),
        "inks.jpeg": (photo.convert("CMYK"), {}),
        "two.mpo": (photo, {"save_all": True, "append_images": [photo.rotate(9)]}),
        "plain.png": (photo, {}),
        "turned.png": (photo.convert("L"), {"exif": turned}),
        "clear.png": (clear, {}),
        "deep.png": (deep, {}),
        "palette.png": (palette, {"transparency": bytes(range(0, 256, 8))}),
        "moving.png": (photo, {"save_all": True, "append_images": [photo.rotate(9)]}),
        "bits.png": (photo.convert("1"), {}),
        "lossy.webp": (photo, {"exif": turned}),
        "lossless.webp": (clear, {"lossless": True}),
        "moving.webp": (photo, {"save_all": True, "append_images": [photo.rotate(9)]}),
        "raw.tiff": (photo, {}),
        "lzw.tiff": (photo, {"compression": "tiff_lzw"}),
        "deflate.tiff": (deep, {"compression": "tiff_adobe_deflate"}),
        "jpeg.tiff": (photo, {"compression": "jpeg"}),
        "fax.tiff": (photo.convert("1"), {"compression": "group4"}),
        "packbits.tiff": (palette, {"compression": "packbits"}),
        "float.tiff": (photo.convert("F"), {}),
        "lab.tiff": (photo.convert("LAB"), {}),
        "plain.bmp": (photo, {}),
        "palette.bmp": (palette, {}),
        "still.gif": (palette, {"transparency": 3}),
        "moving.gif": (palette, {"save_all": True, "append_images": frames}),
        "plain.ppm": (photo, {}),
        "deep.ppm": (deep.convert("I"), {}),
        "bits.ppm": (photo.convert("1"), {}),
    }
    if features.check("avif"):
        stored |= {"lossy.avif": (photo, {"exif": turned}), "clear.avif": (clear, {})}
    files = {}
    for name, (image, options) in stored.items():
        buffer = io.BytesIO()
        image.save(buffer, name.split(".")[1].upper(), **options)
        files[name] = buffer.getvalue()
    tiles = io.BytesIO()
    tifffile.imwrite(tiles, np.asarray(photo), tile=(32, 32), compression="zlib", photometric="rgb")
    return files | {
        "tiled.tiff": tiles.getvalue(),
        "interlaced.png": interlaced_png(np.asarray(photo)),
        "runs.bmp": run_length_bmp(np.asarray(palette)),
        "text.ppm": b"P3 10 8 255\n" + b" ".join(b"%d" % (3 * n % 256) for n in range(240)),
    }


def interlaced_png(pixels: np.ndarray) -> bytes:
    """RGB in Adam7, which Pillow reads and does not write."""
    passes = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
    parts = (pixels[top::down, left::right] for top, down, left, right in passes)
    rows = b"".join(b"\0" + row.tobytes() for part in parts for row in part)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def run_length_bmp(indices: np.ndarray) -> bytes:
    """Palette indices as runs of one pixel, which Pillow reads and does not write."""
    height, width = indices.shape
    runs = b"".join(b"".join(b"\1%c" % index for index in row) + b"\0\0" for row in indices[::-1]) + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    start = 14 + len(header) + 1024
    palette = bytes(range(256)) * 4
    return struct.pack("<2sIHHI", b"BM", start + len(runs), 0, 0, start) + header + palette + runs


def flip(data: bytearray, draw: random.Random, _: list[bytes]) -> None:
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def scribble(data: bytearray, draw: random.Random, _: list[bytes]) -> None:
    for _ in range(draw.choice((1, 2, 8))):
        data[draw.randrange(len(data))] = draw.randrange(256)


def truncate(data: bytearray, draw: random.Random, _: list[bytes]) -> None:
    del data[draw.randrange(len(data)) :]


def insert(data: bytearray, draw: random.Random, _: list[bytes]) -> None:
    at = draw.randrange(len(data))
    data[at:at] = draw.randbytes(draw.choice((1, 2, 4, 100)))


def cut(data: bytearray, draw: random.Random, _: list[bytes]) -> None:
    at = draw.randrange(len(data))
    del data[at : at + draw.choice((1, 2, 4, 100))]


def set_field(data: bytearray, draw: random.Random, _: list[bytes]) -> None:
    """An extreme number over 1, 2 or 4 bytes of the first, or of the last, where TIFF may keep its tags."""
    for _ in range(draw.choice((1, 1, 2))):
        width = draw.choice((1, 2, 4))
        at = draw.randrange(min(HEADER, len(data) - width))
        at = draw.choice((at, at, len(data) - width - at))
        value = draw.choice(EXTREMES) & (256**width - 1)
        data[at : at + width] = value.to_bytes(width, draw.choice(("little", "big")))


def splice(data: bytearray, draw: random.Random, others: list[bytes]) -> None:
    other = draw.choice(others)
    start = draw.randrange(len(other))
    piece = other[start : start + draw.choice((8, 100, len(other)))]
    at = draw.randrange(len(data))
    data[at : at + draw.choice((0, len(piece)))] = piece


Mutation = Callable[[bytearray, random.Random, list[bytes]], None]
MUTATIONS: tuple[Mutation, ...] = (flip, scribble, truncate, insert, cut, set_field, set_field, splice)


def mend_png(data: bytearray) -> None:
    """Give every chunk its checksum again, or nothing behind it would ever be reached."""
    at = 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        end = at + 8 + length
        if end + 4 > len(data):
            return
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4


def damaged(case: int, files: dict[str, bytes]) -> tuple[str, bytes]:
    """Case `case`: a file of the collection with one or more mutations, the same at every run."""
    draw = random.Random(case)
    name = draw.choice(sorted(files))
    data = bytearray(files[name])
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if len(data) > HEADER:
            draw.choice(MUTATIONS)(data, draw, list(files.values()))
    if name.endswith(".png") and draw.random() < 0.8:
        mend_png(data)
    return name, bytes(data)


@pytest.mark.slow
def test_a_damaged_file_is_decoded_or_refused(tmp_path: Path) -> None:
    files = valid_files()
    path = tmp_path / "damaged"  # should a decoder crash the process, this is the file that did it
    ways = [Preprocessing(70, (0, 0, 0), (1, 1, 1), resize, 14) for resize in ("square", "short", "none")]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decoded = 0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", module="PIL")  # as `sinder` does
        for case in range(CASES):
            name, content = damaged(case, files)
            path.write_bytes(content)
            began = time.process_time()
            try:
                pixels = ways[case % 3].fit(decode(path))
            except UnreadableImageError:
                pass
            else:
                decoded += 1
                assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3), f"case {case}, {name}"
            assert time.process_time() - began < MOST_SECONDS, f"case {case}, {name}: {len(content)} bytes took long"
    assert [str(warning.message) for warning in warned] == []
    assert CASES // 5 < decoded < CASES * 4 // 5, "the damage is too great, or too small, to tell anything"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MOST_BYTES
