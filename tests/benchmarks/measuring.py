"""What all benchmarks share: rows of the table, whole processes timed in turn, and what the machine can do at most."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

PYTHON = sys.executable


@dataclass(frozen=True)
class Cost:
    """Wall seconds, and peak resident gigabytes (10⁹ bytes) of a process without its children; None: not measured."""

    seconds: float | None = None
    gigabytes: float | None = None


@dataclass(frozen=True)
class Row:
    """One workload: ours against an opponent, and the least that it could cost on this machine."""

    workload: str
    ours: Cost
    opponent: str = ""
    theirs: Cost = Cost()
    floor: float | None = None  # seconds: arithmetic or bytes that cannot be avoided, at this machine's rates
    floor_of: str = ""
    goal: str = ""
    met: bool | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Our time over the opponent's."""
        if self.ours.seconds is None or not self.theirs.seconds:
            return None
        return self.ours.seconds / self.theirs.seconds

    def cells(self) -> list[str]:
        """The row of the table."""
        ours, theirs, ratio = self.ours, self.theirs, self.ratio
        memory = ours.gigabytes / theirs.gigabytes if ours.gigabytes and theirs.gigabytes else None
        against = "" if ratio is None else f"{ratio:.2f} ×" if ratio >= 0.01 else f"1/{1 / ratio:.0f}"
        lighter = "" if memory is None else f"{memory:.2f} ×"
        floor = (
            "" if not self.floor or ours.seconds is None else f"{self.floor:.3g} ({ours.seconds / self.floor:.1f} ×)"
        )
        verdict = {True: "met", False: "missed", None: ""}[self.met]
        words = "; ".join(part for part in (self.floor_of and f"floor: {self.floor_of}", self.note) if part)
        return [
            self.workload, _number(ours.seconds), _number(ours.gigabytes), self.opponent, _number(theirs.seconds),
            _number(theirs.gigabytes), against, lighter, floor, self.goal, verdict, words,
        ]  # fmt: skip


HEADINGS = (
    "workload", "s", "GB", "opponent", "s", "GB", "time", "memory", "floor, s", "goal", "", "notes",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown."""
    lines = [
        HEADINGS,
        ["---", *["---:"] * 2, "---", *["---:"] * 5, "---", "---", "---"],
        *(row.cells() for row in rows),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


LAUNCHER = """
import json, os, sys, time
began = time.perf_counter()
nothing = os.open(os.devnull, os.O_RDWR)
actions = [(os.POSIX_SPAWN_DUP2, nothing, descriptor) for descriptor in (0, 1, 2)]
told = os.dup(1)
os.set_inheritable(told, False)
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=actions)
_, status, usage = os.wait4(process, 0)
os.write(told, json.dumps([status, time.perf_counter() - began, usage.ru_maxrss]).encode())
"""


def measured(command: Sequence[str], allowed: Sequence[int] = (0,)) -> Cost:
    """Run a process to its end. Raises `SystemExit` if it ends with an exit code that is not allowed.

    A small process starts it: Linux counts the memory of the process that calls exec as the child's.
    """
    run = subprocess.run([PYTHON, "-S", "-E", "-c", LAUNCHER, *command], capture_output=True, check=True)
    status, seconds, kilobytes = json.loads(run.stdout)
    if (code := os.waitstatus_to_exitcode(status)) not in allowed:
        raise SystemExit(f"{' '.join(command)[:300]} ended with exit code {code}")
    return Cost(seconds, kilobytes * 1024 / 1e9)


THROUGH = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"


def last_line(command: Sequence[str]) -> str:
    """Run a process through a small one, for the reason that `measured` has; the last line that it prints."""
    run = subprocess.run([PYTHON, "-S", "-E", "-c", THROUGH, *command], check=True, stdout=subprocess.PIPE, text=True)
    return run.stdout.splitlines()[-1]


def in_turn(commands: Sequence[Sequence[str]], rounds: int) -> list[Cost]:
    """Run processes in turn, `rounds` times; the median time and the largest memory of each."""
    costs = [[measured(command) for command in commands] for _ in range(rounds)]
    return [
        Cost(statistics.median(c.seconds or 0 for c in each), max(c.gigabytes or 0 for c in each))
        for each in zip(*costs, strict=True)
    ]


def sinder(*arguments: object) -> list[str]:
    """The command line of sinder."""
    return [PYTHON, "-m", "sinder_cli", *map(str, arguments)]


def flops_per_second(size: int = 2048) -> float:
    """The rate of a plain float32 matrix product, with the threads that torch takes."""
    one, other = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    torch.mm(one, other, out=out)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(one, other, out=out)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def copied_bytes_per_second(size: int = 2**28) -> float:
    """The rate of a plain copy in memory, counting the bytes that are copied once."""
    source, target = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    target.copy_(source)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return size / min(times)


def bytes_below(folder: Path) -> int:
    """The size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
