"""Lists of image files, as `find`, an editor or PowerShell writes them → paths."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import IO

BOMS = {  # the longest first: that of UTF-16 begins that of UTF-32
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_bytes(stream: IO[str] | IO[bytes]) -> bytes:
    """Return all that is left of a stream, as the bytes that it was made from."""
    content = getattr(stream, "buffer", stream).read()
    return content if isinstance(content, bytes) else os.fsencode(content)


def listed_paths(content: bytes) -> list[Path]:
    r"""Return the paths of a list: one a line, or each ended by a NUL, as `find -print0` does.

    A line ends with `\n` or `\r\n` and nothing else: names may hold U+2028. Empty ones count for nothing. A byte order
    mark says which Unicode it is, and is no part of the first name; without one, names are bytes, or UTF-16 where every
    other byte of whole lines is NUL. Raises `UnicodeError` for what is no Unicode of the kind that its mark says.
    """
    text = _decoded(content)
    names = text.split("\0") if "\0" in text else [line.removesuffix("\r") for line in text.split("\n")]
    return [Path(name) for name in names if name.strip(" \t\r\n")]


def _decoded(content: bytes) -> str:
    for mark, encoding in BOMS.items():
        if content.startswith(mark):
            return content.decode(encoding, "surrogateescape" if encoding == "utf-8-sig" else "strict")
    for encoding, newline, first in (("utf-16-le", b"\n\0", 1), ("utf-16-be", b"\0\n", 0)):
        if content.endswith(newline) and not any(content[first::2]):
            return content.decode(encoding)
    return os.fsdecode(content)
