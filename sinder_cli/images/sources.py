"""Image sources: the files, folders and lists that a user names, searched once and in order."""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar, Protocol

from sinder_cli.errors import BadInputError, NoInputError
from sinder_cli.events import Emit, Noted, Warned, silent
from sinder_cli.folders import LOOKS, RUNS, WORDS
from sinder_cli.images.decoding import UnreadableImageError, decode

if TYPE_CHECKING:
    from PIL.Image import Image


CHANGED = "the file has changed since the run began"  # start of the message for a file that changed or vanished
FileState = tuple[int, int]  # bytes, and nanoseconds of the last change


class ImageSource(Protocol):
    """A sequence of images, each with a name."""

    @property
    def in_memory(self) -> bool:
        """True if the images are decoded already, so that other processes could only copy them."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the name of the image in messages."""
        ...

    def load(self, index: int, side: int | None = None) -> Image:
        """Decode the image to RGB; one that will be scaled to a shorter `side` may be smaller, as `decode` says.

        Raises `UnreadableImageError`.
        """
        ...

    def fingerprint(self) -> str:
        """Compute a SHA-256 that changes when the list of images does."""
        ...


@dataclass(frozen=True)
class ImageFiles:
    """Image files on disk, in their state when the list is made: a file that changes later is refused."""

    in_memory: ClassVar[bool] = False

    paths: tuple[Path, ...]
    states: tuple[FileState, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "states", tuple(map(_state, self.paths)))

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def load(self, index: int, side: int | None = None) -> Image:
        try:
            image = decode(self.paths[index], side)
        except UnreadableImageError as error:
            if self._has_changed(index):
                raise UnreadableImageError(f"{CHANGED}: {error}") from error
            raise
        if self._has_changed(index):
            raise UnreadableImageError(CHANGED)
        return image

    def _has_changed(self, index: int) -> bool:
        return _state(self.paths[index]) != self.states[index]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path, (size, _) in zip(self.paths, self.states, strict=True):
            digest.update(f"{path.absolute()}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class DrawnImages:
    """Images that a plugin draws itself, from a count and a seed."""

    in_memory: ClassVar[bool] = True

    images: tuple[Image, ...]
    label: str

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.label} #{index}"

    def load(self, index: int, side: int | None = None) -> Image:  # noqa: ARG002  # it is there already
        return self.images[index]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(f"{image.size}".encode() + image.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class SomeImages:
    """Some images of a source, by their index there."""

    source: ImageSource
    indices: Sequence[int]

    @property
    def in_memory(self) -> bool:
        return self.source.in_memory

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def load(self, index: int, side: int | None = None) -> Image:
        return self.source.load(self.indices[index], side)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.source.fingerprint()} {list(self.indices)}".encode()).hexdigest()


@dataclass(frozen=True)
class JoinedImages:
    """The images of several sources, one after another."""

    parts: tuple[ImageSource, ...]

    @property
    def in_memory(self) -> bool:
        return all(part.in_memory for part in self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def name(self, index: int) -> str:
        part, at = self._place(index)
        return part.name(at)

    def load(self, index: int, side: int | None = None) -> Image:
        part, at = self._place(index)
        return part.load(at, side)

    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(part.fingerprint() for part in self.parts).encode()).hexdigest()

    def _place(self, index: int) -> tuple[ImageSource, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)


def _state(path: Path) -> FileState:
    """Return size and time of the last change; −1 for a missing or unreadable file, which decoding then reports."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return -1, -1
    return found.st_size, found.st_mtime_ns


def whole_of(source: ImageSource) -> ImageSource:
    """Return the source from which `SomeImages` were chosen; any other source itself."""
    return source.source if isinstance(source, SomeImages) else source


def files_of(source: ImageSource) -> ImageFiles | None:
    """Return the image files of a source, or None if it has none; for joined sources, those of the first part."""
    if isinstance(source, JoinedImages):
        return files_of(source.parts[0])
    return source if isinstance(source, ImageFiles) else None


SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".ppm", ".pgm"}
)
HEIC = frozenset({".heic", ".heif"})  # read if the extra is installed
LISTS = frozenset({".txt", ".lst", ".list"})  # suffixes of a named file that holds paths
MOST_KINDS = 8  # of files passed over that the note lists separately


def find_images(places: Sequence[str], stdin: IO[str] | IO[bytes] | None = None, emit: Emit = silent) -> ImageFiles:
    """Return the image files in `places`: folders, single images, and lists of paths.

    Folders are searched in sorted order. A list is standard input for `-`, or a file that ends in .txt, .lst or .list;
    it has one path per line, or paths ended by NUL; relative paths start from the working directory.
    A named or listed file counts with any suffix; in folders, only regular files with the suffix of an image count.
    Hidden folders, `@eaDir`, and what sinder wrote (runs, reports, looks) are searched only if they are named. Links
    to folders are followed, and each folder is searched once, however many links lead to it. Files passed
    over are counted by kind in one note; an unreadable folder inside a named one is passed over with a warning.
    Raises `NoInputError` for a place that does not exist or cannot be read, and if nothing was found.
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
    if kinds := search.passed_over.words:
        emit(Noted(f"passed over: {kinds}"))
    if not found:
        looked = f"looked for {', '.join(sorted(_suffixes()))}"
        raise NoInputError(f"no images in {', '.join(places)}", looked, "name another place")
    return ImageFiles(tuple(dict.fromkeys(found)))


def _suffixes() -> frozenset[str]:
    return SUFFIXES | HEIC if find_spec("pillow_heif") else SUFFIXES


