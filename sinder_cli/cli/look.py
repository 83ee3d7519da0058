"""A few photographs as plain arguments of `sinder analyze`: five lines a model, and one picture."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinder_cli.backbone.registry import names_file
from sinder_cli.cli.output import is_json, program_as_called
from sinder_cli.cli.terminal import show_picture
from sinder_cli.distributed import launched
from sinder_cli.errors import DefectsFoundError, UsageError
from sinder_cli.escaping import printable
from sinder_cli.folders import LOOKS, RUNS, WORDS
from sinder_cli.images.sources import LISTS
from sinder_cli.inputs import run_named
from sinder_cli.requests import AnalyzeRequest, Process, model_named

if TYPE_CHECKING:
    from sinder_cli.analysis.settings import AnalyzeSettings
    from sinder_cli.backbone.hooks import ModelRequest
    from sinder_cli.cli.options import OutputFormat

MOST_PHOTOGRAPHS = 8  # more are a data set, and get the table
CHANGES_NOTHING = {"device", "workers", "batch_size"}  # settings that a picture does not show


def is_look(places: Sequence[str], format: OutputFormat | None, settings: AnalyzeSettings) -> bool:
    """Return True for a few photographs as plain arguments, answered in words: no folder, no list, no JSON.

    Processes of `torchrun` share images out, and have a table or a document in any case.
    """
    if not places or len(places) > MOST_PHOTOGRAPHS or not all(map(_is_photograph, places)):
        return False
    return format != "json" and settings.clamp is None and settings.method == "none" and launched().size == 1


def too_many(places: Sequence[str], format: OutputFormat | None) -> str:
    """Return in one line why many photographs get no picture; nothing where none is expected."""
    if len(places) <= MOST_PHOTOGRAPHS or format == "json" or not all(map(_is_photograph, places)):
        return ""
    instead = "a JSON document" if is_json(format) else "a table"
    return f"{len(places):,} photographs: {instead}; up to {MOST_PHOTOGRAPHS} get a picture"


def _is_photograph(place: str) -> bool:
    return names_file(place) and Path(place).suffix.lower() not in LISTS


def look_at(asked: Sequence[AnalyzeRequest], picture: Path | None, fail_on_defects: bool) -> None:
    """Look at photographs with each model, save the picture, and print the answers.

    Raises `DefectsFoundError` at the end, if asked to, where tokens of a model stand out.
    """
    from sinder_cli import api
    from sinder_cli.report.progress import display

    path = picture or Path(LOOKS, name_of(asked))
    if formats := asked[0].settings.figure_formats:
        remedy = "leave --figure-formats out, or add --out DIR for a report with charts"
        raise UsageError(f"cannot write {', '.join(formats)}", "the picture of photographs is a PNG", remedy)
    if path.suffix.lower() != ".png":
        raise UsageError(f"cannot write {path}", "the picture is a PNG", "name a file that ends in .png")
    with display() as emit:
        look = api.look(asked, path, process=Process(emit, sys.stdin))
    for request, answer in zip(asked, look.answers, strict=True):
        print(printable(answer.title))
        for line in answer.lines:
            print(_wrapped(printable(line)))
        if answer.repair:
            print(f"  {printable(how_to_repair(request, answer.skipped))}")
    print(f"Picture: {printable(str(path))} (the whole report: the same command with --out DIR)")
    show_picture(path)
    for answer in look.answers:
        if fail_on_defects and answer.fails:
            raise DefectsFoundError(f"{answer.model} fails", answer.lines[0].rstrip("."))


def _wrapped(line: str) -> str:
    """Return a line, broken at spaces where a terminal is narrower."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
    return textwrap.fill(line, max(width, 40), initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def how_to_repair(request: AnalyzeRequest, skipped: Sequence[str] = ()) -> str:
    """Return the command that repairs a model with all photographs of these folders.

    A run's pictures are no photographs, and neither is a file that was `skipped`.
    """
    model = model_named(request.model)
    options: list[str] = []
    for name in ("weights", "adapter", "heads", "revision", "branch"):
        value = getattr(model, name)
        options += [f"--{name}", str(value)] if value is not None else []
    if request.settings.image_size is not None:
        options += ["--image-size", str(request.settings.image_size)]
    read = [Path(place) for place in request.data if str(Path(place)) not in skipped]
    folders = list(dict.fromkeys(str(path.parent) for path in read))
    named = [part for folder in folders if not (Path(folder) / WORDS).is_file() for part in ("--data", folder)]
    return shlex.join([*program_as_called(), "repair", model.model, *options, *named])


def name_of(asked: Sequence[AnalyzeRequest]) -> str:
    """Return a name for the picture: the first photograph, the models, and a hash of what these do not say."""
    photographs = [str(place) for place in asked[0].data]
    more = f"-and-{len(photographs) - 1}-more" if len(photographs) > 1 else ""
    models = [model_named(request.model) for request in asked]
    words = f"{Path(photographs[0]).stem[:40]}{more}-{'-'.join(map(_short, models[:3]))}"[:100]
    unsaid = [*_unsaid_of_photographs(photographs), *_unsaid_of_models(models), *_unsaid_of_settings(asked[0])]
    digest = f"-{hashlib.sha256(repr(unsaid).encode()).hexdigest()[:8]}" if unsaid else ""
    return f"{words}{digest}.png"


def _short(model: ModelRequest) -> str:
    """Return a model's name with that of its weights, if they were named; of a run, the name of its folder."""
    if run_named(model):
        return f"{_plain(Path(model.model).resolve().name)}-run"
    parts = (Path(model.model).name, model.weights.stem if model.weights else "")
    return "-".join(_plain(part) for part in parts if part)


def _plain(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)[:40]


def _unsaid_of_photographs(photographs: Sequence[str]) -> list[str]:
    """Return what tells photographs apart; nothing for a single .jpg in the working directory, whose stem does."""
    paths = [_absolute(Path(place)) for place in photographs]
    first = paths[0]
    if len(paths) == 1 and first.parent == Path.cwd() and first.suffix == ".jpg" and len(first.stem) <= 40:
        return []
    return list(map(str, paths))


def _unsaid_of_models(models: Sequence[ModelRequest]) -> list[str]:
    """Return what tells models apart; nothing for a single one that its name, or that of its run, tells apart."""
    if len(models) == 1 and _is_said(models[0]):
        return []
    return [repr(_identity(model)) for model in models]


def _is_said(model: ModelRequest) -> bool:
    if any((model.weights, model.adapter, model.heads, model.revision, model.branch)):
        return False
    run = _absolute(Path(model.model))
    name = run.name if run_named(model) and run.parent == Path.cwd() / RUNS else model.model
    return re.fullmatch(r"\w[\w.]{,39}", name) is not None and (name != model.model or not run_named(model))


def _identity(model: ModelRequest) -> tuple[object, ...]:
    name = _absolute(Path(model.model)) if run_named(model) else model.model
    files = [path and str(_absolute(path)) for path in (model.weights, model.adapter)]
    return str(name), *files, model.heads, model.revision, model.branch


def _absolute(path: Path) -> Path:
    """Return a path from the root, without links but for the last name."""
    return path.parent.resolve() / path.name


def _unsaid_of_settings(asked: AnalyzeRequest) -> list[tuple[str, Any]]:
    return sorted(asked.settings.model_dump(exclude_defaults=True, exclude=CHANGES_NOTHING).items())
