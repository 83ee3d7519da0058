"""The table of `make bench` on a GPU: prediction, steps and whole repairs at ViT-g size, in float32, TF32 and bfloat16.

    python tests/benchmarks/gpu.py [--only rates predict forward step svd repair real] [--tiny] [--device cuda]

Each row is printed as it is measured, and the rows of all parts as one table at the end; a part that fails says so and
costs no other. `--tiny` runs everything at a size that takes seconds, on the CPU, too: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measuring import PYTHON, Cost, Row, last_line, measured, sinder, table
from models import REAL, SIZES, SMALL, SUPPORT, write_checkpoint
from predict import SAMPLES, sampled
from repair_step import random_backbone
from sinder_plugins.dinov2.config import OFFICIAL, Config

from sinder_cli import ModelRequest, api
from sinder_cli.backbone.device import float32_products
from sinder_cli.backbone.opening import load_module
from sinder_cli.backbone.weights import read_block
from sinder_cli.defects.prediction import predict
from sinder_cli.defects.tokens import in_precision, last_tokens
from sinder_cli.repairing.deltas import singular_basis

PATCH, BATCH, WINDOW = 14, 4, 10
OPTIONS = {"float32": [], "TF32": ["--tf32"], "bfloat16": ["--dtype", "bfloat16"]}  # by precision
PRECISIONS = tuple(OPTIONS)
STEP = Path(__file__).with_name("repair_step.py")


@dataclass(frozen=True)
class Bench:
    """What all parts share: the device, the size, a folder, and the rates that this device reaches."""

    device: str
    tiny: bool
    folder: Path
    rates: dict[str, float]  # operations a second of a plain product, by precision
    precisions: Sequence[str] = PRECISIONS

    @property
    def config(self) -> Config:
        return SMALL if self.tiny else OFFICIAL["dinov2_vitg14"]

    @property
    def model(self) -> str:
        return "dinov2_custom" if self.tiny else SIZES["g"]

    @property
    def size(self) -> int:
        return 84 if self.tiny else 518

    @property
    def weights(self) -> Path:
        """A file of random weights, written once."""
        path = self.folder / "weights.safetensors"
        return path if path.exists() else write_checkpoint(path, self.config)


def timed(device: str, work: Callable[[], object], rounds: int = 5) -> float:
    """Return the median seconds of a call, after one that warms up."""
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def product_rates(device: str, tiny: bool) -> dict[str, float]:
    """Return the rate of a plain matrix product by precision, in operations a second."""
    size, found = 256 if tiny else 8192, {}
    for precision in PRECISIONS:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        with float32_products(precision == "TF32"):
            found[precision] = 2 * size**3 / timed(device, lambda a=one, b=other: a @ b)
    return found


def block_operations(config: Config, size: int) -> float:
    """Return the operations of one block's forward pass on one image, as matrix products alone."""
    tokens, width = (size // PATCH) ** 2 + 1, config.width
    branches = 3 if config.mlp == "SwiGLU" else 2
    return 2 * tokens * (4 * width**2 + branches * width * config.hidden) + 4 * tokens**2 * width


def predictions(bench: Bench) -> Iterator[Row]:
    """Yield rows for prediction from a file in the page cache: the whole command, and what follows the start."""
    bench.weights.read_bytes()
    ours = measured(sinder("predict-defects", bench.model, "--weights", bench.weights, "--device", bench.device))
    backbone = api.open_model(ModelRequest(bench.model, bench.weights))
    block = read_block(backbone.weights, backbone.layers.blocks[0], device=bench.device)
    theirs = Cost(
        timed(bench.device, lambda: sampled(block, 200 if bench.tiny else SAMPLES), rounds=1) * backbone.depth
    )
    alone = timed(bench.device, lambda: predict(backbone, device=bench.device), rounds=2)
    products = 6 * backbone.width**3 + 2 * backbone.width * block["mlp.down"].numel()
    floor = backbone.depth * products / bench.rates["float32"]
    opponent = f"{SAMPLES:,} samples a block, least squares, SVDs, on the same device"
    words = "its dense products"
    yield Row("`predict-defects`, the whole command", ours, opponent, theirs, floor, words)
    yield Row(
        "the prediction alone, file in the page cache", Cost(alone), opponent, theirs, floor, words, "< 2 s", alone < 2
    )


def forwards(bench: Bench) -> Iterator[Row]:
    """Yield rows for the bare forward pass, and the share of the product's rate that it reaches."""
    backbone = random_backbone(bench.config)
    module = load_module(backbone, bench.device)
    images = torch.randn(BATCH, 3, bench.size, bench.size, device=bench.device)
    for precision in bench.precisions:
        dtype = "bfloat16" if precision == "bfloat16" else "float32"
        chosen = in_precision(backbone, dtype, tf32=precision == "TF32")
        seconds = timed(bench.device, lambda running=chosen: last_tokens(running, module, images)) / BATCH
        operations = backbone.depth * block_operations(bench.config, bench.size)
        floor = operations / bench.rates[precision]
        yield Row(
            f"a forward pass, {precision}, batch {BATCH}, an image", Cost(seconds), floor=floor,
            floor_of="its products", note=f"{operations / seconds / 1e12:.0f} TFLOP/s",
        )  # fmt: skip


def steps(bench: Bench) -> Iterator[Row]:
    """Yield rows for the repair step: the reference's way, the same with our kernel, and ours."""
    for precision in bench.precisions:
        chosen = [*OPTIONS[precision], "--tiny" if bench.tiny else "--vitg"]
        ours = one_side(bench, "ours", chosen)
        several = one_side(bench, "ours", [*chosen, "--batch-size", str(BATCH)])
        operations = (bench.config.depth + 2 * WINDOW) * block_operations(bench.config, bench.size)
        floor = operations / bench.rates[precision]
        sides = {"reference": "the reference's way", "with-sdpa": "the same with our attention kernel"}
        for side, way in list(sides.items())[: None if precision == "float32" else 1]:
            theirs = one_side(bench, side, chosen)
            for cost, batch in ((ours, 1), (several, BATCH)):
                faster = (theirs.seconds or 0) / (cost.seconds or 1)
                yield Row(
                    f"a repair step, window {WINDOW}, {precision}, batch {batch}, an image", cost, way, theirs, floor,
                    "40 blocks forward, 10 forward and back", *(("≥ 5 ×", faster >= 5) if side == "reference" else ()),
                    note=f"{faster:.1f} × faster",
                )  # fmt: skip


def one_side(bench: Bench, side: str, chosen: Sequence[str]) -> Cost:
    """Measure one side of the step in a process of its own; the gigabytes are those of the device."""
    count = ["--side", side, "--device", bench.device, "--steps", "2" if bench.tiny else "6", "--size", str(bench.size)]
    figures = json.loads(last_line([PYTHON, str(STEP), *count, *chosen]))
    return Cost(statistics.median(figures["seconds"]), figures["peak"] * 2**30 / 1e9)


def decompositions(bench: Bench) -> Iterator[Row]:
    """Yield a row for the singular values of one block, in float64, against `torch.linalg.svd` one by one."""
    width, hidden = (64, 170) if bench.tiny else (bench.config.width, bench.config.hidden)
    shapes = [(width, width), (width, width), (hidden, width), (hidden, width), (width, hidden)]
    weights = [torch.randn(shape, device=bench.device) * shape[1] ** -0.5 for shape in shapes]
    ours = timed(bench.device, lambda: [singular_basis(weight) for weight in weights], rounds=1)
    theirs = timed(
        bench.device, lambda: [torch.linalg.svd(weight.double(), full_matrices=False) for weight in weights], rounds=1
    )
    yield Row(
        f"singular values of a block: {len(weights)} weights, float64", Cost(ours), "`torch.linalg.svd` one by one",
        Cost(theirs), goal="no slower", met=ours <= 1.05 * theirs,
    )  # fmt: skip


def planted_file(bench: Bench) -> Path:
    """Write a model of this size with random weights and a planted defect, once. Raises `NotToBeHadError`."""
    sys.path[:0] = [str(REAL), str(SUPPORT)]
    from planted_dinov2 import SMALL as PLANTED_SMALL
    from planted_dinov2 import planted
    from real_files import photographs

    path = bench.folder / "planted.pth"
    if not path.exists():
        calibration = bench.folder / "calibration"
        calibration.mkdir()
        for photograph in photographs().training[:6]:
            (calibration / photograph.name).symlink_to(photograph)
        config = replace(PLANTED_SMALL, mlp="SwiGLU") if bench.tiny else bench.config
        torch.save(planted(config, calibration), path)
    return path


def whole_repairs(bench: Bench) -> Iterator[Row]:
    """Yield rows for whole repairs of a planted model of this size with random weights, command to verdict."""
    weights = planted_file(bench)
    from real_files import photographs

    data = [*photographs().training, *photographs().held_out][: 8 if bench.tiny else 40]
    for precision in bench.precisions:
        yield repair_row(bench, f"a planted ViT-g, {precision}", bench.model, weights, data, OPTIONS[precision])


def real_repairs(bench: Bench) -> Iterator[Row]:
    """Yield rows for whole repairs of the real ViT-S with a planted defect."""
    from models import planted_vits

    weights, data = planted_vits(bench.folder)
    for precision in bench.precisions[: 1 if bench.tiny else None]:
        chosen = [*OPTIONS[precision], *(["--max-steps", "1"] if bench.tiny else [])]
        yield repair_row(bench, f"the planted real ViT-S, {precision}", SIZES["S"], weights, data, chosen)


def repair_row(bench: Bench, what: str, model: str, weights: Path, data: Sequence[Path], chosen: Sequence[str]) -> Row:
    """Repair once; the gigabytes are resident memory of the process."""
    run = bench.folder / "run"
    size = 168 if bench.tiny else 518
    named = [part for path in data for part in ("--data", str(path))]
    given = ["--weights", weights, *named, "--image-size", size, "--device", bench.device, *chosen]
    ours = measured(sinder("repair", model, *given, "--out", run, "--force"), allowed=(0, 1))
    summary = json.loads((run / "summary.json").read_text())
    defects = summary["defects"]
    return Row(
        f"whole `repair` of {what}, {len(data)} photographs of {size} px", ours, goal="< 30 min",
        met=(ours.seconds or 0) < 1800, note=f"verdict: {summary['verdict']}, {summary['steps']} steps, "
        f"outlying tokens {defects['before']['tokens']} → {defects['after']['tokens']}",
    )  # fmt: skip


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "predict": predictions,
    "forward": forwards,
    "step": steps,
    "svd": decompositions,
    "repair": whole_repairs,
    "real": real_repairs,
}


def main() -> None:
    """Run the parts and print the table; exit 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path, help="keeps the models for another call; default: a temporary one")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "the CPU"
    rates = product_rates(options.device, options.tiny)
    reached = ", ".join(f"{precision} {rate / 1e12:.3g}" for precision, rate in rates.items())
    print(f"{name}, torch {torch.__version__}; TFLOP/s of a plain product: {reached}", flush=True)
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.device, options.tiny, options.folder or Path(folder), rates, options.precisions)
        for part in options.only:
            try:
                for row in PARTS[part](bench):
                    print("  ".join(cell for cell in row.cells() if cell), flush=True)
                    rows.append(row)
            except (Exception, SystemExit):  # noqa: PERF203
                failed.append(part)
                traceback.print_exc()
    print(table(rows))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
