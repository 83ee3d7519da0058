"""`make bench`: all workloads beside their opponents, as one table, in RESULTS.md.

    python tests/benchmarks/bench.py [--tiny] [--only predict export …] [--write]

`--tiny` runs each once at a size that takes seconds, as the tests do: its numbers mean nothing. `--write` puts the
table of the rows that were run into RESULTS.md, in the place of the one of this machine and day.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path

import torch
import whole_repair
from measuring import Row, copied_bytes_per_second, flops_per_second, table

from sinder_cli import __version__
from sinder_cli.cores import usable_cores

RESULTS = Path(__file__).with_name("RESULTS.md")
WORKLOADS = ("starting", "decoding", "predict", "export", "analyze", "steps", "evaluating", "ranks", "whole_repair")
NUMBERED = "# Measured\n"


def measured_rows(only: list[str], tiny: bool) -> Iterator[Row]:
    """Yield the rows of some workloads, and print each as it is measured."""
    for name in only:
        for row in import_module(name).rows(tiny):
            print("  ".join(cell for cell in row.cells() if cell), flush=True)
            yield row


def machine() -> str:
    """The machine in words: cores, processor, memory, torch."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
    return f"{usable_cores()} cores of {cpu}, torch {torch.__version__} with {torch.get_num_threads()} threads"


def section(rows: list[Row]) -> str:
    """The part of RESULTS.md for this machine and day."""
    day = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    product, copy = flops_per_second() / 1e9, copied_bytes_per_second() / 1e9
    met = sum(row.met is True for row in rows)
    judged = sum(row.met is not None for row in rows)
    return (
        f"## `make bench`, {day}: {machine()}, sinder {__version__}\n\n"
        f"A plain float32 product makes {product:.0f} GFLOP/s, a plain copy {copy:.1f} GB/s, measured in the same run."
        f" GB: peak resident memory of the process alone, 10⁹ bytes. {met} of {judged} goals met.\n\n"
        f"{table(rows)}\n"
    )


def main() -> None:
    """Run the workloads and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--patience", type=float, default=20, help="how many times longer the paper's recipe may take")
    options = parser.parse_args()
    whole_repair.PATIENCE = options.patience
    text = section(list(measured_rows(options.only, options.tiny)))
    print(text)
    if options.write:
        before, _, after = RESULTS.read_text(encoding="utf-8").partition(NUMBERED)
        heading = text.partition("\n")[0]
        rest = after.partition(heading)
        kept = rest[0] + ("## " + rest[2].partition("\n## ")[2] if "\n## " in rest[2] else "")
        RESULTS.write_text(f"{before}{NUMBERED}\n{text}\n{kept.lstrip()}", encoding="utf-8")


if __name__ == "__main__":
    main()
