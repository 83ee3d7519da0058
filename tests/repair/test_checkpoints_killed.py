"""A process that is killed just before any change that it makes to a file goes on to the same bytes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from warm import Ended, Server

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def tiny(tmp_path: Path, environment: dict[str, str]) -> Iterator[Server]:
    """Repairs the tiny planted model in three steps, with a checkpoint after each."""
    server = Server("tiny_session:main", environment | {"PYTHONPATH": str(SUPPORT)}, tmp_path)
    yield server
    server.close()


def left(run: Path) -> dict[str, Any]:
    """What a run left that another must leave too, its temporary files among it."""
    files = {str(path.relative_to(run)) for path in run.rglob("*")}
    metrics = [json.loads(line) | {"seconds": 0} for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"files": files, "metrics": metrics, "model": (run / "model.safetensors").read_bytes()}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tiny: Server, tmp_path: Path) -> None:
    def ended(folder: str, kill_before: str = "") -> Ended:
        place = tmp_path / folder / "one" / "place"  # of the same names each time, since changes are named by them
        place.mkdir(parents=True, exist_ok=True)
        return tiny.run("its/run", cwd=place, kill_before=kill_before)

    whole = ended("whole")
    assert whole.returncode == 0, whole.stderr
    expected = left(tmp_path / "whole/one/place/its/run")
    changes = [change for change in dict.fromkeys(whole.changes) if "step-000003" not in change]  # as the second
    assert {"os.rename checkpoints/.step-000002.part", "fsync bases/.HASH.safetensors.part"} <= set(changes)
    for number, change in enumerate(changes):
        killed = ended(f"killed{number}", change)
        assert (killed.returncode, killed.changes[-1]) == (-signal.SIGKILL, change)
        resumed = ended(f"killed{number}")
        assert resumed.returncode == 0, (change, resumed.stderr)
        assert "damaged" not in resumed.stdout
        assert left(tmp_path / f"killed{number}/one/place/its/run") == expected, change
    assert len(changes) > 60
