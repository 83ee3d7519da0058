"""The repair step: against the reference's way, against image size and batch; and the decomposition of a window.

`repair_step.py` runs each side in a process of its own.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import PYTHON, Cost, Row, flops_per_second, last_line
from sinder_plugins.dinov2.config import OFFICIAL

from sinder_cli.repairing.deltas import singular_basis

STEP = Path(__file__).with_name("repair_step.py")
DEPTH, WIDTH, WINDOW, PATCH = 40, 384, 10, 14


def rows(tiny: bool) -> Iterator[Row]:
    """Yield rows for the step, for its growth with size and batch, and for the decompositions."""
    size, steps = (84, 2) if tiny else (518, 6)
    ours = _side("ours", size, 1, steps, tiny)
    floor = arithmetic(size) / flops_per_second()
    for side, way, goal, least in (
        ("reference", "parametrized weights, autograd through the whole depth", "≥ 4 ×, ≤ 0.25 × memory", 4),
        ("with-sdpa", "the same with our attention kernel", "≥ 2.4 ×", 2.4),
    ):
        theirs = _side(side, size, 1, steps, tiny)
        faster = (theirs.seconds or 0) / (ours.seconds or 1)
        met = faster >= least and (least != 4 or (ours.gigabytes or 0) <= 0.25 * (theirs.gigabytes or 0))
        work, words = (
            f"a repair step, depth {DEPTH}, width {WIDTH}, window {WINDOW}, {size} px",
            f"{faster:.2f} × faster",
        )
        yield Row(work, ours, way, theirs, floor, "40 blocks forward, 10 forward and back", goal, met, words)
    for pixels, batch in ((size // 2 // PATCH * PATCH, 1), (size, 4)):
        cost = _side("ours", pixels, batch, steps, tiny)
        grown = (ours.seconds or 0) / (cost.seconds or 1)
        expected = arithmetic(size) / arithmetic(pixels)
        yield Row(
            f"the step at {pixels} px, batch {batch}, an image",
            cost,
            f"at {size} px, batch 1",
            ours,
            arithmetic(pixels) / flops_per_second(),
            "as above",
            "grows no faster than the arithmetic",
            grown <= 1.1 * expected if batch == 1 else (cost.seconds or 0) <= 1.1 * (ours.seconds or 0),
            f"time {grown:.2f} ×, arithmetic {expected:.2f} ×",
        )
    yield decompositions(tiny)


def _side(side: str, size: int, batch: int, steps: int, tiny: bool) -> Cost:
    options = [
        "--side",
        side,
        "--size",
        str(size),
        "--batch-size",
        str(batch),
        "--steps",
        str(steps),
        *(["--tiny"] if tiny else []),
    ]
    figures = json.loads(last_line([PYTHON, str(STEP), *options]))
    return Cost(statistics.median(figures["seconds"]), figures["peak"] * 2**30 / 1e9)


def arithmetic(size: int) -> float:
    """Operations of a step on one image: all blocks forward; the window forward again, and back to its inputs."""
    tokens = (size // PATCH) ** 2 + 1
    block = 24 * tokens * WIDTH**2 + 4 * tokens**2 * WIDTH
    return block * (DEPTH + 2 * WINDOW)


def decompositions(tiny: bool) -> Row:
    """The row for the singular values of one block's targets, float64, against float64 SVDs one by one."""
    width, hidden = (64, 170) if tiny else (OFFICIAL["dinov2_vitg14"].width, OFFICIAL["dinov2_vitg14"].hidden)
    shapes = [(width, width), (width, width), (hidden, width), (hidden, width), (width, hidden)]
    weights = [torch.randn(shape) * shape[1] ** -0.5 for shape in shapes]
    began = time.perf_counter()
    for weight in weights:
        singular_basis(weight)
    ours = Cost(time.perf_counter() - began)
    began = time.perf_counter()
    for weight in weights:
        torch.linalg.svd(weight.double(), full_matrices=False)
    theirs = Cost(time.perf_counter() - began)
    met = (ours.seconds or 0) <= 1.05 * (theirs.seconds or 0)
    return Row(
        f"singular values of a ViT-g block: {len(shapes)} weights", ours, "`torch.linalg.svd` in float64, one by one",
        theirs, goal="no slower", met=met, note="a window has ten; only blocks that move are decomposed",
    )  # fmt: skip
