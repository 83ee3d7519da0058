"""Folders, files and lists → the image files in them."""

from __future__ import annotations

import os
import stat
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from sinder_cli.errors import NoInputError
from sinder_cli.events import Emit, Warned, silent
from sinder_cli.images.sources import ImageFiles

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".ppm", ".pgm"})


def find_images(places: Sequence[str], stdin: IO[str] | None = None, emit: Emit = silent) -> ImageFiles:
    """Image files in folders (searched in sorted order), named one by one, or listed on standard input for `-`.

    A file that is named counts whatever its suffix; in folders, regular files with an image's suffix count, `._*` do
    not. Links to folders are followed, and each folder is searched once, however many links lead to it. A folder
    within one that was named is passed over with a warning if it cannot be read.
    Raises `NoInputError` for a place that does not exist or cannot be read, and where nothing was found.
    """
    found: list[Path] = []
    searched: set[str] = set()
    for place in places:
        if place == "-":
            found += [Path(line) for line in (stdin or sys.stdin).read().splitlines() if line.strip()]
        elif _is_folder(place):
            found += sorted(_inside(Path(place), searched, emit))
        else:
            found.append(Path(place))
    if not found:
        raise NoInputError(
            f"no images in {', '.join(places)}", f"looked for {', '.join(sorted(SUFFIXES))}", "check --data"
        )
    return ImageFiles(tuple(dict.fromkeys(found)))


def _is_folder(place: str) -> bool:
    try:
        folder = stat.S_ISDIR(os.stat(place).st_mode)  # noqa: PTH116  (a Path would hide why it cannot be read)
        if folder:
            os.scandir(place).close()  # a folder that is named must be readable; one within it may not be
    except FileNotFoundError as error:
        raise _cannot_read(place, "there is no such file or folder") from error
    except OSError as error:
        raise _cannot_read(place, error.strerror or str(error)) from error
    return folder


def _cannot_read(place: str, why: str) -> NoInputError:
    return NoInputError(f"cannot read images from {place}", why, "check --data")


def _inside(folder: Path, searched: set[str], emit: Emit) -> Iterator[Path]:
    """The images below a folder; links are followed last, so that a file goes by its own path where it has one."""

    def passed_over(error: OSError) -> None:
        emit(Warned(f"passed over {error.filename}: {error.strerror}"))

    waiting = deque([folder])
    while waiting:
        for root, folders, names in os.walk(waiting.popleft(), onerror=passed_over):
            real = os.path.realpath(root)
            if real in searched:
                folders.clear()  # tells os.walk not to go further down
                continue
            searched.add(real)
            folders.sort()
            waiting += [link for name in folders if (link := Path(root, name)).is_symlink()]
            paths = [Path(root, name) for name in names if not name.startswith("._")]
            yield from (path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file())
