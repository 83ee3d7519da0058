"""What stands behind `hf/` in a model's name: a folder of this machine, or a repository of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from sinder_cli import ModelRequest, UsageError

PREFIX = "hf/"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def place_of(request: ModelRequest) -> str:
    """The folder or repository as the user wrote it."""
    return request.model.removeprefix(PREFIX)


def local_folder(request: ModelRequest) -> Path | None:
    """The folder that is meant, or None for a repository. Raises `UsageError` for a revision of a folder."""
    place = place_of(request)
    path = Path(place).expanduser()
    if not place.startswith((".", "/", "~")) and not (place and path.is_dir()):
        return None
    if request.revision is not None:
        what, why = f"cannot use revision {request.revision!r}", f"{place} is a folder"
        raise UsageError(what, why, "leave --revision out")
    return path


def repository(request: ModelRequest) -> str:
    """The repository that is meant. Raises `UsageError` for a name that none can have."""
    place = place_of(request)
    if not _REPOSITORY.fullmatch(place):
        why = "it is no folder here, and no OWNER/NAME"
        raise UsageError(f"unknown model {request.model!r}", why, "name a folder as hf/./FOLDER, or a repository")
    return place
