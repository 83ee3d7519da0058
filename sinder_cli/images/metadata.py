"""What files hold beside the pixels: it may turn an image, and must never cost one.

Pillow refuses a whole PNG for one chunk of text that is too large or odd, and a photograph for one tag of EXIF.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.memory import is_out_of_memory

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngStream

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_BYTES = 2**30  # of a PNG that is copied without what is bad in it; 13 000 × 13 000 in 16-bit colour have as many
ORIENTATION = 0x0112  # EXIF


def upright(image: Image) -> Image:
    """Return the image turned as its EXIF asks; as it is stored where that cannot be read."""
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


def _orientation(image: Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception as error:  # Pillow raises SyntaxError, struct.error, ValueError, … on odd tags
        if is_out_of_memory(error):
            raise
        return 1


def without_bad_chunks(path: Path) -> io.BytesIO | None:
    """Return a PNG without the chunks that Pillow refuses and that no pixel needs; None where there are none.

    Those are large ones (Pillow's limits: 1 MiB a chunk and 64 MiB of text in all), odd and damaged ones. Of an
    animation the first frame is left. None as well for what is no PNG, ends early, or has over 1 GiB.
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
    """The kind, data and checksum of each chunk, as far as they are whole."""
    size = os.fstat(file.fileno()).st_size
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if length + 4 > size - file.tell():  # reading makes room for as many bytes as it is asked for
            return
        data, checksum = file.read(length), file.read(4)
        yield kind, data, checksum


def _is_good(judge: PngStream, kind: bytes, data: bytes, checksum: bytes) -> bool:
    """Whether Pillow reads a chunk of metadata; `judge` adds up the memory that texts take."""
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
