"""Files that are written completely or not at all: beside the target, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sinder_cli.errors import CannotCreateError, SinderError, StorageError
from sinder_cli.escaping import json_escaped

WEIGHTS_SUFFIXES = {".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".json"}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}


def output_error(path: Path, error: OSError) -> SinderError:
    """Return `StorageError` (74) for a full disk or an I/O error, else `CannotCreateError` (73)."""
    reason = error.strerror or str(error)
    if error.errno in _NO_ROOM:
        return StorageError(f"cannot write {path}", reason, "free space there and run again")
    return CannotCreateError(f"cannot create {path}", reason, "choose another output path")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it and rename it to `path`, else remove it.

    A symbolic link is followed. Raises `CannotCreateError` or `StorageError` for errors of the file system.
    """
    path = path.resolve()
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise output_error(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success flush its content and move it to `path`, else remove it.

    A new `path` appears in one rename; its parent folders are created. An existing `path` must be empty, and stays the
    same folder (it may be a working directory or a mount): each entry is moved into it by one rename.
    Raises `CannotCreateError` or `StorageError` for errors of the file system.
    """
    path = path.resolve()
    require_new_folder(path)
    there = path.is_dir()
    place = path if there else path.parent
    try:
        make_folder(place)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=place))
    except OSError as error:
        raise output_error(path, error) from error
    try:
        yield temporary
        flush_tree(temporary)
        if there:
            _move_entries(temporary, path)
        else:
            temporary.chmod(0o777 & ~_umask())
            temporary.rename(path)  # replaces an empty folder, and fails if it was filled meanwhile
        flush(place)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_entries(source: Path, target: Path) -> None:
    """Move all entries into a folder that holds only `source`; folders first, so that a page finds its pictures."""
    if list(target.iterdir()) != [source]:
        raise CannotCreateError(f"cannot create {target}", "it was filled meanwhile", "choose another --out")
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.is_file(), entry.name)):
        entry.rename(target / entry.name)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files and folders beside `path`, left by processes that were killed while they wrote it."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may hold any bytes


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file of bytes, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, document: Any) -> None:
    """Write `document` as indented JSON, completely or not at all; raise `ValueError` for NaN."""
    write_text(path, json_text(document))


def json_text(document: Any) -> str:
    """Return a document as indented JSON for files and standard output. Raises `ValueError` for NaN.

    Letters stay unescaped. Bytes of file names that are not UTF-8, and characters that control a terminal, become JSON
    escapes: `\\udcff`, `\\u009b`.
    """
    return json_escaped(json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def make_folder(folder: Path) -> None:
    """Create `folder` and its missing parents, and flush their names to disk."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in made:
        flush(place.parent)


def require_writable_folder(folder: Path) -> None:
    """Create `folder` if it is missing, and check that files can be created in it."""
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise output_error(folder, error) from error


def require_new_folder(folder: Path) -> None:
    """Check, before any work is done, that `folder` is empty or can be created; leave no trace of the check.

    Raises `CannotCreateError` if it is not empty or cannot be created.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise CannotCreateError(f"cannot create {folder}", "it is not empty", "choose another --out, or remove it")
    require_creatable_folder(folder)


def require_creatable_folder(folder: Path) -> None:
    """Check, before any work is done, that `folder` exists or can be created; leave no trace of the check."""
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise output_error(folder, error) from error


def require_writable_file(path: Path) -> None:
    """Check, before any work is done, that `path` can be created or replaced."""
    what = f"cannot create {path}"
    if path.is_dir():
        raise CannotCreateError(what, "it is a folder", "name a file")
    if path.exists() and not path.is_file():
        raise CannotCreateError(what, "it is a device or a pipe", "name a file")
    if not path.parent.is_dir():
        raise CannotCreateError(what, f"there is no folder {path.parent}", "create it first")
    require_creatable_folder(path.parent)


def public_model(name: str) -> str:
    """Return a model's name for publication: for a folder of this machine (`hf//home/me/vit`) only its last part."""
    plugin, slash, place = name.partition("/")
    return f"{plugin}/{Path(place).resolve().name}" if slash and place.startswith(("/", ".", "~")) else name


def public_place(place: str) -> str:
    """Return the name of a file or folder for publication, without its parent folders on this machine."""
    return Path(place).name or "a folder" if "/" in place else place


def public_source(label: str) -> str:
    """Return the source of weights for publication: files by their names only, models unchanged.

    >>> public_source("/home/me/vit.pth, adapted by runs/mine/adapter.safetensors")
    'vit.pth, adapted by adapter.safetensors'
    """
    return ", ".join(_public_part(part) for part in label.split(", "))


def _public_part(part: str) -> str:
    verb = "adapted by "
    if part.startswith(verb):
        return f"{verb}{public_place(part.removeprefix(verb))}"
    is_file = part.startswith(("/", ".", "~")) or Path(part).suffix in WEIGHTS_SUFFIXES or Path(part).exists()
    return public_place(part) if is_file else part


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush_tree(folder: Path) -> None:
    """Flush all files of a folder, and their names, to disk."""
    for place in (*folder.rglob("*"), folder):
        flush(place)


def flush(place: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
