"""A few photographs as plain arguments of `sinder analyze`: five lines a model, and one picture."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.cli.output import is_json, program_as_called
from sinder_cli.errors import DefectsFoundError, UsageError
from sinder_cli.escaping import printable
from sinder_cli.folders import LOOKS, WORDS
from sinder_cli.images.sources import LISTS
from sinder_cli.requests import AnalyzeRequest, Process, model_named

if TYPE_CHECKING:
    from sinder_cli.analysis.settings import AnalyzeSettings
    from sinder_cli.backbone.hooks import ModelRequest
    from sinder_cli.cli.options import OutputFormat

MOST_PHOTOGRAPHS = 8  # more are a data set, and get the table
SHOWN_COLUMNS = 160  # of the terminal, at most, that a picture is wide


def is_look(places: Sequence[str], format: OutputFormat | None, settings: AnalyzeSettings) -> bool:
    """Return True for a few photographs on the command line, answered in words: no folder, no list, no JSON."""
    few = 0 < len(places) <= MOST_PHOTOGRAPHS and all(_is_photograph(place) for place in places)
    return few and not is_json(format) and settings.clamp is None and settings.method == "none"


def _is_photograph(place: str) -> bool:
    path = Path(place)
    return path.is_file() and path.suffix.lower() not in LISTS


def look_at(asked: Sequence[AnalyzeRequest], picture: Path | None, fail_on_defects: bool) -> None:
    """Look at photographs with each model, save the picture, and print the answers.

    Raises `DefectsFoundError` at the end, if asked to, where tokens of a model stand out.
    """
    from sinder_cli import api
    from sinder_cli.report.progress import display

    path = picture or Path(LOOKS, name_of(asked))
    if path.suffix.lower() != ".png":
        raise UsageError(f"cannot write {path}", "the picture is a PNG", "name a file that ends in .png")
    with display() as emit:
        look = api.look(asked, path, process=Process(emit, sys.stdin))
    for request, answer in zip(asked, look.answers, strict=True):
        print(printable(answer.title))
        for line in answer.lines:
            print(_wrapped(printable(line)))
        if answer.repair:
            print(f"  {printable(how_to_repair(request))}")
    print(f"Picture: {printable(str(path))} (the whole report: the same command with --out DIR)")
    _show_in_terminal(path)
    for answer in look.answers:
        if fail_on_defects and answer.fails:
            raise DefectsFoundError(f"{answer.model} fails", answer.lines[0].rstrip("."))


def _wrapped(line: str) -> str:
    """Return a line, broken at spaces where a terminal is narrower."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
    return textwrap.fill(line, max(width, 40), initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def how_to_repair(request: AnalyzeRequest) -> str:
    """Return the command that repairs a model with all photographs of these folders; a run's pictures are none."""
    model = model_named(request.model)
    options: list[str] = []
    for name in ("weights", "adapter", "heads", "revision", "branch"):
        value = getattr(model, name)
        options += [f"--{name}", str(value)] if value is not None else []
    if request.settings.image_size is not None:
        options += ["--image-size", str(request.settings.image_size)]
    folders = list(dict.fromkeys(str(Path(place).parent) for place in request.data))
    named = [part for folder in folders if not (Path(folder) / WORDS).is_file() for part in ("--data", folder)]
    return shlex.join([*program_as_called(), "repair", model.model, *options, *named])


def name_of(asked: Sequence[AnalyzeRequest]) -> str:
    """Return a name for the picture, of the first photograph and the models."""
    photographs = asked[0].data
    more = f"-and-{len(photographs) - 1}-more" if len(photographs) > 1 else ""
    models = "-".join(_short(model_named(request.model)) for request in asked[:3])
    return f"{Path(photographs[0]).stem[:40]}{more}-{models}.png"


def _short(model: ModelRequest) -> str:
    """Return a model's name with that of its weights, if they were named: two of one model have two pictures."""
    parts = (Path(model.model).name, model.weights.stem if model.weights else "")
    return "-".join(re.sub(r"[^\w.-]+", "-", part)[:40] for part in parts if part)


def _show_in_terminal(path: Path) -> None:
    """Show a picture in a terminal that speaks the protocol of kitty or sixel, if the extra `terminal` is there."""
    if not sys.stdout.isatty():
        return
    with suppress(Exception):  # the library is an extra, and a terminal may answer anything; the file is there
        from rich.console import Console
        from textual_image.renderable import HalfcellImage, Image, UnicodeImage

        console = Console()
        if Image not in (HalfcellImage, UnicodeImage):  # coarse blocks would show nothing of this
            console.print(Image(path, width=min(console.width, SHOWN_COLUMNS)))
