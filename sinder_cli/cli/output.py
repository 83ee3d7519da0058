"""Results → standard output: a table on a terminal, one JSON document otherwise; of several processes, one writes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment

from sinder_cli.cli.options import OutputFormat
from sinder_cli.distributed import LostRankError, Ranks, joined, tell
from sinder_cli.escaping import printable_lines
from sinder_cli.files import json_text


def show(chosen: OutputFormat | None, table: Callable[[], RenderableType], document: Callable[[], Any]) -> None:
    """Print a result in the format asked for, or in the one that suits where it goes."""
    if (chosen or ("table" if sys.stdout.isatty() else "json")) == "json":
        print(json_text(document()), end="")
        return
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"  # Rich alone keeps bold and italic
    console = Console(color_system=colours, highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    console.print(_Escaped(table()))  # without markup, since names and paths may hold [brackets]


@dataclass(frozen=True)
class _Escaped:
    """A table whose texts have their control characters escaped when it is printed; colours stay."""

    table: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in console.render(self.table, options):
            yield part if part.control else Segment(printable_lines(part.text), part.style)


def shared() -> AbstractContextManager[Ranks]:
    """Join the processes that `torchrun` has started; yield the ranks, which are one process without it."""
    return joined(_abandon)


def _abandon(error: LostRankError) -> None:
    """End this process at once, even while the main thread waits."""
    tell(f"sinder: error: {error}")
    os._exit(error.exit_code)


def program_as_called() -> Sequence[str]:
    """Return the words that call this program again, as it was called."""
    program, *arguments = sys.argv
    if Path(program).name == "__main__.py":  # python -m sinder_cli
        return sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
    name = Path(program).name
    found = shutil.which(name)
    return [name if found and Path(found).resolve() == Path(program).resolve() else program]
