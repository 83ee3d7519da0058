"""Weights from a seed, and the planted defect.

A trigger neuron of block 5's MLP fires on a few patch tokens and writes a large multiple of a fixed direction ν. It
reacts to a direction that tokens hardly use, except a few whose position embedding contains it. Later blocks do not
read ν, so that it stays unchanged in the residual stream: an input-independent, high-norm token. As in real models,
cls attends to this token, and so attends less to the others.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sinder_cli import IMAGENET_MEAN, IMAGENET_STD

from . import GRID, HEADS, PATCH, WIDTH
from .drawing import draw_images
from .model import DemoVit

SEED = 2
BLOCK = 5  # where the defect is written
NEURON = 0  # of that block's MLP
EMBEDDING = 4.0  # scale of patches and positions; large compared with the output of a block
WRITING = 0.25  # scale of the weights that write to the residual stream
POSITIONS = 9  # patches whose position embedding contains the trigger, of 400
CARRIED = 24.0  # amount of the trigger in them; tokens have a norm near 110
THRESHOLD = 1.2  # of the trigger, in standard deviations of a normalized token's entries
STEEPNESS = 10.0  # of the trigger; large enough that GELU is nearly 0 for all other tokens
STRENGTH = 50.0  # of the column that writes ν
ATTRACTION = 5.0  # increase of the attention logit of cls for a defective token
CALIBRATION_IMAGES = 8
GRAIN = 2.0**-12  # unit for rounding measured values: far coarser than differences between machines or thread counts


def demo_weights(planted: bool) -> dict[str, Tensor]:
    """Return the state dict of `demo_vit` (planted) or `demo_vit_clean`; they differ only in the column that writes ν.

    The bits are the same on every machine: computed values are computed in float64, and then rounded.
    """
    return {name: tensor.clone() for name, tensor in _twins()[0 if planted else 1].items()}


@lru_cache(maxsize=1)
def _twins() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    state = {name: tensor.double() for name, tensor in _random_state(generator).items()}
    nu = _grained(_centred_unit(torch.randn(WIDTH, generator=generator).double()))
    nu /= nu.norm()
    for index, cls_query in _cls_queries(state).items():  # of the blocks after the planted one
        qkv, up = state[f"blocks.{index}.qkv.weight"], state[f"blocks.{index}.up.weight"]
        up -= torch.outer(up @ nu, nu)
        qkv -= torch.outer(qkv @ nu, nu)
        qkv[WIDTH : 2 * WIDTH] += torch.outer(_attracting_key(cls_query), nu)
    trigger = _unused_direction(_mlp_input(state))
    places = _scattered_places(generator)
    state["position"][0, 1 + places] += CARRIED * trigger
    mlp = f"blocks.{BLOCK}"
    state[f"{mlp}.up.weight"][NEURON] = STEEPNESS * trigger
    state[f"{mlp}.up.bias"][NEURON] = -STEEPNESS * THRESHOLD
    clean = {name: tensor.float() for name, tensor in state.items()}
    clean[f"{mlp}.down.weight"][:, NEURON] = 0.0
    state[f"{mlp}.down.weight"][:, NEURON] = STRENGTH * nu
    return {name: tensor.float() for name, tensor in state.items()}, clean


def _random_state(generator: torch.Generator) -> dict[str, Tensor]:
    """Draw Gaussian weights, with scales that keep tokens distinct over twelve blocks."""

    def scale(name: str, shape: torch.Size) -> float:
        if name == "patches.weight":
            return EMBEDDING / (PATCH * 3**0.5)
        if name in {"cls", "position"}:
            return EMBEDDING if name == "position" else 1.0
        reads = name.split(".")[-2] in {"qkv", "up"}
        return (1.0 if reads else WRITING) / shape[-1] ** 0.5

    state = {}
    with torch.device("meta"):
        template = DemoVit(scaled_dot_product_attention).state_dict()
    for name, empty in template.items():
        if "norm" in name and name.endswith("weight"):
            state[name] = torch.ones(empty.shape)
        elif name.endswith("bias"):
            state[name] = torch.zeros(empty.shape)
        else:
            state[name] = torch.randn(empty.shape, generator=generator) * scale(name, empty.shape)
    return state


def _attracting_key(cls_query: Tensor) -> Tensor:
    """Return the key `[N]` that raises the attention logit of cls by ATTRACTION when multiplied by √N.

    A normalized defective token is √N ν.
    """
    q = cls_query.unflatten(0, (HEADS, -1))  # [heads, d]
    unit_logit = q / q.square().sum(dim=1, keepdim=True) * q.shape[1] ** 0.5
    return ATTRACTION / WIDTH**0.5 * unit_logit.flatten()


@torch.no_grad()
def _cls_queries(state: dict[str, Tensor]) -> dict[int, Tensor]:
    """Return the query `[N]` of cls in each block after the planted one, averaged over the calibration images."""
    model = _model(state)
    x = model.embed(_calibration_images())
    queries = {}
    for index, block in enumerate(model.sequence):
        if index > BLOCK:
            queries[index] = _grained(block.qkv(block.norm1(x[:, 0]))[:, :WIDTH].mean(dim=0))
        x = block(x)
    return queries


@torch.no_grad()
def _mlp_input(state: dict[str, Tensor]) -> Tensor:
    """Return the input of the planted block's MLP, `[K, 1 + patches, N]`, on the K calibration images."""
    model = _model(state)
    x = model.embed(_calibration_images())
    *before, block = model.sequence[: BLOCK + 1]
    for earlier in before:
        x = earlier(x)
    return block.norm2(x + block.mix(x))


def _unused_direction(x: Tensor) -> Tensor:
    """Return the direction `[N]` of least second moment of normalized tokens, except the trivial one (1, …, 1)."""
    tokens = x.flatten(0, 1)
    moment = tokens.T @ tokens / len(tokens) + torch.ones(WIDTH, WIDTH, dtype=torch.float64)
    least = torch.linalg.eigh(moment).eigenvectors[:, 0]
    return _centred_unit(_grained(least * torch.sign(least[least.abs().argmax()])))


def _scattered_places(generator: torch.Generator) -> Tensor:
    """Draw interior patches, no two of them neighbours, as row-major indices."""
    rows, columns = torch.meshgrid(torch.arange(2, GRID - 2, 3), torch.arange(2, GRID - 2, 3), indexing="ij")
    places = (rows * GRID + columns).flatten()
    return places[torch.randperm(len(places), generator=generator)[:POSITIONS]]


def _model(state: dict[str, Tensor]) -> DemoVit:
    """Return the module with these weights, in float64."""
    model = DemoVit(scaled_dot_product_attention).double()
    model.load_state_dict(state)
    return model


@lru_cache(maxsize=1)
def _calibration_images() -> Tensor:
    import numpy as np

    side = GRID * PATCH
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    arrays = [np.asarray(image.resize((side, side))) for image in draw_images(CALIBRATION_IMAGES, SEED)]
    pixels = torch.from_numpy(np.stack(arrays)).double() / 255.0
    return ((pixels - mean) / std).permute(0, 3, 1, 2)


def _grained(measured: Tensor) -> Tensor:
    """Round to multiples of GRAIN, so that results of different machines become equal."""
    return (measured / GRAIN).round() * GRAIN


def _centred_unit(vector: Tensor) -> Tensor:
    """Return unit vectors whose entries sum to zero, as LayerNorm's outputs do: `[…, N]` → `[…, N]`."""
    centred = vector - vector.mean(dim=-1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True)
