"""One image file → an RGB image, or the reason why not. What comes in is not trusted."""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.errors import TryAgainError
from sinder_cli.images.colours import to_rgb
from sinder_cli.memory import is_out_of_memory

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "PPM")  # what Pillow may try; MPO opens as JPEG
MAX_PIXELS = 178_956_970  # Pillow's own limit, by header, which a program may have lifted; no resizing beyond it
PLAIN_PIXELS = 2**24  # 4096 × 4096, which may come from however few bytes
PIXELS_PER_BYTE = 2000  # of the file, beyond that; flat colour makes 1032 at most as PNG, 350 as JPEG, photographs 100


class UnreadableImageError(Exception):
    """One image cannot be decoded; the message says why. Callers skip it, name it and count it."""


def decode(path: Path) -> Image:
    """One regular file of the formats above as an RGB image, EXIF rotation applied; the first frame of an animation.

    - 16-bit greyscale is scaled (65535 is white), and so is float (1 is white, or the largest value above that);
      of 16-bit colour the upper 8 bits are kept.
    - A palette is looked up; transparency, of whatever kind, is laid over white.
    - CMYK, YCbCr and L*a*b* are converted; an Adobe JPEG's inverted inks are put right. ICC profiles are not applied.

    Raises `UnreadableImageError` for everything that goes wrong with the file, `TryAgainError` where too many are open,
    and what means that memory has run out: neither says anything about the image. Pillow's warnings about odd metadata
    are left to the filters of the program.
    """
    from PIL import Image as pillow
    from PIL import ImageOps

    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device would block, and is never opened
            raise UnreadableImageError("not a regular file")
        pillow.init()
        formats = [name for name in FORMATS if name in pillow.OPEN]  # one that it was built without is a KeyError
        with pillow.open(path, formats=formats) as file:
            _require_plausible(file.width, file.height, path.stat().st_size)
            file.load()
            ImageOps.exif_transpose(file, in_place=True)
            return to_rgb(file)
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, … on bad files
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise TryAgainError(
                f"cannot open {path}", str(error.strerror), "raise ulimit -n, or lower --workers"
            ) from error
        raise UnreadableImageError(str(error) or type(error).__name__) from error


def _require_plausible(width: int, height: int, bytes_of_file: int) -> None:
    """Refuse by its header what would fill the memory: decoders make up for missing data at full size."""
    pixels = width * height
    if pixels > MAX_PIXELS:
        raise UnreadableImageError(f"{width}×{height} pixels are too many")
    if pixels > max(PLAIN_PIXELS, PIXELS_PER_BYTE * bytes_of_file):
        raise UnreadableImageError(f"{width}×{height} pixels are too many for a file of {bytes_of_file} bytes")
