"""A table on standard output, as wide as the terminal; whole lines where it goes elsewhere."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment

from sinder_cli.escaping import printable_lines


def print_escaped(table: RenderableType) -> None:
    """Print a table whose texts have their control characters escaped; colours only where they are wanted."""
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"  # Rich alone keeps bold and italic
    console = Console(color_system=colours, highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    console.print(_Escaped(table), crop=False)  # without markup, since names and paths may hold [brackets]


@dataclass(frozen=True)
class _Escaped:
    """A table whose control characters are escaped when it is printed; colours stay."""

    table: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in console.render(self.table, options):
            yield part if part.control else Segment(printable_lines(part.text), part.style)
