"""`sinder man`: a manual page, also where no manual path is set up."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from sinder_cli.errors import UsageError


def complete_page(incomplete: str) -> list[str]:
    """Return the pages whose names begin so."""
    from sinder_cli.cli.main import SUBCOMMANDS

    return [name for name in (*SUBCOMMANDS, "analysis") if name.startswith(incomplete)]


def command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[COMMAND]", autocompletion=complete_page, help="A subcommand; default: the main page."),
    ] = None,
) -> None:
    """Show a manual page with `man`, or as roff where its output is no terminal."""
    from sinder_cli.cli.manpage import pages

    found = pages()
    named = {page.removeprefix("sinder-").rpartition(".")[0]: page for page in found if page.startswith("sinder-")}
    page = "sinder.1" if name in (None, "sinder") else named.get(str(name).removeprefix("sinder-"), "")
    if not page:
        raise UsageError(f"no manual page {name!r}", "there is no such subcommand", f"there are {', '.join(named)}")
    reader = shutil.which("man") or shutil.which("mandoc")
    if not sys.stdout.isatty() or reader is None:
        print(found[page], end="")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, page)
        path.write_text(found[page], encoding="utf-8")
        subprocess.run([reader, *(["-l"] if Path(reader).name == "man" else []), str(path)], check=False)
