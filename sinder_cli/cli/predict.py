"""`sinder predict-defects`: defect directions from the weights alone."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from sinder_cli import api
from sinder_cli.cli.options import AdapterFile, Branch, Format, Heads, Model, Revision, WeightsFile, model_request
from sinder_cli.cli.output import show
from sinder_cli.report.progress import display
from sinder_cli.requests import PredictRequest, Process

if TYPE_CHECKING:
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

    stages = cast("list[Stage]", [name.value for name in StageName if name in (stage or StageName)])
    place = sys.stdout.buffer if out == "-" else Path(out) if out else None
    with display() as emit:
        request = model_request(model, weights, adapter, heads, emit, revision=revision, branch=branch)
        prediction = api.predict_defects(PredictRequest(request, stages), place, process=Process(emit))
    if out != "-":
        show(format, lambda: prediction_table(prediction), lambda: prediction_document(prediction))
