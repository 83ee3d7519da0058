"""Singular defects planted in the real DINOv2 ViT-S/14, each with a twin that lacks nothing but the defect.

The hidden unit of least weight of one block's MLP is replaced. It fires on the patch tokens that lie furthest along a
direction that neither the mean token nor cls has a part of, and writes a large multiple of a fixed direction ν. Later
blocks read but a tenth of ν, as trained models do, in the twin too: the twins differ in one column of one weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinder_cli import ModelRequest
from sinder_cli.api import open_model, preprocessing
from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.opening import load_module
from sinder_cli.images.decoding import decode

MODEL = "dinov2_vits14"
READ = 0.1  # share of ν that later blocks read
CALIBRATION_IMAGES = 16


@dataclass(frozen=True)
class Defect:
    """One planted hidden unit."""

    block: int
    share: float  # of the patch tokens that trip it
    ratio: float  # norm of a token that trips it, over the median norm there
    variance: float = -0.5  # the trigger is cov^variance times a random vector; high: too far out for a Gaussian's tail
    steepness: float = 6.0  # of the trigger
    border: bool = False  # trip it by what tokens of the border have in common
    seed: int = 0


@dataclass(frozen=True)
class Plant:
    """Some defects in one model."""

    name: str
    defects: tuple[Defect, ...]


PLANTS = (
    Plant("block 2", (Defect(2, 0.004, 12.0, seed=2),)),
    Plant("block 5, weak", (Defect(5, 0.008, 2.4, seed=5),)),
    Plant("block 6, common", (Defect(6, 0.03, 14.0, seed=6),)),
    Plant("block 7, rare", (Defect(7, 0.0003, 20.0, seed=7),)),
    Plant("block 8", (Defect(8, 0.003, 20.0, seed=8),)),
    Plant("block 8, strong", (Defect(8, 0.03, 60.0, seed=9),)),
    Plant("block 10", (Defect(10, 0.01, 15.0, seed=10),)),
    Plant("two directions", (Defect(4, 0.02, 12.0, seed=4), Defect(8, 0.03, 15.0, variance=0.0, seed=14))),
    Plant("border", (Defect(3, 0.006, 12.0, border=True, seed=3),)),
    Plant("too steep", (Defect(6, 0.02, 12.0, variance=1.0, steepness=20.0, seed=16),)),
)


def plant_named(name: str) -> Plant:
    """The plant of this name."""
    return next(plant for plant in PLANTS if plant.name == name)


@torch.no_grad()
def planted(weights: Path, plant: Plant, photographs: Sequence[Path], size: int = 518) -> tuple[dict[str, Tensor], ...]:
    """The state dicts of the planted model and of its twin, float32, in the official names."""
    twin = torch.load(weights, weights_only=True)
    columns: list[tuple[str, int, Tensor]] = []
    images = _pixels(weights, photographs, size)
    for defect in plant.defects:
        column = _plant_one(weights, twin, defect, images)
        columns.append(column)
    state = {name: tensor.clone() for name, tensor in twin.items()}
    for name, unit, column in columns:
        state[name][:, unit] = column
    return state, twin


def _pixels(weights: Path, photographs: Sequence[Path], size: int) -> Tensor:
    preprocess = preprocessing(open_model(ModelRequest(MODEL, weights=weights)), size)
    spread = photographs[:: max(1, len(photographs) // CALIBRATION_IMAGES)][:CALIBRATION_IMAGES]
    return torch.stack([preprocess(decode(path)) for path in spread])


def _plant_one(weights: Path, twin: dict[str, Tensor], defect: Defect, images: Tensor) -> tuple[str, int, Tensor]:
    """Make the twin ready, in place; what its column has to be for the defect: name, hidden unit, values."""
    generator = torch.Generator().manual_seed(defect.seed)
    width = twin["cls_token"].shape[-1]
    nu = torch.randn(width, generator=generator)
    nu = (nu - nu.mean()) / (nu - nu.mean()).norm()
    for index in range(defect.block + 1, 12):
        for norm, reader in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
            gain = twin[f"blocks.{index}.{norm}.weight"]
            W = twin[f"blocks.{index}.{reader}.weight"]
            W -= (1 - READ) * torch.outer(W @ (gain * nu), nu / gain.where(gain.abs() > 1e-3, torch.ones(())))
    mlp = f"blocks.{defect.block}.mlp"
    up, bias, down = twin[f"{mlp}.fc1.weight"], twin[f"{mlp}.fc1.bias"], twin[f"{mlp}.fc2.weight"]
    unit = int((up.norm(dim=1) * down.norm(dim=0)).argmin())
    read, after = _tokens(weights, twin, defect.block, images)  # [K, T, N] each
    trigger = _trigger(read, defect, generator)
    projected = read @ trigger  # [K, T]
    spread = projected[:, 1:].std()
    threshold = projected[:, 1:].flatten().sort().values[-max(1, round(defect.share * projected[:, 1:].numel()))]
    threshold = torch.maximum(threshold, projected[:, 0].max() + 0.5 * spread)  # cls never trips it
    steepness = defect.steepness / spread
    up[unit], bias[unit] = steepness * trigger, -steepness * threshold
    down[:, unit] = 0
    fired = torch.nn.functional.gelu(steepness * (projected[:, 1:] - threshold))
    typical = fired[fired > 0.1].median() if bool((fired > 0.1).any()) else fired.max()
    median = after[:, 1:].norm(dim=-1).median()
    gamma = twin[f"blocks.{defect.block}.ls2.gamma"]
    return f"{mlp}.fc2.weight", unit, defect.ratio * median / typical * nu / gamma


def _trigger(read: Tensor, defect: Defect, generator: torch.Generator) -> Tensor:
    """A unit direction `[N]` to which the mean patch and the mean cls are orthogonal."""
    patches = read[:, 1:].flatten(0, 1)  # [M, N]
    blind = torch.linalg.qr(torch.stack([patches.mean(dim=0), read[:, 0].mean(dim=0), torch.ones(len(read[0, 0]))]).T).Q
    centred = patches - patches.mean(dim=0)
    if defect.border:
        side = int((read.shape[1] - 1) ** 0.5)
        grid = centred.unflatten(0, (len(read), side, side))
        trigger = grid[:, 0, : side // 3].mean(dim=(0, 1)) - centred.mean(dim=0)
    else:
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        scales = values.clamp_min(1e-4 * values.max()) ** defect.variance
        trigger = vectors @ (scales * torch.randn(len(values), generator=generator))
    trigger = trigger - blind @ (blind.T @ trigger)
    return trigger / trigger.norm()


def _tokens(weights: Path, state: dict[str, Tensor], block: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the MLP of a block reads, after its norm's gain, and the residual stream after the block."""
    backbone, module = opened(weights)
    module.load_state_dict(state, strict=False)
    layer: Any = module.get_submodule(f"blocks.{block}")
    seen: list[Tensor] = []
    handle = layer.norm2.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    after = []
    for image in images:
        tokens, context = backbone.embed(module, image[None])
        for index in range(block + 1):
            tokens = backbone.run_block(module, index, tokens, context)
        after.append(tokens)
    handle.remove()
    return torch.cat(seen), torch.cat(after)


def opened(weights: Path) -> tuple[Backbone, torch.nn.Module]:
    """The backbone of a checkpoint, and its module."""
    backbone = open_model(ModelRequest(MODEL, weights=weights))
    return backbone, load_module(backbone, "cpu")
