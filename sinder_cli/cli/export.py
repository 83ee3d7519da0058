"""`sinder export`: write a repaired or original backbone where people load models."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from sinder_cli import api
from sinder_cli.cli.display import display
from sinder_cli.cli.options import AdapterFile, Format, Heads, Revision, WeightsFile, model_request
from sinder_cli.cli.output import show


def command(
    source: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run directory of `repair`, or a model's name.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="Target: .safetensors, .pth or .pt.")],
    to: Annotated[Literal["native"], typer.Option("--to", help="Format: the backbone's own keys, order and dtype.")],
    weights: WeightsFile = None,
    adapter: AdapterFile = None,
    heads: Heads = None,
    revision: Revision = None,
    format: Format = None,
) -> None:
    """Write the weights of a run or a model; what was written is read back and compared first."""
    with display() as emit:
        request = model_request(source, weights, adapter, heads, emit, revision=revision)
        result = api.export(source, to, out, request, emit)
    show(
        format,
        lambda: f"{result.path}: {result.tensors} tensors, {result.bytes:,} bytes, read back identical",
        lambda: asdict(result) | {"path": str(result.path), "verified": True},
    )
