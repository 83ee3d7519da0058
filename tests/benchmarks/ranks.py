"""A repair shared by 2 and by 4 processes: time of the whole, and the bytes that one process sends a step.

The processes share this machine's cores, so that only what they exchange and what stays serial can be learned here.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measuring import PYTHON, Row, measured, sinder

COUNTING = """
import json, os, pickle, sys, time
from pathlib import Path
from sinder_cli import distributed
from sinder_cli.cli.main import main
place, counts = Path(sys.argv[1]), {"reduced": 0, "gathered": 0, "reductions": 0, "gatherings": 0, "waiting": 0.0}
def counted(name, calls, size):
    real = getattr(distributed.Ranks, name)
    def method(self, value, *others):
        if not callable(value):
            counts[calls[0]] += size(value)
            counts[calls[1]] += 1
        began = time.perf_counter()
        found = real(self, value, *others)
        counts["waiting"] += time.perf_counter() - began
        return found
    setattr(distributed.Ranks, name, method)
counted("all_reduce", ("reduced", "reductions"), lambda tensor: tensor.numel() * tensor.element_size())
counted("all_gather", ("gathered", "gatherings"), lambda value: len(pickle.dumps(value)))
try:
    main(sys.argv[2:])
finally:
    if os.environ.get("RANK", "0") == "0":
        place.write_text(json.dumps(counts))
"""


def rows(tiny: bool) -> Iterator[Row]:
    """Yield a row for each number of processes."""
    few = ["--max-steps", "2", "--eval-images", "2", "--scan-images", "4"] if tiny else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "counting.py"
        script.write_text(COUNTING)
        few = ["--batch-size", "4", *few]  # an image for each of four processes
        alone = measured(sinder("repair", "demo_vit", "--out", folder / "alone", *few))
        for ranks in (2,) if tiny else (2, 4):
            run = folder / str(ranks)
            launch = [PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            counts = folder / f"{ranks}.json"
            repair = ["repair", "demo_vit", "--out", run, *few]
            cost = measured([*launch, str(script), str(counts), *map(str, repair)])
            found = json.loads(counts.read_text())
            steps = max(1, json.loads((run / "summary.json").read_text())["steps"])
            summed, records = found["reduced"] / steps / 1e3, found["gathered"] / steps / 1e3
            words = (
                f"{steps} steps; a step: {summed:.1f} kB summed in {found['reductions'] / steps:.1f} reductions,"
                f" {records:.1f} kB of records in {found['gatherings'] / steps:.1f} gatherings;"
                f" {found['waiting']:.1f} s in exchanges, waiting included"
            )
            yield Row(f"whole `repair` of the demo model, {ranks} processes", cost, "one process", alone, note=words)


if __name__ == "__main__":
    sys.exit("run bench.py")
