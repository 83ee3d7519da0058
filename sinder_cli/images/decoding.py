"""One image file → 8-bit RGB, or the reason for a failure: formats, colours, rotation. Files are not trusted.

Odd or huge metadata never makes an image unreadable.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sinder_cli.errors import TryAgainError
from sinder_cli.memory import is_out_of_memory

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Values = np.ndarray[Any, np.dtype[np.float64]]
    from PIL.PngImagePlugin import PngStream


FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "PPM")  # formats that Pillow may try; MPO opens as JPEG
BRANDS = {  # brand codes in the first box of such a file
    "AVIF": {b"avif", b"avis"},
    "HEIF": {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"},
}
FIRST_BOX = 64  # bytes read from the start of a file
REMEDIES = {
    "HEIF": "HEIC is read by an extra: pip install 'sinder-cli[heic]'",
    "AVIF": "AVIF is read by newer versions of Pillow: pip install --upgrade pillow",
}
SPARE = {8: 2.5, 4: 2.5, 2: 2.0}  # by factor: pixels that a reduced JPEG has on a side for each that it is scaled to
LATER_PAGES = "later pages"  # key in the `info` of an image that is the first of several in its file
MAX_PIXELS = 178_956_970  # Pillow's own limit for sizes in headers, which a program may have lifted; also for resizing
PLAIN_PIXELS = 2**24  # 4096 × 4096, allowed for a file of any size
PIXELS_PER_BYTE = 2000  # limit above that; flat colour reaches 1032 as PNG and 350 as JPEG, photographs 100


class UnreadableImageError(Exception):
    """An image cannot be decoded; the message says why. Callers skip it, report its name and count it."""


def decode(path: Path, side: int | None = None) -> Image:
    """Return a regular file of the formats above as an RGB image, with its EXIF rotation applied.

    If the caller will scale the image so that its shorter side is `side` pixels, a large JPEG is decoded at half, a
    quarter or an eighth of its size, where what is scaled from it differs by less than 1/255 on average (`reduction`).

    Of an animation or several pages, the first is returned, with `LATER_PAGES` as the only entry of its `info`.

    - 16-bit greyscale is scaled (65535 is white), and so is float (white is the largest value, or 1 if that is more);
      of 16-bit colour the upper 8 bits are kept.
    - A palette is looked up; transparency of any kind is laid over white.
    - CMYK, YCbCr and L*a*b* are converted; an Adobe JPEG's inverted inks are corrected. ICC profiles are not applied.
    - Metadata that is odd or too large is left out.

    Raises `UnreadableImageError` for any problem with the file, `TryAgainError` if too many files are open, and passes
    errors that mean lack of memory: the last two say nothing about the image. Pillow's warnings about odd metadata are
    left to the filters of the program.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device could block, so it is never opened
            raise UnreadableImageError("not a regular file")
        formats = _formats(path)
        try:
            return _decoded(path, formats, path.stat().st_size, side)
        except Exception as error:
            refused = isinstance(error, UnreadableImageError) or is_out_of_memory(error)
            mended = None if refused else without_metadata(path)
            if mended is None:
                raise
        return _decoded(mended, formats, path.stat().st_size, side)
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, … on bad files
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise TryAgainError(
                f"cannot open {path}", str(error.strerror), "raise ulimit -n, or lower --workers"
            ) from error
        raise UnreadableImageError(_reason(error, path)) from error


def _reason(error: Exception, path: Path) -> str:
    """Return why a file could not be decoded; for a text without an image suffix, what was probably intended."""
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError) and path.suffix.lower() not in pillow.registered_extensions():
        with suppress(OSError, UnicodeDecodeError), path.open("rb") as file:
            start = file.read(FIRST_BOX)
            if start and all(letter.isprintable() or letter.isspace() for letter in start.decode("ascii")):
                return "this is text; a list of images ends in .txt, or comes on standard input: --data - < LIST"
    return str(error) or type(error).__name__


def _formats(path: Path) -> list[str]:
    """Return the formats that Pillow may try on a file, without those missing from its build (they raise KeyError).

    The library for HEIC is loaded only for a HEIC file. Raises `UnreadableImageError` if it is missing, or if Pillow is
    too old for AVIF.
    """
    from PIL import Image as pillow

    pillow.init()
    with path.open("rb") as file:
        needed = _needed(file.read(FIRST_BOX))
    if needed == "HEIF":
        with suppress(ImportError):
            from pillow_heif import register_heif_opener

            register_heif_opener()
    if needed and needed not in pillow.OPEN:
        raise UnreadableImageError(REMEDIES[needed])
    return [name for name in dict.fromkeys((*FORMATS, needed)) if name in pillow.OPEN]


