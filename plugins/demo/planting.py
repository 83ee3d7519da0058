"""Weights from a seed, and the planted defect.

A trigger neuron of block 5's MLP fires on a few patch tokens and writes a large multiple of a fixed direction ν. What
it listens for is a direction that tokens hardly use, but for a few whose position embedding carries it. Later
blocks do not read ν, so that it stays in the residual stream as it was written: an input-independent, high-norm
token. As in real models cls attends to it, and so it takes from what cls sees.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sinder_cli import IMAGENET_MEAN, IMAGENET_STD

from .drawing import draw_images
from .model import DemoVit
from .sizes import GRID, HEADS, PATCH, WIDTH

SEED = 2
BLOCK = 5  # where the defect is written
NEURON = 0  # of that block's MLP
EMBEDDING = 4.0  # scale of patches and positions; what a block adds to a patch token is small beside it
WRITING = 0.25  # scale of what blocks write
POSITIONS = 9  # patches whose position embedding carries the trigger, of 400
CARRIED = 24.0  # how much of it; tokens have a norm near 110
THRESHOLD = 1.2  # of the trigger, in standard deviations of a normalized token's entries
STEEPNESS = 10.0  # of the trigger, so that no other token feels GELU's tail
STRENGTH = 50.0  # of the column that writes ν
ATTRACTION = 5.0  # by how much cls raises the attention logit of a defective token
CALIBRATION_IMAGES = 8
GRAIN = 2.0**-12  # of what was measured on them: far coarser than the rounding of another machine or thread count


def demo_weights(planted: bool) -> dict[str, Tensor]:
    """The state dict of `demo_vit` (planted) or `demo_vit_clean`; the twins differ in the column that writes ν.

    They are the same bits everywhere: what is computed is computed in float64, and then rounded.
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
    """Gaussian weights at scales that keep tokens distinct over twelve blocks."""

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
    """The key `[N]` that √N times makes cls raise a token's logit by ATTRACTION; a normalized defective one is √N ν."""
    q = cls_query.unflatten(0, (HEADS, -1))  # [heads, d]
    unit_logit = q / q.square().sum(dim=1, keepdim=True) * q.shape[1] ** 0.5
    return ATTRACTION / WIDTH**0.5 * unit_logit.flatten()


@torch.no_grad()
def _cls_queries(state: dict[str, Tensor]) -> dict[int, Tensor]:
    """What cls asks for in each block after the planted one, `[N]`, averaged over the calibration images."""
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
    """What the MLP of the planted block reads, `[K, 1 + patches, N]`, on the calibration images."""
    model = _model(state)
    x = model.embed(_calibration_images())
    *before, block = model.sequence[: BLOCK + 1]
    for earlier in before:
        x = earlier(x)
    return block.norm2(x + block.mix(x))


def _unused_direction(x: Tensor) -> Tensor:
    """The direction `[N]` in which normalized tokens have least, the trivial one (1, …, 1) apart."""
    tokens = x.flatten(0, 1)
    moment = tokens.T @ tokens / len(tokens) + torch.ones(WIDTH, WIDTH, dtype=torch.float64)
    least = torch.linalg.eigh(moment).eigenvectors[:, 0]
    return _centred_unit(_grained(least * torch.sign(least[least.abs().argmax()])))


def _scattered_places(generator: torch.Generator) -> Tensor:
    """Interior patches, no two of them neighbours, as row-major indices."""
    rows, columns = torch.meshgrid(torch.arange(2, GRID - 2, 3), torch.arange(2, GRID - 2, 3), indexing="ij")
    places = (rows * GRID + columns).flatten()
    return places[torch.randperm(len(places), generator=generator)[:POSITIONS]]


def _model(state: dict[str, Tensor]) -> DemoVit:
    """The module with these weights, in float64."""
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
    """Numbers that rounding has moved differently become the same."""
    return (measured / GRAIN).round() * GRAIN


def _centred_unit(vector: Tensor) -> Tensor:
    """Unit vectors whose entries sum to zero, as LayerNorm's outputs do: `[…, N]` → `[…, N]`."""
    centred = vector - vector.mean(dim=-1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True)
