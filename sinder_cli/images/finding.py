"""Folders, files and lists → the image files in them."""

from __future__ import annotations

import os
import stat
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from sinder_cli.errors import NoInputError
from sinder_cli.events import Emit, Noted, Warned, silent
from sinder_cli.images.lists import listed_paths, read_bytes
from sinder_cli.images.sources import ImageFiles

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".ppm", ".pgm"}
)
HEIC = frozenset({".heic", ".heif"})  # read where the extra is installed
LISTS = frozenset({".txt", ".lst", ".list"})  # of a file that is named: it holds paths
MOST_KINDS = 8  # of files passed over, that are told apart


def find_images(places: Sequence[str], stdin: IO[str] | IO[bytes] | None = None, emit: Emit = silent) -> ImageFiles:
    """Image files in folders (searched in sorted order), named one by one, or listed: on standard input for `-`, or in
    a file that ends in .txt, .lst or .list, one path a line or ended by NUL, relative ones from the working directory.

    A file that is named, or listed, counts whatever its suffix; in folders, regular files with an image's suffix count.
    Hidden folders, and `@eaDir`, are searched only if they are named. Links to folders are followed, and each folder is
    searched once, however many links lead to it. What is passed over is noted by kind, in one line; a folder within one
    that was named is passed over with a warning if it cannot be read.
    Raises `NoInputError` for a place that does not exist or cannot be read, and where nothing was found.
    """
    found: list[Path] = []
    search = _Search(emit)
    for place in places:
        if place == "-":
            found += _listed(read_bytes(stdin or sys.stdin), "standard input")
        elif _is_folder(place):
            found += sorted(search.images_in(Path(place)))
        elif Path(place).suffix.lower() in LISTS:
            found += _listed(_content(place), place)
        else:
            found.append(Path(place))
    if told := search.passed_over.words:
        emit(Noted(f"passed over: {told}"))
    if not found:
        raise NoInputError(
            f"no images in {', '.join(places)}", f"looked for {', '.join(sorted(_suffixes()))}", "check --data"
        )
    return ImageFiles(tuple(dict.fromkeys(found)))


def _suffixes() -> frozenset[str]:
    return SUFFIXES | HEIC if find_spec("pillow_heif") else SUFFIXES


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


def _content(place: str) -> bytes:
    """The bytes of a list. Raises `NoInputError` for one that cannot be read, or is a pipe or a device."""
    if not Path(place).is_file():
        raise _cannot_read(place, "a list is a regular file; one that is piped comes by --data -")
    try:
        return Path(place).read_bytes()
    except OSError as error:
        raise _cannot_read(place, error.strerror or str(error)) from error


def _listed(content: bytes, place: str) -> list[Path]:
    try:
        return listed_paths(content)
    except UnicodeError as error:
        raise _cannot_read(place, f"the list is not what its byte order mark says: {error}") from error


def _cannot_read(place: str, why: str) -> NoInputError:
    return NoInputError(f"cannot read images from {place}", why, "check --data")


@dataclass
class _PassedOver:
    """What a search left out: by kind, how often, and the name of the first."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, name)

    @property
    def words(self) -> str:
        """3 text files, 1 dangling link (a.jpg), 2 .heic (…); the most frequent first."""
        kinds = sorted(self.counts, key=lambda kind: (-self.counts[kind], kind))
        words = [self._words_of(kind) for kind in kinds[:MOST_KINDS]]
        others = sum(self.counts[kind] for kind in kinds[MOST_KINDS:])
        return ", ".join([*words, *([f"{others} others"] if others else [])])

    def _words_of(self, kind: str) -> str:
        count = self.counts[kind]
        details = [self.first[kind]] if count == 1 else []
        details += ["pip install 'sinder-cli[heic]' to read them"] if kind in HEIC else []
        plural = "" if count == 1 or kind.startswith(".") else "s"
        return f"{count} {kind}{plural}" + (f" ({'; '.join(details)})" if details else "")


@dataclass
class _Search:
    """A search through folders, each once."""

    emit: Emit
    searched: set[str] = field(default_factory=set)  # real paths of folders
    passed_over: _PassedOver = field(default_factory=_PassedOver)

    def images_in(self, folder: Path) -> Iterator[Path]:
        """The images below a folder; links are followed last: a file goes by its own path where it has one."""
        suffixes = _suffixes()
        waiting = deque([folder])
        while waiting:
            for root, folders, names in os.walk(waiting.popleft(), onerror=self._unreadable):
                real = os.path.realpath(root)
                if real in self.searched:
                    folders.clear()  # tells os.walk not to go further down
                    continue
                self.searched.add(real)
                folders[:] = self._open_ones(sorted(folders))
                waiting += [link for name in folders if (link := Path(root, name)).is_symlink()]
                for path in (Path(root, name) for name in sorted(names)):
                    if kind := _other_kind(path, suffixes):
                        self.passed_over.add(kind, path.name)
                    else:
                        yield path

    def _open_ones(self, folders: Sequence[str]) -> list[str]:
        """The folders that are not hidden, as `.ipynb_checkpoints`, and not a Synology's `@eaDir`."""
        hidden = [name for name in folders if name.startswith(".") or name == "@eaDir"]
        for name in hidden:
            self.passed_over.add("hidden folder", name)
        return [name for name in folders if name not in hidden]

    def _unreadable(self, error: OSError) -> None:
        self.emit(Warned(f"passed over {error.filename}: {error.strerror}"))


def _other_kind(path: Path, suffixes: frozenset[str]) -> str | None:
    """What a file in a folder is instead of an image; None for one that is to be read."""
    suffix = path.suffix.lower()
    if path.name.startswith("._"):
        return "macOS companion file"
    if suffix not in suffixes:
        return "text file" if suffix == ".txt" else suffix or "other file"
    try:
        return None if stat.S_ISREG(path.stat().st_mode) else "special file"
    except OSError:
        return "dangling link" if path.is_symlink() else "unreadable file"
