"""Results and progress as HTML in a notebook."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from sinder_cli.escaping import printable
from sinder_cli.events import Advanced, Event, Finished, Started
from sinder_cli.notebooks import show_as

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sinder_cli.report.analysis.look import Look

COLUMNS = 110  # of a table
PRE = '<pre style="white-space:pre;overflow-x:auto;line-height:1.25">{code}</pre>'


def in_notebook() -> bool:
    """Return True inside a kernel that shows HTML, such as that of Jupyter."""
    loaded = sys.modules.get("IPython")  # a kernel has loaded it; nobody else need
    shell = loaded.get_ipython() if loaded is not None else None
    return hasattr(shell, "kernel")


def html_of(table: RenderableType) -> str:
    """Return a terminal table as HTML, with its colours."""
    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=COLUMNS, force_jupyter=False, markup=False)
    console.print(table)
    return console.export_html(inline_styles=True, code_format=PRE)


def show_records() -> None:
    """Let every record that the public functions return be shown as its command shows it."""
    ways: dict[str, Callable[[Any], RenderableType]] = {
        "defects.prediction.Prediction": lambda found: _tables().prediction_table(found),
        "analysis.run.AnalysisResult": lambda found: _tables().analysis_table(found.analysis, found.folder),
        "repairing.results.RepairResult": lambda found: _tables().repair_table(found),
        "repairing.folder.FinishedRun": lambda found: _tables().repair_table(found),
        "evaluation.run.EvaluationResult": lambda found: _tables().evaluation_table(found.evaluation),
        "exporting.drafts.ExportResult": lambda found: _tables().export_table(found),
    }
    for name, table in ways.items():
        show_as(f"sinder_cli.{name}", lambda found, table=table: html_of(table(found)))  # type: ignore[misc]
    show_as("sinder_cli.report.analysis.look.Look", _look)


def _tables() -> Any:
    from sinder_cli.report import tables

    return tables


def _look(look: Look) -> str:
    from sinder_cli.report.drawing.pictures import image_file

    said = "".join(
        f"<p><b>{escape(answer.title)}</b><br>{'<br>'.join(escape(printable(line)) for line in answer.lines)}</p>"
        for answer in look.answers
    )
    return f'{said}<img alt="{escape(look.caption)}" style="max-width:100%" src="{image_file(look.picture).uri}">'


class NotebookProgress:
    """One line below the cell that shows the running phases, and stays with the messages when they are over."""

    def __init__(self, message: Callable[[Event], str], step: Callable[[Event], tuple[int, str] | None]) -> None:
        from IPython.display import HTML, display

        self.html = HTML
        self.handle: Any = display(HTML(""), display_id=True)
        self.message, self.step = message, step
        self.phases: dict[str, tuple[int, int | None, str]] = {}  # done, of how many, and what of
        self.said: list[str] = []

    def hear(self, event: Event) -> None:
        """Show what has changed."""
        if isinstance(event, Started):
            self.phases[event.phase] = (event.done, event.total, event.unit)
        elif isinstance(event, Advanced):
            done, total, unit = self.phases[event.phase]
            self.phases[event.phase] = (done + event.amount, total, unit)
        elif isinstance(event, Finished):
            self.phases.pop(event.phase, None)
        elif text := self.message(event):
            self.said.append(printable(text))
        elif found := self.step(event):
            self.phases = {phase: (found[0], total, found[1]) for phase, (_, total, _) in self.phases.items()}
        else:
            return
        self.handle.update(self.html(self._shown()))

    def _shown(self) -> str:
        lines = [escape(text) for text in self.said]
        for phase, (done, total, unit) in self.phases.items():
            bar = f'<progress value="{done}" max="{total}"></progress>' if total else ""
            of = f"{done:,} of {total:,}" if total else f"{done:,}"
            lines.append(f"{bar} {escape(phase)}: {of} {escape(unit)}")
        return f'<div style="font-family:monospace;font-size:90%">{"<br>".join(lines)}</div>'
