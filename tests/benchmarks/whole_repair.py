"""A whole `repair`, from command to verdict, against the paper's recipe in the reference's way.

The opponent takes the same predicted directions and the same photographs, one image a step with the paper's values, and
counts outlying tokens on some of them every `EVERY` steps, which is not in its time. It ends when no more are left than
sinder leaves, or when it has taken `PATIENCE` times as long.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measuring import PYTHON, Cost, Row, flops_per_second, last_line, measured, sinder
from models import planted_vitl, planted_vits

if TYPE_CHECKING:
    from collections.abc import Iterator

GOAL = 20  # times sooner
PATIENCE = 20.0
EVERY = 40
COUNTED = 6  # photographs on which outlying tokens are counted
FACTOR = 3.0  # of the median norm
MODEL, SIZE = "dinov2_vits14", 518
COUNTING = """
import sys
from contextlib import redirect_stdout, suppress
from io import StringIO
from torch.utils.flop_counter import FlopCounterMode
from sinder_cli.cli.main import main
with FlopCounterMode(display=False) as counter, suppress(SystemExit), redirect_stdout(StringIO()):
    main(sys.argv[1:])
print(counter.get_total_flops())
"""


def rows(tiny: bool) -> Iterator[Row]:
    """Yield the rows; a demo model stands in for the real one if `tiny`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if tiny:
            run = [*sinder("repair", "demo_vit", "--out", folder / "run"), "--max-steps", "2", "--eval-images", "2"]
            yield Row("whole `repair` of the demo model, two steps", measured([*run, "--scan-images", "4"]))
            return
        weights, photographs = planted_vits(folder)
        data = [part for path in photographs for part in ("--data", str(path))]
        repair = sinder("repair", MODEL, "--weights", weights, *data, "--image-size", SIZE, "--out", folder / "run")
        ours = measured(repair)
        summary = json.loads((folder / "run" / "summary.json").read_text())
        left = summary["defects"]["after"]["tokens"]
        limit = PATIENCE * (ours.seconds or 0)
        command = [PYTHON, __file__, str(weights), str(left), str(limit), *map(str, photographs)]
        found = json.loads(last_line(command))
        operations = float(last_line([PYTHON, "-c", COUNTING, *repair[3:-1], str(folder / "counted")]))
        floor = operations / flops_per_second()
        faster = found["seconds"] / (ours.seconds or 1)
        reached = f"stopped with {found['left']} of {found['before']} left" if not found["reached"] else "reached"
        yield Row(
            f"whole `repair` of the planted ViT-S, {len(photographs)} photographs of {SIZE} px",
            ours,
            "the paper's recipe, the reference's way, to as few outlying tokens",
            Cost(found["seconds"], found["gigabytes"]),
            floor,
            "the matrix products of all passes it makes",
            "≥ 20 × sooner, ≤ 60 s, ≤ 2 floors",
            None
            if not found["reached"] and faster < GOAL
            else faster >= GOAL and (ours.seconds or 0) <= min(60, 2 * floor),
            f"verdict: {summary['verdict']}, {left} tokens left; the opponent {reached}",
        )
        yield large_row(folder)


def large_row(folder: Path) -> Row:
    """A whole repair at ViT-L size; the opponent would take hours, and is not run."""
    weights, photographs = planted_vitl(folder)
    data = [part for path in photographs for part in ("--data", str(path))]
    run = folder / "run-L"
    ours = measured(sinder("repair", "dinov2_vitl14", "--weights", weights, *data, "--out", run))
    summary = json.loads((run / "summary.json").read_text())
    defects = summary["defects"]
    return Row(
        f"whole `repair` of a planted ViT-L, {len(photographs)} photographs of {SIZE} px",
        ours,
        goal="≤ 15 min, ≤ 6 GB",
        met=(ours.seconds or 0) <= 900 and (ours.gigabytes or 0) <= 6,
        note=f"verdict: {summary['verdict']}, {summary['steps']} steps,"
        f" outlying tokens {defects['before']['tokens']} → {defects['after']['tokens']}",
    )


def reference(weights: Path, enough: int, limit: float, photographs: Sequence[Path]) -> dict[str, Any]:
    """Repair in the reference's way until `enough` tokens are left or `limit` seconds have passed."""
    import resource

    from reference import ReferenceRepair

    from sinder_cli import ModelRequest, api
    from sinder_cli.backbone.opening import load_module
    from sinder_cli.defects.detection import norm_ratios, outlying
    from sinder_cli.defects.prediction import predict
    from sinder_cli.defects.tokens import stream_from_embedding
    from sinder_cli.images.decoding import decode
    from sinder_cli.repairing.forward import Directions
    from sinder_cli.repairing.settings import RepairSettings

    backbone = api.open_model(ModelRequest(MODEL, weights))
    module = load_module(backbone, "cpu")
    settings = RepairSettings(recipe="paper")
    spectra = predict(backbone).stages["cumulative"]
    directions = Directions(torch.stack([each.pair.direction for each in spectra]), [each.pair.gap for each in spectra])
    way = api.preprocessing(backbone, SIZE)
    images = [way(decode(path))[None] for path in photographs]

    def count() -> int:
        found = 0
        with torch.no_grad():
            for image in images[:: max(1, len(images) // COUNTED)][:COUNTED]:
                norms = [
                    tokens[:, backbone.prefix_tokens :].norm(dim=-1).unflatten(1, (SIZE // 14, SIZE // 14))
                    for tokens in stream_from_embedding(backbone, module, image)
                ]
                start = norm_ratios(norms[0])
                marks = [outlying(norm_ratios(each), start, FACTOR) for each in norms[1:]]
                found += int(torch.stack(marks).any(dim=0).sum())
        return found

    before = count()
    repair = ReferenceRepair(backbone, module, directions, settings)
    seconds, steps, left = 0.0, 0, before
    while seconds < limit:
        for _ in range(EVERY):
            began = time.perf_counter()
            repair.step(images[steps % len(images)])
            seconds, steps = seconds + time.perf_counter() - began, steps + 1
        left = count()
        if left <= enough:
            break
    return {
        "seconds": seconds,
        "reached": left <= enough,
        "left": left,
        "before": before,
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


if __name__ == "__main__":
    weights, enough, limit, *photographs = sys.argv[1:]
    print(json.dumps(reference(Path(weights), int(enough), float(limit), list(map(Path, photographs)))))
