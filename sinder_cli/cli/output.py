"""Results → standard output: a table on a terminal, one JSON document otherwise or on request."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Literal

from rich.console import Console, RenderableType

from sinder_cli.cli.options import OutputFormat
from sinder_cli.files import json_text


def show(chosen: OutputFormat | None, table: Callable[[], RenderableType], document: Callable[[], Any]) -> None:
    """Print a result in the format asked for, or in the one that suits where it goes."""
    if (chosen or ("table" if sys.stdout.isatty() else "json")) == "json":
        print(json_text(document()), end="")
        return
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"  # Rich alone keeps bold and italic
    console = Console(color_system=colours, highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    console.print(table())  # without markup, since names and paths may hold [brackets]
