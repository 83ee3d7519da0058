"""Running the command line as a user does: a process of its own, with real files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from warm import start_children_with_default_handlers

from sinder_cli import define_torchvision_operators

define_torchvision_operators()  # before a test imports timm or transformers

start_children_with_default_handlers()  # a suite under nohup tests what signals do, too

Completed = subprocess.CompletedProcess[str]
COMMAND = (sys.executable, "-m", "sinder_cli")
UNWANTED = {"NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES", "PYTHONPATH", "PYTHONWARNINGS"}


# Files of a minute or more, which come first: where each core has a process, none is left with one at the end.
LONGEST = (
    "test_benchmarks.py",
    "test_same_weights.py",
    "test_real_repair.py",
    "test_cli_analyze.py",
    "test_cli_resume.py",
    "test_cli_errors.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first; within a file, and among the others, the order stays."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A command run in this process sets handlers, and ignores signals as it ends: what comes after would inherit."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One thread, since tests share the machine; an empty cache, so that no test finds an official checkpoint."""
    kept = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "TORCH_HOME": str(tmp_path_factory.mktemp("torch")),
        "TERM": "xterm-256color",
    }


@pytest.fixture(scope="session")
def sinder(environment: dict[str, str]) -> Callable[..., Completed]:
    """Run `sinder` with these arguments and catch what it prints."""

    def run(*arguments: str | Path, stdin: str = "", cwd: Path | None = None, **variables: str) -> Completed:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=cwd,
            env=environment | variables,
            timeout=300,
            check=False,
        )

    return run
