"""`sinder backbones`: what is installed."""

from __future__ import annotations

from sinder_cli import api
from sinder_cli.cli.options import Format
from sinder_cli.cli.output import show
from sinder_cli.report.progress import display


def command(format: Format = None) -> None:
    """List the models that the installed plugins offer."""
    from sinder_cli.report.documents import backbones_document
    from sinder_cli.report.tables import backbones_table

    with display() as emit:
        rows = api.backbones(emit)
    show(format, lambda: backbones_table(rows), lambda: backbones_document(rows))
