"""The public Python API: one function a command, `from sinder_cli import predict_defects, analyze, repair, export`.

Each takes one request, writes all that its command writes to `out`, and returns a record. Nothing is printed but with
`progress=True`, on standard error. Errors are `SinderError`s: one line, `WHAT: WHY; WHAT TO DO`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli import api
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.backbone.contract import ModelRequest
from sinder_cli.defects.settings import STAGES, Stage
from sinder_cli.events import Emit, silent
from sinder_cli.exporting.settings import ExportSettings
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.report.progress import display

if TYPE_CHECKING:
    from sinder_cli.analysis.survey import AnalysisResult
    from sinder_cli.defects.prediction import Prediction
    from sinder_cli.exporting.run import ExportResult
    from sinder_cli.repairing.results import RepairResult

__all__ = [
    "AnalyzeRequest",
    "AnalyzeSettings",
    "ExportRequest",
    "ExportSettings",
    "PredictRequest",
    "RepairRequest",
    "RepairSettings",
    "analyze",
    "export",
    "predict_defects",
    "repair",
]

Place = str | Path
Named = str | Path | ModelRequest  # a model's name or a run directory; or these with weights, heads, adapter, …


@dataclass(frozen=True)
class PredictRequest:
    """What `sinder predict-defects` is asked for."""

    model: Named
    stages: Sequence[Stage] = STAGES


@dataclass(frozen=True)
class AnalyzeRequest:
    """What `sinder analyze` is asked for; without `data`, a backbone that draws images brings its own."""

    model: Named
    data: Sequence[Place] = ()  # folders, files, or lists of files
    settings: AnalyzeSettings = field(default_factory=lambda: AnalyzeSettings.model_validate({}))
    compare: Named | None = None  # another model, or a run of this one
    features: Path | None = None  # a new folder for the tokens of the last block, a file an image


@dataclass(frozen=True)
class RepairRequest:
    """What `sinder repair` is asked for; without `data`, pictures are drawn to train on."""

    model: Named
    data: Sequence[Place] = ()
    settings: RepairSettings = field(default_factory=lambda: RepairSettings.model_validate({}))
    resume: bool = False  # go on with an unfinished run in `out`
    force: bool = False  # replace a run that is there


@dataclass(frozen=True)
class ExportRequest:
    """What `sinder export` is asked for."""

    source: Named  # a run directory, or a model
    settings: ExportSettings
    data: Sequence[Place] = ()  # images for the check of what was written


def predict_defects(request: PredictRequest, out: Place | None = None, *, progress: bool = False) -> Prediction:
    """Predict the defect directions of every block from the weights alone.

    `out` is a safetensors file for them: one `[blocks, N]` float32 tensor a stage.
    """
    with _told(progress) as emit:
        return api.predict(_model(request.model, emit), request.stages, emit, None if out is None else Path(out))


def analyze(request: AnalyzeRequest, out: Place | None = None, *, progress: bool = False) -> AnalysisResult:
    """Look at what the tokens do over a set of images, block by block.

    `out` is a new folder for report, document, directions and figures, or a file `….json` for the document alone.
    """
    with _told(progress) as emit:
        other = None if request.compare is None else _model(request.compare, emit)
        result = api.analyze(
            _model(request.model, emit),
            _places(request.data),
            request.settings,
            emit,
            other=other,
            out=None if out is None else Path(out),
            features=request.features,
        )
    assert result is not None  # of the one process that there is
    return result


def repair(request: RepairRequest, out: Place, *, progress: bool = False) -> RepairResult:
    """Repair a backbone's singular defects, and leave a run directory in `out`.

    `result.summary["verdict"]` is `healthy`, `repaired`, `improved` or `not improved`.
    """
    with _told(progress) as emit:
        result = api.repair(
            _model(request.model, emit),
            _places(request.data),
            Path(out),
            request.settings,
            emit,
            resume=request.resume,
            force=request.force,
        )
    assert result is not None  # of the one process that there is
    return result


def export(request: ExportRequest, out: Place, *, progress: bool = False) -> ExportResult:
    """Write the weights of a run or a model to `out` in a format that others load; checked before it gets its name."""
    with _told(progress) as emit:
        return api.export(_model(request.source, emit), Path(out), request.settings, _places(request.data))


def _told(progress: bool) -> AbstractContextManager[Emit]:
    return display() if progress else nullcontext(silent)


def _model(named: Named, emit: Emit) -> ModelRequest:
    request = named if isinstance(named, ModelRequest) else ModelRequest(str(named))
    return replace(request, emit=emit)


def _places(data: Sequence[Place]) -> list[str]:
    """Where images lie; one place alone may be given without a list around it."""
    return [str(place) for place in ([data] if isinstance(data, str | Path) else data)]
