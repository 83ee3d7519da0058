"""`sinder predict-defects`: defect directions from the weights alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sinder_cli.backbone.device import DEVICE_NAMES
from sinder_cli.cli.options import AdapterFile, Branch, Format, Heads, Model, Revision, WeightsFile, model_request
from sinder_cli.cli.output import show
from sinder_cli.defects.settings import STAGES
from sinder_cli.requests import PredictRequest, Process


def stage_name(text: str) -> str:
    """Return the name of a stage as it was given. Raises typer's own error for any other text."""
    if text not in STAGES:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(STAGES)}.")
    return text


def complete_stage(incomplete: str) -> list[str]:
    """Return the stages whose names begin so."""
    return [name for name in STAGES if name.startswith(incomplete)]


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
        list[str] | None,
        typer.Option(
            "--stage",
            metavar=f"<{'|'.join(STAGES)}>",
            parser=stage_name,
            autocompletion=complete_stage,
            help="Only this stage; repeatable. Default: all four.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="NAME",
            help=f"Device to run on: {DEVICE_NAMES}. A GPU takes seconds to start: it pays for the largest models.",
        ),
    ] = "cpu",
    format: Format = None,
) -> None:
    """Predict the defect directions of every block from the weights alone."""
    from sinder_cli import api
    from sinder_cli.report.documents import prediction_document
    from sinder_cli.report.progress import display
    from sinder_cli.report.tables import prediction_table

    stages = [name for name in STAGES if name in (stage or STAGES)]
    place = sys.stdout.buffer if out == "-" else Path(out) if out else None
    with display() as emit:
        request = model_request(model, weights, adapter, heads, emit, revision=revision, branch=branch)
        prediction = api.predict_defects(PredictRequest(request, stages, device), place, process=Process(emit))
    if out != "-":
        show(format, lambda: prediction_table(prediction), lambda: prediction_document(prediction))
