"""What people read in a run directory: the page, the card, and the pictures of the first image as files."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sinder_cli.files import output_error, replacing_folder, write_json, write_text
from sinder_cli.report.repair.card import render_card
from sinder_cli.report.repair.page import render_repair_page, samples_of

if TYPE_CHECKING:
    from sinder_cli.repairing.folder import RunFolder
    from sinder_cli.repairing.results import RepairResult
    from sinder_cli.report.pages.templates import Panel

WORDS = "words.json"  # what each picture shows, by its name
SUFFIXES = {"png": "png", "jpeg": "jpg"}


class Picture(NamedTuple):
    """A picture as a file, and what it shows."""

    name: str
    words: str
    content: bytes


def write_repair(folder: RunFolder, result: RepairResult) -> None:
    """Write page, card and pictures into the run directory, each whole or not at all.

    Raises `StorageError` or `CannotCreateError` for what the file system refuses.
    """
    _write_pictures(folder.pictures, result)
    write_text(folder.report, render_repair_page(result))
    write_text(folder.card, render_card(result))


def read_pictures(folder: Path) -> list[Picture]:
    """The pictures that `write_repair` left in a folder; none where there is no such folder, or it is damaged."""
    try:
        words = json.loads((folder / WORDS).read_text(encoding="utf-8"))
        return [Picture(name, str(said), (folder / name).read_bytes()) for name, said in words.items()]
    except (OSError, ValueError, AttributeError):
        return []


def _write_pictures(folder: Path, result: RepairResult) -> None:
    first = samples_of(result).images[:1]
    panels = [panel for sample in first for panel in (sample.image, *(each for pair in sample.maps for each in pair))]
    pictures = [_picture(panel) for panel in panels]
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise output_error(folder, error) from error
    with replacing_folder(folder) as temporary:
        for picture in pictures:
            (temporary / picture.name).write_bytes(picture.content)
        write_json(temporary / WORDS, {picture.name: picture.words for picture in pictures})


def _picture(panel: Panel) -> Picture:
    """A panel as a file that is named after its caption."""
    kind, _, content = panel.uri.removeprefix("data:image/").partition(";base64,")
    stem = re.sub(r"[^a-z0-9]+", "-", panel.caption.lower()).strip("-")
    return Picture(f"{stem}.{SUFFIXES[kind]}", panel.alt, base64.b64decode(content))
