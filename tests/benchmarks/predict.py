"""`sinder predict-defects` on a ViT-g-sized checkpoint, against the dense matrix products alone.

    python tests/benchmarks/predict.py [--keep FILE]

Writes 1.1 billion random float32 parameters (4.5 GB) to a temporary folder, or to FILE, which is kept.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from repair_step import random_tensor
from sinder_plugins.dinov2.config import OFFICIAL, tensor_shapes

from sinder_cli import TensorInfo
from sinder_cli.backbone.storing import write_safetensors

MODEL = "dinov2_vitg14"


def main() -> None:
    """Write the checkpoint, time both, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.keep or Path(folder, "vitg.safetensors")
        if not path.exists():
            write_checkpoint(path)
        seconds, gigabytes = predict(path)
    floor = dense_products()
    print(f"predict-defects, {MODEL}, all four stages: {seconds:.1f} s, {gigabytes:.2f} GB resident at most")
    print(f"its dense matrix products alone: {floor:.1f} s; ratio {seconds / floor:.2f}; torch {torch.__version__}")


def write_checkpoint(path: Path) -> None:
    """Random weights in the official format."""
    infos = {name: TensorInfo(shape, torch.float32) for name, shape in tensor_shapes(OFFICIAL[MODEL]).items()}
    write_safetensors(path, infos, (random_tensor(name, info.shape) for name, info in infos.items()))


def predict(path: Path) -> tuple[float, float]:
    """Wall seconds and peak resident gigabytes of the whole command, start-up included."""
    command = [sys.executable, "-m", "sinder_cli", "predict-defects", MODEL, "--weights", str(path)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"predict-defects failed with status {status}")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


def dense_products() -> float:
    """Wall seconds of W_o W_v, W₃ J, C A and E G for all blocks, on matrices in memory."""
    config = OFFICIAL[MODEL]
    N, H = config.width, config.hidden
    square, down, hidden = torch.randn(N, N), torch.randn(N, H), torch.randn(H, N)
    out = torch.empty(N, N)
    began = time.perf_counter()
    for _ in range(config.depth):
        for left, right in ((square, square), (down, hidden), (square, square), (square, square)):
            torch.mm(left, right, out=out)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
