"""`sinder runs`: the runs below a folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sinder_cli.cli.options import Format
from sinder_cli.cli.output import show
from sinder_cli.folders import RUNS

HOME = Path(RUNS)  # where `sinder repair` puts runs by itself


def command(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="A folder of runs.")] = HOME,
    format: Format = None,
) -> None:
    """List the runs below a folder: model, verdict, outlying tokens, fidelity, date."""
    from sinder_cli.repairing.runs import runs_below
    from sinder_cli.report.listings import runs_table

    found = runs_below(folder)
    show(format, lambda: runs_table(found), lambda: [asdict(run) for run in found])
