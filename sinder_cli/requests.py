"""Requests: what each command is asked for, as records; and what a call shares with the process that makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.backbone.hooks import ModelRequest
from sinder_cli.defects.settings import STAGES, Stage
from sinder_cli.distributed import ALONE, Ranks
from sinder_cli.evaluation.settings import EvaluateSettings
from sinder_cli.events import Emit, silent
from sinder_cli.exporting.targets import ExportSettings
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.signals import Stop

Place = str | Path
ModelOrRun = str | Path | ModelRequest  # a model's name or a run directory; or these with weights, heads, adapter, …


@dataclass(frozen=True)
class Process:
    """What a call shares with the process that makes it."""

    emit: Emit = silent  # receives progress and warnings
    stdin: IO[str] | None = None  # read for the place `-`; None: that of the process
    stop: Stop | None = None  # may ask a repair to end after a step
    ranks: Ranks = ALONE  # of a run of several processes, each of which makes the same call


@dataclass(frozen=True)
class PredictRequest:
    """Request of `sinder predict-defects`: the directions of which stages, of which model."""

    model: ModelOrRun
    stages: Sequence[Stage] = STAGES
    device: str = "cpu"  # as in the settings of the other requests; a GPU pays for large models


@dataclass(frozen=True)
class AnalyzeRequest:
    """Request of `sinder analyze`; without `data`, a backbone that draws images brings its own."""

    model: ModelOrRun
    data: Sequence[Place] = ()  # folders, files, or lists of files
    settings: AnalyzeSettings = field(default_factory=lambda: AnalyzeSettings.model_validate({}))
    compare: ModelOrRun | None = None  # another model, or a run of this one
    features: Path | None = None  # a new folder for the tokens of the last block, one file per image
    portraits: bool = False  # prepare pictures of images though nothing is written; they are made when iterated over


@dataclass(frozen=True)
class RepairRequest:
    """Request of `sinder repair`; without `data`, pictures are drawn to train on."""

    model: ModelOrRun
    data: Sequence[Place] = ()
    settings: RepairSettings = field(default_factory=lambda: RepairSettings.model_validate({}))
    resume: bool = False  # resume an unfinished run in `out`
    force: bool = False  # replace a run in `out`


@dataclass(frozen=True)
class EvaluateRequest:
    """Request of `sinder evaluate`: tasks on a model, or on a run before and after.

    A place in `data` or `train` that begins with `TASK=` is for that task alone.
    """

    model: ModelOrRun
    tasks: Sequence[str]
    data: Sequence[Place] = ()
    settings: EvaluateSettings = field(default_factory=lambda: EvaluateSettings.model_validate({}))
    train: Sequence[Place] = ()  # data to train on, where they do not lie beside the others
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # settings of tasks: task → name → value
    compare: ModelOrRun | None = None  # a second model of the same shape
    features: Path | None = None  # a folder that keeps features between calls
    force: bool = False  # replace an evaluation in `out`


@dataclass(frozen=True)
class ExportRequest:
    """Request of `sinder export`: the weights of a run or a model, in another format."""

    source: ModelOrRun  # a run directory, or a model
    settings: ExportSettings
    data: Sequence[Place] = ()  # images for the check of what was written


def model_named(named: ModelOrRun, emit: Emit | None = None) -> ModelRequest:
    """Return the request for a model; `emit`, if given, receives what is reported while it is opened."""
    request = named if isinstance(named, ModelRequest) else ModelRequest(str(named))
    return request if emit is None else replace(request, emit=emit)


def places_named(data: Sequence[Place]) -> list[str]:
    """Return where images lie; one place alone may be given without a list around it."""
    return [str(place) for place in ([data] if isinstance(data, str | Path) else data)]
