"""`sinder analyze` of a ViT-S on photographs of 518 px, against the bare forward passes, and memory over many images.

    python tests/benchmarks/analyze.py [--images 100] [--many 10000]

Weights are random, in the official format; images are crops of scikit-image's photographs, saved as JPEG. Both sides
are whole processes with their start-up; the bare one runs tensors that are in memory already.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image
from repair_step import random_tensor
from sinder_plugins.dinov2.config import OFFICIAL, Config, tensor_shapes

from sinder_cli import TensorInfo
from sinder_cli.backbone.storing import write_safetensors

MODEL, SIDE = "dinov2_vits14", 518
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg")
SMALL = Config(width=64, depth=2, hidden=256, grid=16)
BARE = """
import sys, torch
from pathlib import Path
from sinder_cli import api
from sinder_cli.backbone.contract import ModelRequest
from sinder_cli.backbone.opening import load_module
module = load_module(api.open_model(ModelRequest(sys.argv[1], Path(sys.argv[2]))))
image = torch.randn(1, 3, int(sys.argv[3]), int(sys.argv[3]))
with torch.no_grad():
    for _ in range(int(sys.argv[4])):
        module(image)
"""


def main() -> None:
    """Make weights and images, time both sides in turn, and print ratio and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--many", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large, small = folder / "vits.safetensors", folder / "small.safetensors"
        write_checkpoint(large, OFFICIAL[MODEL])
        write_checkpoint(small, SMALL)
        images = write_images(folder / "images", options.images)
        bare, _ = measured([sys.executable, "-c", BARE, MODEL, str(large), str(SIDE), str(options.images)])
        whole, peak = measured(analyze(MODEL, large, images))
        print(
            f"{options.images} images of {SIDE} px, {MODEL}: analyze {whole:.1f} s ({peak:.2f} GB), bare {bare:.1f} s,"
        )
        print(f"ratio {whole / bare:.2f}; {torch.get_num_threads()} threads, torch {torch.__version__}")
        for count in (100, options.many):
            links = link_images(folder / str(count), images, count)
            seconds, peak = measured([*analyze("dinov2_custom", small, links), "--image-size", "224"])
            print(f"{count} images of 224 px, a small model: {1024 * peak:.0f} MB at most, {seconds:.1f} s")


def write_checkpoint(path: Path, config: Config) -> None:
    """Random weights in the official format."""
    infos = {name: TensorInfo(shape, torch.float32) for name, shape in tensor_shapes(config).items()}
    write_safetensors(path, infos, (random_tensor(name, info.shape) for name, info in infos.items()))


def write_images(folder: Path, count: int) -> Path:
    """Square crops of photographs, each another one."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    wide = [Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB") for name in PHOTOGRAPHS]
    for index in range(count):
        photograph = wide[index % len(wide)].resize((700, 700))
        left, top = generator.integers(0, 700 - SIDE, 2).tolist()
        photograph.crop((left, top, left + SIDE, top + SIDE)).save(folder / f"{index:04d}.jpg", quality=92)
    return folder


def link_images(folder: Path, images: Path, count: int) -> Path:
    """So many names for the same files."""
    folder.mkdir()
    files = sorted(images.iterdir())
    for index in range(count):
        (folder / f"{index:05d}.jpg").symlink_to(files[index % len(files)])
    return folder


def analyze(model: str, weights: Path, images: Path) -> list[str]:
    """The command line."""
    given = ["--weights", str(weights), "--data", str(images), "--format", "json"]
    return [sys.executable, "-m", "sinder_cli", "analyze", model, *given]


def measured(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident gigabytes of a process, without those of its children."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:5])} … failed with status {status}")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


if __name__ == "__main__":
    main()
