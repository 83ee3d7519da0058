"""The pictures of a run directory: files, and a list with a description of each."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sinder_cli.files import output_error, replacing_folder, write_json
from sinder_cli.folders import WORDS
from sinder_cli.report.drawing.canvas import Chart, ChartKind
from sinder_cli.report.drawing.pictures import Panel

PNG: ChartKind = "png"


class PictureFile(NamedTuple):
    """A picture as a file, and a description of it."""

    name: str
    words: str
    content: bytes


def write_pictures(
    folder: Path, panels: Sequence[Panel], charts: Sequence[Chart] = (), formats: Sequence[ChartKind] = ()
) -> None:
    """Write the images of panels, named after their captions, and charts; pictures that exist already are replaced.

    Charts are PNG, and in these formats besides.

    Raises `StorageError` or `CannotCreateError` for what the file system refuses.
    """
    contents, words = {}, {}
    for panel in panels:
        if panel.image is not None:
            name = re.sub(r"[^a-z0-9]+", "-", panel.caption.lower()).strip("-") + panel.image.suffix
            contents[name], words[name] = panel.image.content, panel.alt
    for chart in charts:
        contents |= {f"{chart.name}.{kind}": chart.written(kind) for kind in dict.fromkeys((PNG, *formats))}
        words[f"{chart.name}.{PNG}"] = chart.caption
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise output_error(folder, error) from error
    with replacing_folder(folder) as temporary:
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        write_json(temporary / WORDS, words)


def read_pictures(folder: Path) -> list[PictureFile]:
    """Read the pictures of a run; return an empty list if the folder is missing or damaged."""
    try:
        words = json.loads((folder / WORDS).read_text(encoding="utf-8"))
        return [PictureFile(name, str(said), (folder / name).read_bytes()) for name, said in words.items()]
    except (OSError, ValueError, AttributeError):
        return []
