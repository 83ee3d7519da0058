"""`sinder repair`: fine-tune singular values until the defects are gone."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
from sinder_cli.cli.output import program_as_called, shared, show
from sinder_cli.distributed import Ranks
from sinder_cli.errors import UsageError
from sinder_cli.escaping import printable
from sinder_cli.events import Emit, Noted, silent
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.repairing.verdict import is_no
from sinder_cli.requests import Process, RepairRequest
from sinder_cli.signals import Ended, Stop

if TYPE_CHECKING:
    from sinder_cli.repairing.dry_run import DryRun
    from sinder_cli.repairing.folder import RunFolder


@with_settings(RepairSettings)
def command(
    *,
    context: typer.Context,
    model: Model,
    more_data: MoreData = None,
    data: Data = None,
    weights: WeightsFile = None,
    adapter: AdapterFile = None,
    heads: Heads = None,
    revision: Revision = None,
    branch: Branch = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run directory; default: sinder-runs/MODEL.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume the run in MODEL or --out; the result is bit-identical. With a larger --max-steps, a run that"
            " ended at the smaller one goes on.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is in --out already.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be trained, and a step's time and memory; nothing is written."),
    ] = False,
    attention: Attention = "auto",
    format: Format = None,
    settings: RepairSettings,
) -> None:
    """Repair a model's singular defects with unlabelled images."""
    from rich.console import Group

    from sinder_cli import api
    from sinder_cli.repairing.folder import FinishedRun
    from sinder_cli.report.documents import repair_document
    from sinder_cli.report.progress import display
    from sinder_cli.report.tables import repair_table

    _require_one_intent(resume, force, dry_run)
    named = model_request(model, weights, adapter, heads, silent, attention, revision, branch)
    asked = RepairRequest(named, [*(data or []), *(more_data or [])], settings, resume, force)
    asked, run = api.repair_place(asked, out)
    with shared() as ranks, display(ranks.writes) as emit:
        process = Process(emit, sys.stdin, context.obj.stop if context.obj else Stop(), ranks)
        if dry_run:
            _show_dry_run(api.try_repair(asked, run.path, process) if ranks.writes else None, format)
            return
        with _how_to_resume_printed(run, asked.settings, ranks, emit):
            result = api.repair(asked, run.path, process=process)
    if result is None:  # rank 0 has it
        return
    over = isinstance(result, FinishedRun)
    said = [f"{printable(str(run.path))}: finished already, nothing to resume"] if over else []
    show(format, lambda: Group(*said, repair_table(result)), lambda: repair_document(result.summary, run.path))
    if is_no(result.summary):
        raise typer.Exit(1)


def _require_one_intent(resume: bool, force: bool, dry_run: bool) -> None:
    """Raise `UsageError` for options that contradict each other."""
    if resume and force:
        raise UsageError("cannot resume a run and replace it", "--resume and --force exclude each other", "give one")
    if resume and dry_run:
        raise UsageError("cannot combine --resume with --dry-run", "a dry run starts at the first step", "give one")


@contextmanager
def _how_to_resume_printed(run: RunFolder, settings: RepairSettings, ranks: Ranks, emit: Emit) -> Iterator[None]:
    """Print the command that resumes the run where a signal ends it."""
    try:
        yield
    except Ended:
        if run.resumable:
            how = ", under torchrun" if ranks.size > 1 else ""
            emit(Noted(f"to resume{how}, run: {resuming_command(run, settings)}"))
        raise


def _show_dry_run(found: DryRun | None, format: Format) -> None:
    if found is None:  # rank 0 has it
        return
    from sinder_cli.report.documents import dry_run_document
    from sinder_cli.report.tables import dry_run_table

    show(format, lambda: dry_run_table(found), lambda: dry_run_document(found))


def resuming_command(run: RunFolder, settings: RepairSettings) -> str:
    """Return the command line that resumes a run, for the program as it was called."""
    from sinder_cli.repairing.run_identity import other_options

    return shlex.join([*program_as_called(), "repair", run.argument, "--resume", *other_options(run, settings)])