def _is_folder(place: str) -> bool:
    try:
        folder = stat.S_ISDIR(os.stat(place).st_mode)  # noqa: PTH116  (a Path would hide the reason of a failure)
        if folder:
            os.scandir(place).close()  # a named folder must be readable; a folder inside it need not be
    except FileNotFoundError as error:
        raise _cannot_read(place, "there is no such file or folder") from error
    except OSError as error:
        raise _cannot_read(place, error.strerror or str(error)) from error
    return folder


def _content(place: str) -> bytes:
    """Read the bytes of a list. Raises `NoInputError` if it cannot be read, or is a pipe or a device."""
    if not Path(place).is_file():
        raise _cannot_read(place, "a list must be a regular file; pass a list from a pipe with --data -")
    try:
        return Path(place).read_bytes()
    except OSError as error:
        raise _cannot_read(place, error.strerror or str(error)) from error


def _listed(content: bytes, place: str) -> list[Path]:
    if kind := _no_list(content):
        why = f"this is {kind}, not a list of images"
        raise BadInputError(f"cannot read images from {place}", why, "give the name of an image as an argument")
    try:
        return listed_paths(content)
    except UnicodeError as error:
        raise _cannot_read(place, f"the list is not in the encoding of its byte order mark: {error}") from error


# What image files begin with, but no path of a list does.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
CONTROLS = frozenset(map(chr, range(32))) - frozenset("\0\t\n\r")
MOST_CONTROLS = 8, 0.02  # that names may hold: of the first characters, so many and this share


def _no_list(content: bytes) -> str:
    """Return what is no list: an image, or other data that is no text; nothing for a list."""
    boxed = content[4:8] == b"ftyp" or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")  # AVIF, HEIC, WebP
    if content.startswith(SIGNATURES) or boxed or (content[:2] == b"BM" and content[6:10] == bytes(4)):
        return "an image"
    try:
        start = _decoded(content)[:4096]
    except UnicodeError:
        return ""  # told by who reads the list
    controls = sum(character in CONTROLS for character in start)
    return "no text" if controls > MOST_CONTROLS[0] + MOST_CONTROLS[1] * len(start) else ""


def _cannot_read(place: str, why: str) -> NoInputError:
    return NoInputError(f"cannot read images from {place}", why, "check the name")


@dataclass
class _PassedOver:
    """Files that a search passed over: number by kind, and the name of the first of each kind."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, name)

    @property
    def words(self) -> str:
        """Summary such as `3 text files, 1 dangling link (a.jpg), 2 .heic (…)`; the most frequent kind comes first."""
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
    """A search through folders, which visits each folder once."""

    emit: Emit
    searched: set[str] = field(default_factory=set)  # real paths of folders
    passed_over: _PassedOver = field(default_factory=_PassedOver)

    def images_in(self, folder: Path) -> Iterator[Path]:
        """Yield the images below a folder; links are followed last, so that a file is found by its own path first."""
        suffixes = _suffixes()
        waiting = deque([folder])
        while waiting:
            for root, folders, names in os.walk(waiting.popleft(), onerror=self._unreadable):
                real = os.path.realpath(root)
                if real in self.searched:
                    folders.clear()  # makes os.walk skip the folders below
                    continue
                self.searched.add(real)
                folders[:] = self._open_ones(Path(root), sorted(folders))
                waiting += [link for name in folders if (link := Path(root, name)).is_symlink()]
                for path in (Path(root, name) for name in sorted(names)):
                    if kind := _other_kind(path, suffixes):
                        self.passed_over.add(kind, path.name)
                    else:
                        yield path

    def _open_ones(self, root: Path, folders: Sequence[str]) -> list[str]:
        """Return the folders that are neither hidden, nor a Synology's `@eaDir`, nor written by sinder itself."""
        open_ones = []
        for name in folders:
            if name.startswith(".") or name == "@eaDir":
                self.passed_over.add("hidden folder", name)
            elif _is_ours(root / name):
                self.passed_over.add("sinder folder", name)
            else:
                open_ones.append(name)
        return open_ones

    def _unreadable(self, error: OSError) -> None:
        self.emit(Warned(f"passed over {error.filename}: {error.strerror}"))


DOCUMENTS = ("report.json", "summary.json", "evaluation.json")  # beside report.html


def _is_ours(folder: Path) -> bool:
    """Return True for a folder with pictures of a run, a report, or looks, which are no photographs."""
    if folder.name in (LOOKS, RUNS) or (folder / WORDS).is_file():
        return True
    return (folder / "report.html").is_file() and any((folder / name).is_file() for name in DOCUMENTS)


def _other_kind(path: Path, suffixes: frozenset[str]) -> str | None:
    """Return the kind of a file that is passed over in a folder; None for an image."""
    suffix = path.suffix.lower()
    if path.name.startswith("._"):
        return "macOS companion file"
    if suffix not in suffixes:
        return "text file" if suffix == ".txt" else suffix or "other file"
    try:
        return None if stat.S_ISREG(path.stat().st_mode) else "special file"
    except OSError:
        return "dangling link" if path.is_symlink() else "unreadable file"


BOMS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_bytes(stream: IO[str] | IO[bytes]) -> bytes:
    """Read the rest of a stream as its original bytes."""
    content = getattr(stream, "buffer", stream).read()
    return content if isinstance(content, bytes) else os.fsencode(content)


def listed_paths(content: bytes) -> list[Path]:
    r"""Return the paths of a list: one per line, or each ended by a NUL, as `find -print0` writes them.

    A line ends only with `\n` or `\r\n`: names may contain U+2028. Empty lines are ignored. A byte order mark gives the
    Unicode encoding and is no part of the first name; without one, names are bytes, or UTF-16 if every other byte of
    the list is NUL and a newline ends it. Raises `UnicodeError` for a list that is not in the encoding of its mark.
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
