"""`sinder analyze`: what the tokens do, block by block."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from sinder_cli import api
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.cli.options import (
    AdapterFile,
    Attention,
    Branch,
    Data,
    Format,
    Heads,
    Model,
    MoreData,
    Revision,
    WeightsFile,
    model_request,
    with_settings,
)
from sinder_cli.cli.output import shared, show
from sinder_cli.errors import DefectsFoundError, SinderError, UsageError
from sinder_cli.report.progress import display
from sinder_cli.requests import AnalyzeRequest, Process

if TYPE_CHECKING:
    from sinder_cli.analysis.run import AnalysisResult


@with_settings(AnalyzeSettings)
def command(
    *,
    model: Model,
    more_data: MoreData = None,
    data: Data = None,
    weights: WeightsFile = None,
    adapter: AdapterFile = None,
    heads: Heads = None,
    revision: Revision = None,
    branch: Branch = None,
    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            metavar="DIR|FILE.json",
            help="Write report.html, report.json, directions and figures into a new folder; or the JSON document alone"
            " into a file; - for JSON on stdout.",
        ),
    ] = None,
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="MODEL|RUN", help="A second model of the same shape, or a run.")
    ] = None,
    compare_weights: Annotated[
        Path | None, typer.Option("--compare-weights", metavar="FILE", help="Checkpoint of the second model.")
    ] = None,
    compare_adapter: Annotated[
        Path | None, typer.Option("--compare-adapter", metavar="FILE", help="Adapter of the second model.")
    ] = None,
    compare_heads: Annotated[
        int | None, typer.Option("--compare-heads", min=1, help="Attention heads of the second model.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            "--features",
            metavar="DIR",
            help="Write one safetensors file per image into a new folder: patches and cls of the last block after the"
            " final norm; with --method inpaint, of the inpainted pass.",
        ),
    ] = None,
    fail_on_defects: Annotated[
        bool,
        typer.Option("--fail-on-defects", help="Exit with 1 if tokens stand out, predicted or not, or are not finite."),
    ] = False,
    attention: Attention = "auto",
    format: Format = None,
    settings: AnalyzeSettings,
) -> None:
    """Show token norms, defects, and observed against predicted directions."""
    second = (compare_weights, compare_adapter, compare_heads)
    if any(second) and compare is None:
        why = "--compare-weights, --compare-adapter and --compare-heads need one"
        raise UsageError("no second model", why, "name it with --compare")
    if out == "":
        raise UsageError("no folder to write to", "--out is empty", "name one, or - for standard output")
    problem: SinderError | None = None
    with shared() as ranks, display(ranks.writes) as emit:
        request = model_request(model, weights, adapter, heads, emit, attention, revision, branch)
        other = model_request(compare, *second, emit, attention) if compare else None
        asked = AnalyzeRequest(request, [*(data or []), *(more_data or [])], settings, other, features)
        try:
            result = api.analyze(asked, None if out == "-" else out, process=Process(emit, sys.stdin, ranks=ranks))
        except SinderError as error:
            if error.found is None:
                raise
            result, problem = cast("AnalysisResult", error.found), error
        if result is None:  # rank 0 has it
            return
    from sinder_cli.report.documents import analysis_document
    from sinder_cli.report.tables import analysis_table

    analysis, folder = result.analysis, None if problem else result.folder
    table = functools.partial(analysis_table, analysis, folder, features)
    show("json" if out == "-" else format, table, lambda: analysis_document(analysis))
    if problem:
        raise problem
    if fail_on_defects and analysis.verdict.fails:
        raise DefectsFoundError(f"{analysis.model} fails", analysis.verdict.sentence.rstrip("."))
