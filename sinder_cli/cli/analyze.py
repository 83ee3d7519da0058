"""`sinder analyze`: what the tokens do, block by block."""

from __future__ import annotations

import sys

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
from sinder_cli.defects.settings import AnalyzeSettings


@with_settings(AnalyzeSettings)
def command(
    *,
    model: Model,
    more_data: MoreData = None,
    data: Data = None,
    weights: WeightsFile = None,
    heads: Heads = None,
    attention: Attention = "auto",
    format: Format = None,
    settings: AnalyzeSettings,
) -> None:
    """Show token norms, defects, and observed against predicted directions."""
    from sinder_cli.report.documents import analysis_document
    from sinder_cli.report.tables import analysis_table

    places = [*(data or []), *(more_data or [])]
    with display() as emit:
        request = model_request(model, weights, heads, emit, attention)
        analysis = api.analyze(request, places, settings, emit, sys.stdin)
    show(format, lambda: analysis_table(analysis), lambda: analysis_document(analysis))
