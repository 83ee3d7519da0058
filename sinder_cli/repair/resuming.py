"""What a run was called with: all that `--resume` needs to go on with it, from its directory alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sinder_cli.backbone.attention import AttentionName
from sinder_cli.backbone.contract import ModelRequest
from sinder_cli.errors import ConflictError
from sinder_cli.faults import first_fault
from sinder_cli.images.sources import ImageFiles, find_images
from sinder_cli.repair.folder import RunFolder
from sinder_cli.repair.imagelist import read_list
from sinder_cli.repair.settings import WITHOUT_EFFECT, RepairSettings


def call_of(request: ModelRequest, places: Sequence[str]) -> dict[str, Any]:
    """The part of `config.json` that says how the run was called, from whatever folder."""
    is_run = RunFolder(Path(request.model)).is_run
    return {
        "model": str(Path(request.model).absolute()) if is_run else request.model,
        "weights": _absolute(request.weights),
        "branch": request.branch,
        "adapter": _absolute(request.adapter),
        "data": [place if place == "-" else str(Path(place).absolute()) for place in places],
    }


def as_called(folder: RunFolder, given: ModelRequest, settings: RepairSettings) -> tuple[ModelRequest, RepairSettings]:
    """Model and settings of a run, and over them what is given now.

    Raises `ConflictError` for the run of another version, and `BadInputError` for a `config.json` that is torn.
    """
    stored = _stored(folder)
    request = replace(
        given,
        model=stored.call.model,
        weights=given.weights or _path(stored.call.weights),
        adapter=given.adapter or _path(stored.call.adapter),
        branch=given.branch or stored.call.branch,
        heads=given.heads or stored.heads,
        revision=given.revision or stored.revision,
        attention=stored.attention if given.attention == "auto" else given.attention,
    )
    return request, stored.settings.model_copy(update=settings.model_dump(exclude_unset=True))


class _Call(BaseModel):
    """How a run was called, as `call_of` has it."""

    model_config = ConfigDict(strict=True)

    model: str
    weights: str | None
    adapter: str | None
    data: list[str]
    branch: str | None = None


class _Stored(BaseModel):
    """What of a `config.json` it takes to go on with a run."""

    call: _Call
    heads: Annotated[int | None, Field(ge=1)]
    revision: str | None
    attention: AttentionName
    settings: RepairSettings


def _stored(folder: RunFolder) -> _Stored:
    """Read it. Raises `ConflictError` where a part is missing or of another kind, and names it."""
    config = folder.read_config()
    try:
        return _Stored.model_validate(config)
    except ValidationError as error:
        place, why = first_fault(error)
        what = f"its config.json is of another version of sinder, or damaged ({'.'.join(place)}: {why})"
        raise ConflictError(
            f"cannot resume {folder.path}", what, "use that version, or start anew with --force"
        ) from error


def images_of(folder: RunFolder) -> ImageFiles | None:
    """The images that a run has listed, wherever they were named; None for one whose backbone draws them.

    One that was killed before it had listed them has their places.
    """
    if not folder.images.is_file():
        places = _stored(folder).call.data if "call" in folder.read_config() else []
        return find_images(places) if places else None
    return ImageFiles(tuple(Path(image.path) for image in read_list(folder.images)))


def other_options(folder: RunFolder, settings: RepairSettings) -> list[str]:
    """The options that a run goes on with now and did not begin with; all of them are without effect on its result."""
    stored = folder.read_config()["settings"]
    now = settings.model_dump(mode="json")
    words: list[str] = []
    for name in sorted(WITHOUT_EFFECT):
        if now[name] != stored[name]:
            values = now[name] if isinstance(now[name], list) else [now[name]]
            flag = f"--{name.replace('_', '-')}"
            for value in values:
                if value is True:
                    words.append(flag)
                elif value is not False and value is not None:  # the default
                    words += [flag, str(value)]
    return words


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _path(stored: str | None) -> Path | None:
    return None if stored is None else Path(stored)
