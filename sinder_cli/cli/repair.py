"""`sinder repair`: fine-tune singular values until the defects are gone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sinder_cli import api
from sinder_cli.cli.display import display
from sinder_cli.cli.options import (
    Attention,
    Data,
    Format,
    Heads,
    Model,
    MoreData,
    WeightsFile,
    model_request,
    with_settings,
)
from sinder_cli.cli.output import show
from sinder_cli.files import write_text
from sinder_cli.repair.settings import RepairSettings


@with_settings(RepairSettings)
def command(
    *,
    model: Model,
    more_data: MoreData = None,
    data: Data = None,
    weights: WeightsFile = None,
    heads: Heads = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run directory; default: sinder-runs/MODEL.")
    ] = None,
    attention: Attention = "auto",
    format: Format = None,
    settings: RepairSettings,
) -> None:
    """Repair a backbone's singular defects with unlabelled images."""
    from sinder_cli.repair.folder import RunFolder
    from sinder_cli.report.documents import repair_document
    from sinder_cli.report.repair.card import render_card
    from sinder_cli.report.repair.page import render_repair_page
    from sinder_cli.report.tables import repair_table

    places = [*(data or []), *(more_data or [])]
    folder = out or Path("sinder-runs", model.replace("/", "-"))
    with display() as emit:
        request = model_request(model, weights, heads, emit, attention)
        result = api.repair(request, places, folder, settings, emit, sys.stdin)
    run = RunFolder(result.folder)
    write_text(run.report, render_repair_page(result))
    write_text(run.card, render_card(result))
    show(format, lambda: repair_table(result), lambda: repair_document(result))
