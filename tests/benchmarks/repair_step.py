"""The repair step against the reference's way, side by side: time a step, peak memory, and the losses of both.

    python tests/benchmarks/repair_step.py                                      2 cores: depth 40, width 384, 518 px
    python tests/benchmarks/repair_step.py --device cuda --vitg --dtype bfloat16

All sides run the same random DINOv2 with the first defect in the last block, each in a process of its own, so that peak
memory is its own: the reference's way with the attention of the authors' code, the same with our kernel, and ours.
Decomposing the weights is done once before the steps and is not in the time; as all blocks are given the same weights,
each role is decomposed once and copied.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from sinder_plugins.dinov2 import sinder_backbone
from sinder_plugins.dinov2.config import OFFICIAL, Config, tensor_shapes
from torch import Tensor, nn

from sinder_cli import Backbone, MemoryTensors, ModelRequest, Weights
from sinder_cli.backbone.device import AttentionName
from sinder_cli.backbone.opening import load_module
from sinder_cli.repairing.deltas import Deltas
from sinder_cli.repairing.forward import Directions
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.repairing.step import step_gradient

SIDES = ("reference", "with-sdpa", "ours")


def main() -> None:
    """Run one side and print its figures as JSON, or both and print the ratios."""
    options = _options()
    if options.side:
        print(json.dumps(_measure(options)))
        return
    sides = {side: _in_a_process(side) for side in SIDES}
    _print_table(options, sides)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--vitg", action="store_true", help="ViT-g/14 instead of depth 40, width 384")
    parser.add_argument("--tiny", action="store_true", help="depth 12, width 64: to see that all runs")
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--batch-size", type=int, default=1, help="of our side; the reference takes one image a step")
    parser.add_argument("--steps", type=int, default=6)
    return parser.parse_args()


def _in_a_process(side: str) -> dict[str, Any]:
    run = subprocess.run([sys.executable, *sys.argv, "--side", side], check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return figures


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.linalg.svd = _remembered(torch.linalg.svd)
    backbone = random_backbone(chosen_config(options), "eager" if options.side == "reference" else "sdpa")
    module = load_module(backbone, options.device)
    backbone = replace(backbone, weights=Weights.of(MemoryTensors("dropped", {})))  # so that they are held once
    threshold = 2.0  # 2σ marks some tokens of any image
    settings = RepairSettings(
        recipe="paper", min_gap=1.1, mask_threshold=threshold, dtype=options.dtype, tf32=options.tf32
    )
    nu = nn.functional.normalize(torch.randn(backbone.depth, backbone.width), dim=1).to(options.device)
    directions = Directions(nu, [1.0] * (backbone.depth - 1) + [2.0])  # only the last block can be defective
    images = torch.randn(options.steps + 1, options.batch_size, 3, options.size, options.size)
    began = time.perf_counter()
    step = _side(options.side, backbone, module, directions, settings)
    _synchronize(options.device)
    prepared = time.perf_counter() - began
    seconds, busy, losses = [], [], []
    for image in images:
        batch = image[: None if options.side == "ours" else 1].to(options.device)
        _synchronize(options.device)
        began, began_busy = time.perf_counter(), time.process_time()
        losses.append(step(batch))
        _synchronize(options.device)
        seconds.append((time.perf_counter() - began) / len(batch))
        busy.append((time.process_time() - began_busy) / len(batch))
    return {
        "losses": losses,
        "seconds": seconds[1:],  # the first warms up, and ours decomposes its window there
        "busy": busy[1:],
        "prepared": prepared + (seconds[0] if options.side == "ours" else 0.0),
        "peak": _peak_memory(options.device),
    }


def _side(
    side: str, backbone: Backbone, module: nn.Module, directions: Directions, settings: RepairSettings
) -> Callable[[Tensor], float | None]:
    if side != "ours":
        from reference import ReferenceRepair

        return ReferenceRepair(backbone, module, directions, settings).step
    deltas = Deltas(backbone, module)

    def step(images: Tensor) -> float | None:
        gradient = step_gradient(deltas, directions, images, settings)
        deltas.descend(gradient.gradients, settings.lr, settings.momentum)
        return sum(gradient.losses) / len(gradient.losses) if gradient.losses else None

    return step


def chosen_config(options: argparse.Namespace) -> Config:
    """ViT-g/14, or a narrow one of the same depth."""
    if options.tiny:
        return Config(width=64, depth=12, hidden=256, grid=16)
    return OFFICIAL["dinov2_vitg14"] if options.vitg else narrow_config()


def random_backbone(config: Config, attention: AttentionName = "auto") -> Backbone:
    """A DINOv2 with random weights."""
    tensors = {name: random_tensor(name, shape) for name, shape in tensor_shapes(config).items()}
    source = MemoryTensors("random weights", tensors)
    request = ModelRequest("dinov2_custom", attention=attention)
    return sinder_backbone(request, Weights.of(source))


def narrow_config() -> Config:
    """Depth 40 and width 384, a plain MLP."""
    return replace(OFFICIAL["dinov2_vits14"], depth=40)


def random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values that depend on the role alone, so that all blocks are alike."""
    role = ".".join(name.split(".")[2:] if name.startswith("blocks.") else [name])
    return _tensor_of(role, shape).clone()


@lru_cache(maxsize=32)
def _tensor_of(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma")):
        return torch.ones(shape)
    scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.02
    return torch.randn(shape, generator=generator) * scale


def _remembered(svd: Callable[..., Any]) -> Callable[..., Any]:
    """`svd` that decomposes equal matrices once and hands out copies."""
    known: dict[tuple[Any, ...], Any] = {}

    def remembered(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, ...]:
        key = (*matrix.shape, matrix.double().sum().item(), full_matrices)
        if key not in known:
            known[key] = [part.cpu() for part in svd(matrix, full_matrices=full_matrices)]
        return tuple(part.to(matrix.device, copy=True) for part in known[key])

    return remembered


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _peak_memory(device: str) -> float:
    """GiB: allocated on the device, or resident in the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _print_table(options: argparse.Namespace, sides: dict[str, dict[str, Any]]) -> None:
    ours = sides["ours"]
    model = "ViT-g/14" if options.vitg else "depth 40, width 384"
    machine = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "CPU"
    print(
        f"{model}, {options.size} px, {options.dtype}, batch {options.batch_size}; {machine}, torch {torch.__version__}"
    )
    times = {side: statistics.median(figures["seconds"]) for side, figures in sides.items()}
    busy = {side: statistics.median(figures["busy"]) for side, figures in sides.items()}
    for side, figures in sides.items():
        print(
            f"  {side:9s} {times[side]:8.3f} s an image, {busy[side]:8.3f} s of CPU, peak {figures['peak']:6.2f} GiB,"
            f" prepared in {figures['prepared']:6.1f} s"
        )
    for side, figures in list(sides.items())[:-1]:
        faster, lighter = times[side] / times["ours"], busy[side] / busy["ours"]
        memory = ours["peak"] / figures["peak"]
        print(f"  ours against {side}: {faster:.2f} × faster, {lighter:.2f} × by CPU time, {memory:.0%} of the memory")
        if options.batch_size == 1:
            pairs = zip(figures["losses"], ours["losses"], strict=True)
            print(f"    losses differ by at most {max(abs(a - b) / abs(a) for a, b in pairs):.1e} (relative)")


if __name__ == "__main__":
    main()
