"""Folders: locked by one process at a time, and moved into place completely or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from sinder_cli.errors import CannotCreateError, TryAgainError, UsageError
from sinder_cli.events import Emit, Warned
from sinder_cli.files import (
    flush,
    flush_tree,
    output_error,
    require_creatable_folder,
    require_writable_file,
    require_writable_folder,
)


@contextmanager
def held(folder: Path, emit: Emit) -> Iterator[None]:
    """Create a folder and lock it against other processes; created folders that stay empty are removed at the end.

    Raises `TryAgainError` while another process holds the lock.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with ExitStack() as undone:  # a signal may come between any two of these
        undone.callback(_remove_empty, made)
        require_writable_folder(folder)
        handle = _opened_here_alone(folder)
        undone.callback(_close_all, handle)  # and with it the lock
        undone.callback(_remove_empty, made)  # before the lock is released, after which another process may use it
        try:
            _lock(handle[0], folder, emit)
        except TryAgainError:
            made.clear()  # the folder belongs to the other process
            raise
        yield


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, up to one that is not empty."""
    with suppress(OSError):
        while folders:
            folders.pop(0).rmdir()


def _opened_here_alone(folder: Path) -> list[int]:
    """Open a folder; a process forked later closes the descriptor, since it would keep the lock as well."""
    handle = [os.open(folder, os.O_RDONLY)]
    os.register_at_fork(after_in_child=lambda: _close_all(handle))  # the list is empty once it is closed here
    return handle


def _close_all(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())


def _lock(handle: int, path: Path, emit: Emit) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        why, remedy = "another process is repairing into it", "wait until it ends, or choose another --out"
        raise TryAgainError(f"run directory {path} is in use", why, remedy) from error
    except OSError as error:  # some file systems, such as some NFS, cannot lock folders
        emit(Warned(f"cannot keep other processes out of {path}: {error.strerror}"))


MANIFEST = "sinder_export.json"
FORMAT = "sinder-export-1"
WORDS = "words.json"  # describes the pictures of a run, and lies beside them
LOOKS, RUNS = "sinder-looks", "sinder-runs"  # where commands write that are told no place

REPLACED = ".replaced"  # name of the old output while it lies in the folder for drafts

_RENAME_EXCHANGE = 2  # Linux' flag of renameat2
_AT_FDCWD = -100


def require_place(out: Path, kind: Literal["file", "folder"], force: bool, sources: Iterable[Path]) -> None:
    """Refuse a place that cannot be written, or whose content must not be lost.

    Without `force` the place must be free; with it, a file may be replaced, or a folder with only files of an earlier
    export. Raises `CannotCreateError`, and `UsageError` for a place that contains, or is, one of the `sources`.
    """
    for source in sources:
        if source.exists() and out.resolve() in (source.resolve(), *source.resolve().parents):
            raise UsageError(f"cannot write {out}", f"{source} is read from there", "choose another --out")
    if kind == "file":
        require_writable_file(out)
        if out.exists() and not force:
            raise _taken(out)
        return
    if out.exists() and not out.is_dir():
        raise CannotCreateError(f"cannot create {out}", "it is no folder", "choose another --out")
    require_creatable_folder(out.parent)
    if out.is_dir() and any(out.iterdir()):
        if stranger := _stranger(out):
            raise CannotCreateError(f"cannot replace {out}", stranger, "choose another --out, or remove it")
        if not force:
            raise _taken(out)


def _taken(out: Path) -> CannotCreateError:
    return CannotCreateError(f"cannot create {out}", "it already exists", "--force replaces it")


def _stranger(folder: Path) -> str:
    """Return why a folder is not an unchanged export; an empty string if it is."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        written = {MANIFEST, *manifest["files"]} if manifest["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        return "it is not empty, and is not an export"
    if not written:
        return f"its format is {manifest['format']!r}, not {FORMAT!r}"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    others = sorted(name for name in found - written if "__pycache__" not in name)
    return f"no export wrote {others[0]} in it" if others else ""


@contextlib.contextmanager
def placed(out: Path) -> Iterator[Path]:
    """Yield a path beside `out` for a file or a folder of its name; on success flush it and rename it to `out`.

    An existing `out` is replaced in that one rename, or in two if the system cannot exchange two folders. Leftovers of
    killed processes are removed. Raises `CannotCreateError` or `StorageError`.
    """
    name, out = out.name, out.resolve()  # a symbolic link is followed
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        with _room_beside(out) as room:
            draft = room / name
            yield draft
            flush_tree(draft) if draft.is_dir() else flush(draft)
            _put(draft, out)
            flush(out.parent)
    except OSError as error:
        raise output_error(out, error) from error


def _put(draft: Path, out: Path) -> None:
    """Rename `draft` to `out`; a folder that was at `out` is at `draft` afterwards, or beside it."""
    if not out.is_dir() or not any(out.iterdir()):
        draft.replace(out)
    elif not _exchange(draft, out):
        aside = out.rename(draft.with_name(REPLACED))
        try:
            draft.rename(out)
        except BaseException:  # including a signal
            if not out.exists():
                aside.rename(out)
            raise


@contextlib.contextmanager
def _room_beside(out: Path) -> Iterator[Path]:
    """Yield a folder for drafts beside `out`, locked by this process; remove it with its content at the end."""
    room = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    handle = os.open(room, os.O_RDONLY)
    try:
        _is_ours(handle)
        yield room
    finally:
        os.close(handle)
        shutil.rmtree(room, ignore_errors=True)


def _sweep(out: Path) -> None:
    """Remove the draft folders of ended processes; an output that one of them had moved aside is restored first."""
    for room in out.parent.glob(f".{glob.escape(out.name)}.*.part"):
        handle = os.open(room, os.O_RDONLY)
        try:
            if not _is_ours(handle):
                continue
            if not out.exists() and (room / REPLACED).exists():
                (room / REPLACED).rename(out)
            shutil.rmtree(room)
        finally:
            os.close(handle)


def _is_ours(handle: int) -> bool:
    """Lock a folder; return False if another process holds the lock, or the file system cannot lock folders."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; return False if the system or the file system cannot do so."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # only Linux has it
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number), str(other))
