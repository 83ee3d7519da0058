"""`sinder export`: write a repaired or original backbone where people load models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from sinder_cli.cli.options import (
    AdapterFile,
    Branch,
    Data,
    Format,
    Heads,
    Revision,
    WeightsFile,
    complete_model,
    model_request,
)
from sinder_cli.cli.output import show
from sinder_cli.exporting.targets import OLD_NAMES, DtypeName, ExportSettings, TargetName, parse_size
from sinder_cli.requests import ExportRequest, Process

TARGETS = get_args(TargetName)


def target_name(text: str) -> str:
    """Return the present name of a format; the old name of one is accepted."""
    name = OLD_NAMES.get(text, text)
    if name not in TARGETS:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(TARGETS)}.")
    return name


def complete_target(incomplete: str) -> list[str]:
    """Return the formats whose names begin so."""
    return [name for name in TARGETS if name.startswith(incomplete)]


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            autocompletion=complete_model,
            help="A run directory of `repair`, or a model's name.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="PATH", help="The file or the folder to be written.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar=f"<{'|'.join(TARGETS)}>",
            parser=target_name,
            autocompletion=complete_target,
            help="native: .safetensors, .pth or .pt with the backbone's own keys; dinov2: DINOv2's official keys; "
            "transformers, timm, torchhub: a folder that the library loads; hf-repo: one for upload to a hub; "
            "onnx: one file; adapter: the deltas; "
            "diff: the changed tensors.",
        ),
    ],
    weights: WeightsFile = None,
    adapter: AdapterFile = None,
    heads: Heads = None,
    dtype: Annotated[DtypeName | None, typer.Option("--dtype", help="Default: as stored.")] = None,
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", min=1, metavar="PIXELS", help="Side of the input; default: the model's."),
    ] = None,
    dynamic_size: Annotated[
        bool,
        typer.Option(
            "--dynamic-size", help="Accept any image size; fails if the results at three sizes are not right."
        ),
    ] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option("--max-shard-size", metavar="SIZE", help="Largest weights file, such as 5GB; more is split."),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="ID",
            help="Licence of the base model as the Hub names it, for the card; hf-repo knows that of official weights "
            "alone.",
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="OWNER/NAME", help="Repository of the base model, for the card."),
    ] = None,
    repo_id: Annotated[
        str | None,
        typer.Option("--repo-id", metavar="OWNER/NAME", help="Repository to upload to, for the card of hf-repo."),
    ] = None,
    data: Data = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Load what was written as its users do, and compare.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    revision: Revision = None,
    branch: Branch = None,
    format: Format = None,
) -> None:
    """Write the weights of a run or a model in a format that others load; checked before it gets its name."""
    from sinder_cli import api
    from sinder_cli.report.documents import export_document
    from sinder_cli.report.progress import display
    from sinder_cli.report.tables import export_table

    shard = None if max_shard_size is None else parse_size(max_shard_size)
    settings = ExportSettings(
        cast("TargetName", to), dtype, image_size, dynamic_size, shard, verify, force, license, base_model, repo_id
    )
    with display() as emit:
        request = model_request(source, weights, adapter, heads, emit, revision=revision, branch=branch)
        asked = ExportRequest(request, settings, data or ())
        result = api.export(asked, out, process=Process(emit, sys.stdin))
    show(format, lambda: export_table(result), lambda: export_document(result))