def _needed(start: bytes) -> str | None:
    """Return the format of a file by its first bytes, if it is one that Pillow may lack; else None."""
    if start[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(start[:4], "big"), len(start))
    brands = {start[at : at + 4] for at in range(8, end, 4)}
    return next((name for name, of in BRANDS.items() if brands & of), None)


def _decoded(source: Path | IO[bytes], formats: list[str], bytes_of_file: int, side: int | None) -> Image:
    from PIL import Image as pillow

    with pillow.open(source, formats=formats) as file:
        _require_plausible(file.width, file.height, bytes_of_file)
        if side is not None:
            factor = reduction(file.size, side)
            file.draft(None, (file.width // factor, file.height // factor))  # only JPEG heeds it
        file.load()
        rgb = to_rgb(upright(file))
        rgb.info = {LATER_PAGES: True} if _has_more(file) else {}
        return rgb


def reduction(size: tuple[int, int], side: int) -> int:
    """Return by what factor a JPEG of this width and height may be reduced if its shorter side becomes `side` pixels.

    Only factors that divide both sides: any other would shift what is in the image by a part of a pixel.
    """
    fitting = (factor for factor in SPARE if not size[0] % factor and not size[1] % factor)
    return next((factor for factor in fitting if min(size) / factor >= SPARE[factor] * side), 1)


def _has_more(file: Image) -> bool:
    """Return True if pages or frames follow the first; the previews of a photograph, in MPO, do not count."""
    try:
        return file.format != "MPO" and bool(getattr(file, "is_animated", False))
    except Exception as error:  # GIF reads its second frame only here, and it may be broken
        if is_out_of_memory(error):
            raise
        return False


def _require_plausible(width: int, height: int, bytes_of_file: int) -> None:
    """Raise `UnreadableImageError` for a header that would fill the memory: decoders pad missing data to full size."""
    pixels = width * height
    if pixels > MAX_PIXELS:
        raise UnreadableImageError(f"{width}×{height} pixels are too many")
    if pixels > max(PLAIN_PIXELS, PIXELS_PER_BYTE * bytes_of_file):
        raise UnreadableImageError(f"{width}×{height} pixels are too many for a file of {bytes_of_file} bytes")


WHITE_16_BIT = 65535.0


def to_rgb(image: Image) -> Image:
    """Return the image in mode RGB: deep greyscale scaled to 8 bits, transparency laid over white, the rest by Pillow.

    Raises Pillow's error for a mode that it cannot convert.
    """
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.mode == "F":
        return _from_floats(image)
    if image.mode == "La":  # premultiplied; Pillow has no shorter way
        return _over_white(image.convert("LA"))
    if image.mode in {"RGBA", "LA", "PA", "RGBa"} or "transparency" in image.info:
        return _over_white(image)
    return image.convert("RGB")


def _over_white(image: Image) -> Image:
    from PIL import Image as pillow

    rgba = image.convert("RGBA")
    return pillow.alpha_composite(pillow.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _from_integers(image: Image) -> Image:
    """Scale 0 … 65535 to 0 … 255, in 32 bits too: Pillow opens 16-bit PGM and signed 16-bit TIFF as 32-bit."""
    import numpy as np

    values = np.asarray(image, dtype=np.float64)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # one grey value of a 16-bit PNG
        values = np.where(values == transparent, WHITE_16_BIT, values)
    return _from_greys(values.clip(0, WHITE_16_BIT) * (255 / WHITE_16_BIT))


def _from_floats(image: Image) -> Image:
    """Scale 0 … 1 to 0 … 255, or 0 … the largest value if that is more than 1; NaN becomes black."""
    import numpy as np

    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = np.asarray(image, dtype=np.float64)
    top = max(float(values.max(initial=0.0, where=np.isfinite(values))), 1.0)
    return _from_greys(np.nan_to_num(values, nan=0.0).clip(0, top) * (255 / top))


def _from_greys(values: Values) -> Image:
    import numpy as np
    from PIL import Image as pillow

    return pillow.fromarray(values.round().astype(np.uint8)).convert("RGB")


SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_BYTES = 2**30  # of a PNG to be copied without its bad chunks; 13 000 × 13 000 in 16-bit colour have as many
ORIENTATION = 0x0112  # EXIF
START_OF_SCAN, EXIF_SEGMENT = 0xDA, 0xE1
NEEDLESS = {*range(0xE0, 0xEE), 0xEF, 0xFE}  # JFIF, EXIF, ICC, Photoshop, …, comments; not 0xEE: Adobe's, for colours
TIFF_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
TIFF_METADATA = {270, 305, 306, 315, 700, 33432, 33723, 34377, 34665, 34675, 34853, 37724}  # texts, XMP, EXIF, ICC, GPS


def upright(image: Image) -> Image:
    """Return the image rotated and mirrored as its EXIF says; unchanged if the EXIF cannot be read."""
    from PIL.Image import Transpose

    turned = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(_orientation(image))
    return image if turned is None else image.transpose(turned)


def upright_size(path: Path) -> tuple[int, int]:
    """Return width and height of the image that `decode` returns, from the file's header alone where that can be read.

    Raises `UnreadableImageError`, as `decode` does.
    """
    from PIL import Image as pillow

    try:
        with pillow.open(path, formats=_formats(path)) as file:
            known = file.format != "PNG" or "exif" in file.info  # else Pillow decodes it to search behind the pixels
            turned = known and _orientation(file) in {5, 6, 7, 8}
            return (file.height, file.width) if turned else file.size
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return decode(path).size


def _orientation(image: Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception as error:  # Pillow raises SyntaxError, struct.error, ValueError, … on odd tags
        if is_out_of_memory(error):
            raise
        return 1


def without_metadata(path: Path) -> io.BytesIO | None:
    """Return an image file without the metadata that Pillow fails on; None if there is nothing to remove."""
    if path.stat().st_size > MOST_BYTES:
        return None
    with path.open("rb") as file:
        start = file.read(len(SIGNATURE))
    if start == SIGNATURE:
        return without_bad_chunks(path)
    if start.startswith(b"\xff\xd8\xff"):
        return _plain_jpeg(path.read_bytes())
    if start[:4] in TIFF_ORDERS:
        return _plain_tiff(path.read_bytes(), TIFF_ORDERS[start[:4]])
    return None


def _plain_jpeg(content: bytes) -> io.BytesIO | None:
    """Return a JPEG without segments that no pixel needs, except a readable EXIF, which may rotate the image."""
    kept, at = [content[:2]], 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == START_OF_SCAN:
            return io.BytesIO(b"".join([*kept, content[at:]]))
        segment = content[at : at + 2 + length]
        if marker not in NEEDLESS or (marker == EXIF_SEGMENT and _is_exif(segment[4:])):
            kept.append(segment)
        at += 2 + max(length, 2)
    return None


def _is_exif(data: bytes) -> bool:
    from PIL.Image import Exif

    try:
        exif = Exif()
        exif.load(data)
        return data.startswith(b"Exif\0\0") and int(exif.get(ORIENTATION, 1)) >= 0
    except Exception as error:  # Pillow raises SyntaxError, struct.error, ValueError, … on odd tags
        if is_out_of_memory(error):
            raise
        return False


def _plain_tiff(content: bytes, order: str) -> io.BytesIO | None:
    """Return a TIFF whose first page has a new directory, at the end of the file, without tags that no pixel needs."""
    try:
        (start,) = struct.unpack_from(f"{order}I", content, 4)
        (count,) = struct.unpack_from(f"{order}H", content, start)
        entries = [content[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
        kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] not in TIFF_METADATA]
        following = content[start + 2 + 12 * count :][:4].ljust(4, b"\0")
    except struct.error:
        return None
    even = content + b"\0" * (len(content) % 2)
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + following
    return io.BytesIO(even[:4] + struct.pack(f"{order}I", len(even)) + even[8:] + directory)


def without_bad_chunks(path: Path) -> io.BytesIO | None:
    """Return a PNG without the chunks that Pillow refuses and that no pixel needs; None if it has no such chunks.

    These are odd, damaged and large chunks (Pillow's limits: 1 MiB per chunk and 64 MiB of text in all). Of an
    animation only the first frame is kept. Returns None too for a file that is no PNG, ends early, or has over 1 GiB.
    """
    from PIL.PngImagePlugin import PngStream

    with path.open("rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE or os.fstat(file.fileno()).st_size > MOST_BYTES:
            return None
        judge = PngStream(file)
        kept, bad = [SIGNATURE], False
        for kind, data, checksum in _chunks(file):
            if kind[:1].isupper() or kind == b"tRNS" or _is_good(judge, kind, data, checksum):
                kept += [struct.pack(">I", len(data)), kind, data, checksum]
            else:
                bad = True
    return io.BytesIO(b"".join(kept)) if bad else None


def _chunks(file: io.BufferedReader) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield the kind, data and checksum of each chunk, up to the first incomplete one."""
    size = os.fstat(file.fileno()).st_size
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if length + 4 > size - file.tell():  # a read reserves memory for all the bytes requested
            return
        data, checksum = file.read(length), file.read(4)
        yield kind, data, checksum


def _is_good(judge: PngStream, kind: bytes, data: bytes, checksum: bytes) -> bool:
    """Return True if Pillow can read a chunk of metadata; `judge` adds up the memory that texts take."""
    read = getattr(judge, f"chunk_{kind.decode('latin-1')}", None)
    if read is None or kind in (b"acTL", b"fcTL", b"fdAT") or struct.pack(">I", zlib.crc32(kind + data)) != checksum:
        return False
    judge.fp = io.BytesIO(data)
    try:
        read(0, len(data))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    return True
