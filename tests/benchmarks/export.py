"""`sinder export` of a ViT-g against loading all of it and saving it, and against a copy of the file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from measuring import PYTHON, Row, in_turn, sinder
from models import model_of

SAVE = """
import sys, torch
from safetensors.torch import load_file
torch.save(load_file(sys.argv[1]), sys.argv[2])
with open(sys.argv[2], "rb+") as file:
    import os
    os.fsync(file)
"""
COPY = """
import os, shutil, sys
shutil.copyfile(sys.argv[1], sys.argv[2])
with open(sys.argv[2], "rb+") as file:
    os.fsync(file)
"""


def rows(tiny: bool) -> Iterator[Row]:
    """Yield a row for each target. All sides wait until the bytes are on the disk."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, weights = model_of("g", folder, tiny)
        saved, copied = folder / "saved.pth", folder / "copied.safetensors"
        outputs = {"native": folder / "native.pth", "transformers": folder / "transformers"}
        ours = {
            target: sinder(
                "export", model, "--weights", weights, "--to", target, "--out", out, "--force", "--no-verify"
            )
            for target, out in outputs.items()
        }
        commands = [[PYTHON, "-c", code, str(weights), str(out)] for code, out in ((SAVE, saved), (COPY, copied))]
        save, copy, *costs = in_turn([*commands, *ours.values()], 1 if tiny else 2)
        for target, cost in zip(ours, costs, strict=True):
            light = (cost.gigabytes or 0) <= 0.5 * (save.gigabytes or 0)
            quick = target != "native" or (cost.seconds or 0) <= 1.2 * (copy.seconds or 0)
            goal = "≤ 0.5 × memory" + (", ≤ 1.2 floors" if target == "native" else "")
            yield Row(
                f"`export --to {target} --no-verify`, ViT-g", cost, "load all, `torch.save`", save, copy.seconds,
                "a copy of the file", goal, light and quick,
            )  # fmt: skip
