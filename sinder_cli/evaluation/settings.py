"""The settings of `sinder evaluate`, and those that a task has beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sinder_cli.defects.settings import MOST, NORM_FACTOR, FigureFormats, PassSettings
from sinder_cli.errors import UsageError
from sinder_cli.faults import first_fault


class EvaluateSettings(PassSettings):
    """Settings of an evaluation that all tasks share."""

    norm_factor: float = Field(
        NORM_FACTOR,
        gt=0,
        description="Multiple of the median norm above which a token of the original is marked: the placebos replace"
        " marked tokens.",
    )
    no_placebos: bool = Field(False, description="Leave out the three placebos.")
    limit: int | None = Field(
        None, ge=1, le=MOST, description="Use at most this many images of each split, drawn by the seed."
    )
    resamples: int = Field(
        2000, ge=100, le=10**6, description="Resamples of the images for the 95 % intervals of differences."
    )
    figures: int = Field(8, ge=0, le=MOST, description="Images to draw: those that changed most, both ways.")
    figure_formats: FigureFormats = ()


class TaskSettings(BaseModel):
    """Base of a task's own settings: frozen, and without unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Own = TypeVar("Own", bound=TaskSettings)


def options_by_task(options: Sequence[str], tasks: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the values of `TASK.NAME=VALUE` options by task and name.

    Raises `UsageError` for an option of another form, or of a task that is not among `tasks`.
    """
    found: dict[str, dict[str, str]] = {task: {} for task in tasks}
    for option in options:
        place, equals, value = option.partition("=")
        task, dot, name = place.partition(".")
        if not (equals and dot and name):
            raise UsageError(f"bad option --set {option}", "it is not TASK.NAME=VALUE", "such as knn.temperature=0.1")
        if task not in found:
            raise UsageError(f"bad option --set {option}", f"task {task!r} is not run", f"name {', '.join(tasks)}")
        found[task][name.replace("-", "_")] = value
    return found


def task_settings(kind: type[Own], given: Mapping[str, Any], task: str) -> Own:
    """Return a task's settings. Raises `UsageError` that names the setting and what is wrong with it."""
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        place, why = first_fault(error, kind.model_fields)
        what = f"bad setting {task}.{place[0]}" if place else f"settings of {task} contradict each other"
        known = ", ".join(kind.model_fields) or "none"
        raise UsageError(what, why, f"{task} has {f'the settings {known}' if known else 'no settings'}") from error
