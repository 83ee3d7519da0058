"""`sinder doctor`: what is installed here, and what is missing."""

from __future__ import annotations

from typing import Annotated

import typer

from sinder_cli.cli.options import Format
from sinder_cli.cli.output import show


def command(
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False, format: Format = None
) -> None:
    """Show versions, machine, attention kernels, plugins and caches; exit 69 if something needed is missing."""
    from sinder_cli.diagnosis import diagnosis
    from sinder_cli.report.listings import diagnosis_table

    found = diagnosis()
    show("json" if json else format, lambda: diagnosis_table(found), lambda: [vars(each) for each in found])
    if any(each.problem for each in found):
        raise typer.Exit(69)
