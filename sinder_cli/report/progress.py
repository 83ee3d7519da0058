"""Display of events: live bars on a terminal or in a notebook, elsewhere a line every few seconds on standard error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from sinder_cli.escaping import printable, say
from sinder_cli.events import Advanced, Emit, Event, Finished, Measured, Noted, Started, Warned, silent
from sinder_cli.memory import peak_memory
from sinder_cli.report.notebook import NotebookProgress, in_notebook

SECONDS_BETWEEN_LINES = 5.0
REPAIRING = "repairing"  # the phase of a repair's steps


@contextmanager
def display(shown: bool = True) -> Iterator[Emit]:
    """Yield a listener for the events of one command; unless `shown`, a silent one (another process reports)."""
    if not shown:
        yield silent
        return
    if in_notebook():
        yield NotebookProgress(message, _step).hear
        return
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Lines().hear
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=9)),
        _Rate(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        _Left(compact=True),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=5) as progress:
        yield _Bars(progress).hear


class _Rate(ProgressColumn):
    """A column with the units per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2g}/s" if task.speed else "")


class _Left(TimeRemainingColumn):
    """A column with the time left; none for the steps of a repair, of which most are never taken."""

    def render(self, task: Task) -> Text:
        return Text("") if task.description == REPAIRING else super().render(task)


class _Bars:
    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def hear(self, event: Event) -> None:
        if isinstance(event, Started):
            self.tasks[event.phase] = self.progress.add_task(
                event.phase, total=event.total, completed=event.done, detail=event.unit
            )
        elif isinstance(event, Advanced):
            self.progress.advance(self.tasks[event.phase], event.amount)
        elif isinstance(event, Finished):
            if event.phase in self.tasks:
                self.progress.remove_task(self.tasks.pop(event.phase))
        elif text := message(event):
            self.progress.console.print(printable(text), soft_wrap=True, markup=False)
        elif step := _step(event):
            for phase in self.tasks:
                self.progress.update(self.tasks[phase], completed=step[0], detail=step[1])


class _Lines:
    def __init__(self) -> None:
        self.started: dict[str, Started] = {}
        self.done: dict[str, int] = {}
        self.spoken = time.monotonic()
        self.began = time.monotonic()

    def hear(self, event: Event) -> None:
        if isinstance(event, Started):
            self.started[event.phase], self.done[event.phase] = event, event.done
            self.began = time.monotonic()
        elif isinstance(event, Advanced):
            self.done[event.phase] += event.amount
            self._progress(event.phase, self.done[event.phase], "")
        elif text := message(event):
            say(text)
        elif step := _step(event):
            self._progress(REPAIRING, step[0], f", {step[1]}")

    def _progress(self, phase: str, done: int, detail: str) -> None:
        now = time.monotonic()
        if now - self.spoken < SECONDS_BETWEEN_LINES:
            return
        self.spoken = now
        total, unit = self.started[phase].total, self.started[phase].unit
        rate = (done - self.started[phase].done) / max(now - self.began, 1e-9)
        left = f", {_clock((total - done) / rate)} left" if total and phase != REPAIRING else ""
        say(f"sinder: {phase}: {done}/{total or '?'} {unit}, {rate:.3g}/s{left}{detail}")


def message(event: Event) -> str:
    """Return the line for a note, a warning or an evaluation on the guard; an empty text for other events."""
    if isinstance(event, Noted):
        return f"sinder: {event.text}"
    if isinstance(event, Warned):
        return f"sinder: warning: {event.text}"
    if not isinstance(event, Measured):
        return ""
    from sinder_cli.repairing.guard import Evaluation

    if isinstance(event, Evaluation):
        cls = "" if event.cls is None else f"cls {event.cls:.4f}, "
        state = "kept as the best" if event.best else "not better" if event.holds else "good tokens are spoilt"
        return (
            f"sinder: guard, after step {event.step}: {event.outlying:,} outlying tokens;"
            f" to the inpainted original: {cls}good tokens {event.good:.4f}; {state}"
        )
    return ""


def _step(event: Event) -> tuple[int, str] | None:
    """Return the number of a repair step and the text about it; None for other events."""
    if not isinstance(event, Measured):
        return None
    from sinder_cli.repairing.loop import StepRecord

    if not isinstance(event, StepRecord):
        return None
    found = f"block {event.block}, loss {event.loss:.3g}" if event.loss is not None else "no defect"
    found += f", shrinks {event.moved}" if event.moved else ""
    return event.step, f"{found}, clean fraction {event.clean_fraction:.0%}, {_memory()}"


def _memory() -> str:
    """Return the largest resident memory so far or, if GPUs are used, the largest memory on one of them."""
    import torch

    on_gpu = max((peak_memory(f"cuda:{index}") for index in range(torch.cuda.device_count())), default=0)
    if on_gpu:
        return f"{on_gpu / 2**30:.1f} GiB on the GPU"
    return f"{peak_memory() / 2**30:.1f} GiB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
