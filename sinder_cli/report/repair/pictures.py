"""The pictures of a run directory: files, and a list of what each shows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sinder_cli.files import output_error, replacing_folder, write_json
from sinder_cli.report.drawing.pictures import Panel

WORDS = "words.json"  # what each picture shows, by its name


class Picture(NamedTuple):
    """A picture as a file, and what it shows."""

    name: str
    words: str
    content: bytes


def write_pictures(folder: Path, panels: Sequence[Panel]) -> None:
    """Write the images of panels, named after their captions, in place of those that are there.

    Raises `StorageError` or `CannotCreateError` for what the file system refuses.
    """
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise output_error(folder, error) from error
    words = {}
    with replacing_folder(folder) as temporary:
        for panel in panels:
            if panel.image is not None:
                name = re.sub(r"[^a-z0-9]+", "-", panel.caption.lower()).strip("-") + panel.image.suffix
                (temporary / name).write_bytes(panel.image.content)
                words[name] = panel.alt
        write_json(temporary / WORDS, words)


def read_pictures(folder: Path) -> list[Picture]:
    """Read the pictures of a run; none where there is no such folder, or it is damaged."""
    try:
        words = json.loads((folder / WORDS).read_text(encoding="utf-8"))
        return [Picture(name, str(said), (folder / name).read_bytes()) for name, said in words.items()]
    except (OSError, ValueError, AttributeError):
        return []
