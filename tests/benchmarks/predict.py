"""`sinder predict-defects` against 100,000 Gaussian samples, least squares and full SVDs, as the paper's code does it.

The opponent draws inputs of a block from a Gaussian, runs its attention part (whose softmax is left out: every token
attends to itself), its MLP part and both, fits a linear map to each by least squares, and decomposes the sums fully;
the maps of all blocks are multiplied up. Its time is that of one block times the depth: all blocks are alike.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import Cost, Row, flops_per_second, measured, sinder
from models import model_of
from torch import Tensor
from torch.nn.functional import gelu, silu

from sinder_cli import GatedMlpMap, ModelRequest, api
from sinder_cli.backbone.weights import BlockTensors, read_block

SAMPLES = 100_000
GOALS = {"S": 20.0, "B": 20.0, "L": 20.0, "g": 150.0}  # times faster
MOST_FLOORS = 1.5


def rows(tiny: bool) -> Iterator[Row]:
    """Yield a row for each size."""
    sizes = "S" if tiny else "SBLg"
    rate = flops_per_second()
    with tempfile.TemporaryDirectory() as name:
        for size in sizes:
            model, path = model_of(size, Path(name), tiny)
            path.read_bytes()  # into the page cache
            ours = measured(sinder("predict-defects", model, "--weights", path))
            backbone = api.open_model(ModelRequest(model, path))
            began = time.perf_counter()
            sampled(read_block(backbone.weights, backbone.layers.blocks[0]), 200 if tiny else SAMPLES)
            theirs = Cost((time.perf_counter() - began) * backbone.depth)
            block = read_block(backbone.weights, backbone.layers.blocks[0])
            products = 6 * backbone.width**3 + 2 * backbone.width * block["mlp.down"].numel()  # W_o W_v, C A, E G; W₃ J
            floor = backbone.depth * products / rate
            faster = (theirs.seconds or 0) / (ours.seconds or 1)
            met = faster >= GOALS[size] and (size != "g" or (ours.seconds or 0) <= MOST_FLOORS * floor)
            goal = f"≥ {GOALS[size]:g} × faster" + (f", ≤ {MOST_FLOORS} floors, ≤ 1.5 GB" if size == "g" else "")
            yield Row(
                f"`predict-defects`, ViT-{size}" if not tiny else f"`predict-defects`, tiny for {size}", ours,
                f"{SAMPLES:,} samples a block, least squares, SVDs", theirs, floor, "its dense products", goal, met,
                f"{faster:.0f} × faster",
            )  # fmt: skip
            path.unlink()


def sampled(block: BlockTensors, samples: int) -> list[Tensor]:
    """Leading left singular vectors of the attention part, the MLP part, the block and the product of blocks."""
    width = block["attention.output"].shape[0]
    x = torch.randn(samples, width, device=block["attention.output"].device)
    attention, mlp = [], []
    for some in x.split(10_000):
        normed = block.normed(some, block.map.attention.norm, "attention.norm")
        attention.append(block.linear(block.linear(normed, "attention.value"), "attention.output"))
        normed = block.normed(some, block.map.mlp.norm, "mlp.norm")
        mlp.append(block.linear(hidden(block, normed), "mlp.down"))
    A, C = (torch.linalg.lstsq(x, torch.cat(parts)).solution.T for parts in (attention, mlp))
    identity = torch.eye(width, device=x.device)
    block_map = (identity + C) @ (identity + A)
    product = block_map @ torch.linalg.qr(torch.randn(width, width, device=x.device)).Q
    return [torch.linalg.svd(each).U[:, 0] for each in (identity + A, identity + C, block_map, product)]


def hidden(block: BlockTensors, x: Tensor) -> Tensor:
    """The hidden activations of the MLP: gated, or GELU."""
    if isinstance(block.map.mlp, GatedMlpMap):
        return silu(block.linear(x, "mlp.gate")) * block.linear(x, "mlp.up")
    return gelu(block.linear(x, "mlp.up"))
