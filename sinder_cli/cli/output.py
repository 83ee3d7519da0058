"""Results → standard output: a table on a terminal, one JSON document otherwise; of several processes, one writes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinder_cli.cli.options import OutputFormat
from sinder_cli.distributed import LostRankError, Ranks, joined, tell
from sinder_cli.files import json_text

if TYPE_CHECKING:
    from rich.console import RenderableType


def is_json(chosen: OutputFormat | None) -> bool:
    """Return True if results are printed as JSON: asked for, or where standard output is no terminal."""
    return (chosen or ("table" if sys.stdout.isatty() else "json")) == "json"


def show(chosen: OutputFormat | None, table: Callable[[], RenderableType], document: Callable[[], Any]) -> None:
    """Print a result in the format asked for, or in the one that suits where it goes."""
    if is_json(chosen):
        print(json_text(document()), end="")
        return
    from sinder_cli.report.terminal import print_escaped

    print_escaped(table())


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
