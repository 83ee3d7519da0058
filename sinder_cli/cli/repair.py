"""`sinder repair`: fine-tune singular values until the defects are gone."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from sinder_cli import api
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
from sinder_cli.cli.output import show
from sinder_cli.cli.sharing import shared
from sinder_cli.cli.trackers import logged
from sinder_cli.errors import UsageError
from sinder_cli.escaping import printable
from sinder_cli.events import Noted, silent
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.report.progress import display
from sinder_cli.signals import Ended, Stop

if TYPE_CHECKING:
    from sinder_cli.repairing.dry_run import Trial
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
        bool, typer.Option("--resume", help="Go on, bit for bit, with the unfinished run that MODEL or --out is.")
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
    """Repair a backbone's singular defects with unlabelled images."""
    from sinder_cli.repairing.folder import RunFolder
    from sinder_cli.report.documents import repair_document
    from sinder_cli.report.tables import repair_table

    if resume and force:
        raise UsageError("cannot resume a run and replace it", "--resume and --force exclude each other", "give one")
    if resume and dry_run:
        raise UsageError("cannot try a resumed run", "--resume and --dry-run exclude each other", "give one")
    stop = context.obj.stop if context.obj else Stop()
    places = [*(data or []), *(more_data or [])]
    request = model_request(model, weights, adapter, heads, silent, attention, revision, branch)
    if out is None and resume and (called := api.run_as_called(Path(model), request, settings)):
        out, (request, settings) = Path(model), called
    folder = out or Path("sinder-runs", model.replace("/", "-"))
    run = RunFolder(folder)

    with shared() as ranks, display(ranks.writes) as shown, logged(settings, folder, shown, ranks.writes) as emit:
        request = replace(request, emit=emit)
        if dry_run:
            if ranks.writes:
                _show_trial(api.try_repair(request, places, folder, settings, emit, sys.stdin, force), format)
            return
        try:
            if ranks.from_rank0(lambda: resume and run.complete):
                if ranks.writes:
                    summary = api.finished_repair(request, places, folder, settings, emit, sys.stdin)
                    _show_finished(summary, folder, format)
                    _end(summary)
                return
            result = api.repair(request, places, folder, settings, emit, sys.stdin, resume, force, stop, ranks)
            if result is None:  # rank 0 has it
                return
        except Ended:
            if run.resumable:
                how = ", under torchrun" if ranks.size > 1 else ""
                emit(Noted(f"to go on{how}: {resuming_command(run, settings)}"))
            raise
    show(format, lambda: repair_table(result), lambda: repair_document(result.summary, folder))
    _end(result.summary)


def _end(summary: dict[str, Any]) -> None:
    """Exit with 1 where the repair did not improve the model: the answer is no."""
    if summary["verdict"] == "not improved":
        raise typer.Exit(1)


def _show_finished(summary: dict[str, Any], folder: Path, format: Format) -> None:
    from sinder_cli.repairing.folder import RunFolder
    from sinder_cli.report.documents import repair_document
    from sinder_cli.report.tables import repair_table

    said = f"{printable(str(folder))}: finished already, nothing to resume"
    show(
        format,
        lambda: Group(said, repair_table(RunFolder(folder).read_finished())),
        lambda: repair_document(summary, folder),
    )


def _show_trial(trial: Trial, format: Format) -> None:
    from sinder_cli.report.documents import trial_document
    from sinder_cli.report.tables import trial_table

    show(format, lambda: trial_table(trial), lambda: trial_document(trial))


def resuming_command(run: RunFolder, settings: RepairSettings) -> str:
    """The command line that goes on with a run, for the program as it was called."""
    from sinder_cli.repairing.run_identity import other_options

    program, *arguments = sys.argv
    if Path(program).name == "__main__.py":  # python -m sinder_cli
        called = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
    else:
        name = Path(program).name
        found = shutil.which(name)
        called = [name if found and Path(found).resolve() == Path(program).resolve() else program]
    return shlex.join([*called, "repair", run.argument, "--resume", *other_options(run, settings)])
