"""A folder that belongs to one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sinder_cli.errors import TryAgainError
from sinder_cli.events import Emit, Warned
from sinder_cli.files import require_writable_folder


@contextmanager
def held(folder: Path, emit: Emit) -> Iterator[None]:
    """Create a folder and keep other processes out of it; what was made and stays empty is removed again.

    Raises `TryAgainError` while another process holds it.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with ExitStack() as undone:  # a signal may come between any two of these
        undone.callback(_remove_empty, made)
        require_writable_folder(folder)
        handle = _opened_here_alone(folder)
        undone.callback(_close_all, handle)  # and with it the lock
        undone.callback(_remove_empty, made)  # before that, or it might be another's by then
        try:
            _lock(handle[0], folder, emit)
        except TryAgainError:
            made.clear()  # it is the other's
            raise
        yield


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, up to one that is not empty."""
    with suppress(OSError):
        while folders:
            folders.pop(0).rmdir()


def _opened_here_alone(folder: Path) -> list[int]:
    """The descriptor of a folder, which no process that is forked later keeps: it would keep the lock as well."""
    handle = [os.open(folder, os.O_RDONLY)]
    os.register_at_fork(after_in_child=lambda: _close_all(handle))  # nothing is left to close once it is closed here
    return handle


def _close_all(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())


def _lock(handle: int, path: Path, emit: Emit) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        why, remedy = "another process is repairing into it", "wait for its end, or choose another --out"
        raise TryAgainError(f"run directory {path} is in use", why, remedy) from error
    except OSError as error:  # a file system, such as some of NFS, that locks no folders
        emit(Warned(f"cannot keep other processes out of {path}: {error.strerror}"))
