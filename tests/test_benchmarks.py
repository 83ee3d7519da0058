"""Every benchmark runs once at tiny size, so that none can rot; and the table that `make bench` writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
WORKLOADS = ("starting", "decoding", "predict", "export", "analyze", "steps", "evaluating", "ranks", "whole_repair")


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n{code}", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_these_are_the_workloads() -> None:
    assert run("import bench; print(*bench.WORKLOADS)").split() == list(WORKLOADS)


@pytest.mark.slow
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_workload_runs_at_tiny_size(workload: str) -> None:
    shown = run(
        "import bench\nfor row in bench.measured_rows([sys.argv[1]], True): assert row.ours.seconds > 0", workload
    )
    assert shown.strip()


@pytest.mark.slow
def test_the_table_of_a_gpu_is_made_at_tiny_size_without_one() -> None:
    parts = ("predict", "forward", "step", "svd", "repair")  # `real` needs real weights
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--device", "cpu", "--precisions", "TF32"]
    result = subprocess.run([*command, "--only", *parts], capture_output=True, text=True, check=False)
    if "NotToBeHadError" in result.stderr:
        pytest.skip("photographs cannot be had here")
    assert result.returncode == 0, result.stderr[-2000:]
    assert sum(line.startswith("| ") for line in result.stdout.splitlines()) == 2 + 2 + 1 + 2 + 1 + 1


def test_a_row_shows_ratios_and_distance_to_the_floor() -> None:
    shown = run(
        "from measuring import Cost, Row, table\n"
        "row = Row('w', Cost(3, 1.5), 'o', Cost(12, 6), floor=2, floor_of='bytes', goal='≤ 0.5 ×', met=True)\n"
        "print(table([row, Row('x', Cost(1), 'p', Cost(500), met=False)]))"
    )
    _, _, first, second = shown.splitlines()
    assert first == "| w | 3 | 1.5 | o | 12 | 6 | 0.25 × | 0.25 × | 2 (1.5 ×) | ≤ 0.5 × | met | floor: bytes |"
    assert second == "| x | 1 |  | p | 500 |  | 1/500 |  |  |  | missed |  |"


def test_a_process_is_measured_without_the_memory_of_its_parent() -> None:
    shown = run(
        "from measuring import PYTHON, measured\nkept = bytearray(400_000_000)\n"
        "cost = measured([PYTHON, '-S', '-c', 'import time; time.sleep(0.2)'])\n"
        "print(cost.gigabytes < 0.1, cost.seconds >= 0.2)"
    )
    assert shown.split() == ["True", "True"]
