"""The repairs of the demo backbones, run once, side by side."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_runs(
    sinder: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the run directories of `sinder repair` for both twins."""
    root = tmp_path_factory.mktemp("demo")
    with ThreadPoolExecutor() as pool:
        started = [
            pool.submit(sinder, "repair", "demo_vit", "--out", root / "demo_vit"),
            pool.submit(sinder, "repair", "demo_vit_clean", "--out", root / "demo_vit_clean"),
        ]
    for run in started:
        assert run.result().returncode == 0, run.result().stderr
    return root


@pytest.fixture(scope="session")
def repaired(demo_runs: Path) -> Path:
    """The run directory of `demo_vit` with every setting at its default."""
    return demo_runs / "demo_vit"


@pytest.fixture(scope="session")
def repaired_clean(demo_runs: Path) -> Path:
    """The run directory of the twin that has nothing to repair, with every setting at its default."""
    return demo_runs / "demo_vit_clean"
