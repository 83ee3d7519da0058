"""`sinder backbones` lists what is installed, and `sinder check-backbone` checks a plugin."""

from __future__ import annotations

from typing import Annotated

import typer

from sinder_cli.backbone.registry import InstalledBackbone, backbones
from sinder_cli.cli.options import Branch, Format, Heads, WeightsFile, complete_model, model_request
from sinder_cli.cli.output import show
from sinder_cli.errors import BadInputError, NoInputError
from sinder_cli.report.progress import display


def listing(
    filter: Annotated[  # the option's name
        list[str] | None,
        typer.Option("--filter", metavar="TEXT", help="Only names that hold this text; repeatable: all of them."),
    ] = None,
    format: Format = None,
) -> None:
    """List the models that the installed plugins offer."""
    from sinder_cli.report.documents import backbones_document
    from sinder_cli.report.listings import backbones_table

    with display() as emit:
        rows = [row for row in backbones(emit) if _holds(row, filter or [])]
    if filter and not rows:
        raise NoInputError(
            f"no model's name holds {' and '.join(filter)}", "no plugin offers one", "see sinder backbones"
        )
    show(format, lambda: backbones_table(rows), lambda: backbones_document(rows))


def _holds(row: InstalledBackbone, texts: list[str]) -> bool:
    """Return True if a model's name holds all texts, in small or capital letters."""
    name = row.listing.name.lower() if row.listing else ""
    return all(text.lower() in name for text in texts)


def check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", autocompletion=complete_model, help="A model's name, as `sinder backbones` lists them."
        ),
    ],
    weights: WeightsFile = None,
    heads: Heads = None,
    branch: Branch = None,
    format: Format = None,
) -> None:
    """Check that a plugin describes a model as sinder needs it; exit 65 if it does not."""
    from sinder_cli import api
    from sinder_cli.report.documents import conformance_document
    from sinder_cli.report.tables import conformance_table

    with display() as emit:
        result = api.check_backbone(model_request(name, weights, None, heads, emit, branch=branch), emit)
    show(format, lambda: conformance_table(result), lambda: conformance_document(result))
    if result.failed:
        names = ", ".join(check.name for check in result.failed)
        raise BadInputError(f"{result.model} does not conform", f"failed: {names}", "fix its plugin")
