"""`sinder predict-defects`: defect directions from the weights alone."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from sinder_cli import api
from sinder_cli.cli.display import display
from sinder_cli.cli.options import AdapterFile, Branch, Format, Heads, Model, Revision, WeightsFile, model_request
from sinder_cli.cli.output import show
from sinder_cli.files import require_writable_file

if TYPE_CHECKING:
    from sinder_cli.defects.prediction import Prediction
    from sinder_cli.defects.settings import Stage


class StageName(str, Enum):
    """The four stages, as choices of an option that can be repeated."""

    ATTENTION = "attention"
    MLP = "mlp"
    BLOCK = "block"
    CUMULATIVE = "cumulative"


def command(
    model: Model,
    weights: WeightsFile = None,
    adapter: AdapterFile = None,
    heads: Heads = None,
    revision: Revision = None,
    branch: Branch = None,
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", metavar="FILE", help="Write the directions as safetensors; - for stdout."),
    ] = None,
    stage: Annotated[
        list[StageName] | None, typer.Option("--stage", help="Only this stage; repeatable. Default: all four.")
    ] = None,
    format: Format = None,
) -> None:
    """Predict the defect directions of every block from the weights alone."""
    from sinder_cli.report.documents import prediction_document
    from sinder_cli.report.tables import prediction_table

    if out and out != "-":
        require_writable_file(Path(out))
    stages = cast("list[Stage]", [name.value for name in StageName if name in (stage or StageName)])
    with display() as emit:
        request = model_request(model, weights, adapter, heads, emit, revision=revision, branch=branch)
        prediction = api.predict(request, stages, emit)
    if out:
        _write_directions(out, prediction)
    if out != "-":
        show(format, lambda: prediction_table(prediction), lambda: prediction_document(prediction))


def _write_directions(out: str, prediction: Prediction) -> None:
    """One `[blocks, N]` float32 tensor a stage."""
    from sinder_cli.backbone.sources import infos_of
    from sinder_cli.backbone.storing import stream_safetensors, write_safetensors

    tensors = {str(stage): prediction.directions(stage) for stage in prediction.stages}
    metadata = {"model": prediction.model, "content": "defect directions, rows of unit norm"}
    if out == "-":
        stream_safetensors(sys.stdout.buffer, infos_of(tensors), tensors.values(), metadata)
    else:
        write_safetensors(Path(out), infos_of(tensors), tensors.values(), metadata)
