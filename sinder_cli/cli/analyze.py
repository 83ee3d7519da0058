"""`sinder analyze`: what the tokens do, block by block."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.backbone.registry import hooks_for, names_file
from sinder_cli.cli.look import is_look, look_at, too_many
from sinder_cli.cli.options import (
    AdapterFile,
    Attention,
    Branch,
    CompareAdapter,
    CompareHeads,
    CompareSeveral,
    CompareWeights,
    Data,
    Format,
    Heads,
    Model,
    Photographs,
    Revision,
    WeightsFile,
    model_request,
    one_compared,
    require_second,
    with_settings,
)
from sinder_cli.cli.output import shared, show
from sinder_cli.errors import DefectsFoundError, SinderError, UsageError
from sinder_cli.events import Noted, silent
from sinder_cli.requests import AnalyzeRequest, Process

if TYPE_CHECKING:
    from sinder_cli.analysis.run import AnalysisResult


@with_settings(AnalyzeSettings)
def command(
    *,
    model: Model,
    more_data: Photographs = None,
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
    compare: CompareSeveral = None,
    compare_weights: CompareWeights = None,
    compare_adapter: CompareAdapter = None,
    compare_heads: CompareHeads = None,
    features: Annotated[
        Path | None,
        typer.Option(
            "--features",
            metavar="DIR",
            help="Write one safetensors file per image into a new folder: patches and cls of the last block after the"
            " final norm; with --method inpaint, of the inpainted pass.",
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            metavar="FILE.png",
            help="Where to save the picture of photographs given as plain arguments; default: in sinder-looks/.",
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
    places = [*(data or []), *(more_data or [])]
    second = (compare_weights, compare_adapter, compare_heads)
    alone = not (data or out or features)
    looking = alone and is_look(places, format, settings)
    compared = compare or [] if looking else one_compared(compare)
    require_second(compared, second)
    if out == "":
        raise UsageError("no folder to write to", "--out is empty", "name one, or - for standard output")
    if picture and not looking:
        why = "it shows up to 8 photographs given as plain arguments, without --data, --out, --features, --format json"
        raise UsageError("no picture to save", why, "leave --picture out")
    if names_file(model):  # most likely a photograph; models may be called like a file
        hooks_for(model)
    request = model_request(model, weights, adapter, heads, silent, attention, revision, branch)
    others = [model_request(each, *second, silent, attention) for each in compared]
    if looking:
        look_at([AnalyzeRequest(each, places, settings) for each in (request, *others)], picture, fail_on_defects)
        return
    asked = AnalyzeRequest(request, places, settings, next(iter(others), None), features)
    _report(asked, out, format, fail_on_defects, too_many(places, format) if alone else "")


def _report(asked: AnalyzeRequest, out: str | None, format: Format, fail_on_defects: bool, note: str) -> None:
    """Analyze, write what was asked for, and print the table or the document; a `note` is told before."""
    from sinder_cli import api
    from sinder_cli.report.documents import analysis_document
    from sinder_cli.report.progress import display
    from sinder_cli.report.tables import analysis_table

    problem: SinderError | None = None
    with shared() as ranks, display(ranks.writes) as emit:
        if note:
            emit(Noted(note))
        try:
            result = api.analyze(asked, None if out == "-" else out, process=Process(emit, sys.stdin, ranks=ranks))
        except SinderError as error:
            if error.found is None:
                raise
            result, problem = cast("AnalysisResult", error.found), error
    if result is None:  # rank 0 has it
        return
    analysis, folder = result.analysis, None if problem else result.folder
    table = functools.partial(analysis_table, analysis, folder, asked.features)
    show("json" if out == "-" else format, table, lambda: analysis_document(analysis))
    if problem:
        raise problem
    if fail_on_defects and analysis.verdict.fails:
        raise DefectsFoundError(f"{analysis.model} fails", analysis.verdict.sentence.rstrip("."))
