"""`sinder evaluate`: does a repair help, measured by tasks and against placebos."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sinder_cli.cli.options import (
    AdapterFile,
    Attention,
    Branch,
    Compare,
    CompareAdapter,
    CompareHeads,
    CompareWeights,
    Format,
    Heads,
    Revision,
    WeightsFile,
    complete_model,
    model_request,
    require_second,
    with_settings,
)
from sinder_cli.cli.output import shared, show
from sinder_cli.evaluation.settings import EvaluateSettings, options_by_task
from sinder_cli.requests import EvaluateRequest, Process


def complete_task(incomplete: str) -> list[str]:
    """Return the installed tasks whose names begin so; none is imported."""
    from sinder_cli.evaluation.registry import installed_tasks

    return [name for name in installed_tasks() if name.startswith(incomplete)]


@with_settings(EvaluateSettings)
def command(
    *,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RUN",
            autocompletion=complete_model,
            help="Name of a model; or a run directory, which is compared with the original model.",
        ),
    ],
    tasks: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK...",
            autocompletion=complete_task,
            help="dense, knn, linear, segmentation, clusters, depth or discovery, or the task of a plugin.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="[TASK=]PATH",
            help="Images or a labelled set, for all tasks or for one; repeatable.",
        ),
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option("--train", metavar="[TASK=]PATH", help="Data to train on, if they are not in --data; repeatable."),
    ] = None,
    weights: WeightsFile = None,
    adapter: AdapterFile = None,
    heads: Heads = None,
    revision: Revision = None,
    branch: Branch = None,
    compare: Compare = None,
    compare_weights: CompareWeights = None,
    compare_adapter: CompareAdapter = None,
    compare_heads: CompareHeads = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="DIR",
            help="Write evaluation.json, evaluation.csv, report.html, pictures and the features into a folder; an"
            " interrupted evaluation continues from its features.",
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            "--features", metavar="DIR", help="Keep features here and use them again; default: in --out, or not kept."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="TASK.NAME=VALUE", help="Setting of a task, such as knn.temperature=0.1; repeatable."
        ),
    ] = None,
    reduce_zero_label: Annotated[
        bool,
        typer.Option("--reduce-zero-label", help="Label 0 is ignored and the others move down, as in ADE20k."),
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="discovery: try several features on each side, and report the best.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier evaluation in --out.")] = False,
    attention: Attention = "auto",
    format: Format = None,
    settings: EvaluateSettings,
) -> None:
    """Evaluate a model, or a run before and after, by tasks, with placebos beside them."""
    from sinder_cli import api
    from sinder_cli.report.documents import evaluation_document
    from sinder_cli.report.progress import display
    from sinder_cli.report.tables import evaluation_table

    second = (compare_weights, compare_adapter, compare_heads)
    require_second([compare] if compare else [], second)
    flags = {"reduce_zero_label": reduce_zero_label, "sweep": sweep}
    options = api.with_flags(options_by_task(option or (), tasks), flags)
    with shared() as ranks, display(ranks.writes) as emit:
        request = model_request(model, weights, adapter, heads, emit, attention, revision, branch)
        other = model_request(compare, *second, emit, attention) if compare else None
        asked = EvaluateRequest(request, tasks, data or (), settings, train or (), options, other, features, force)
        result = api.evaluate(asked, out, process=Process(emit, sys.stdin, ranks=ranks))
    if result is None:  # rank 0 has it
        return
    evaluation = result.evaluation
    show(format, lambda: evaluation_table(evaluation, out), lambda: evaluation_document(evaluation))
