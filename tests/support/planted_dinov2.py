"""DINOv2 checkpoints in the official format, with a defect planted in them."""

from __future__ import annotations

from pathlib import Path

import torch
from sinder_plugins.dinov2.config import Config, tensor_shapes
from sinder_plugins.dinov2.module import VisionTransformer
from torch import Tensor

from sinder_cli import IMAGENET_MEAN, IMAGENET_STD, attention_kernel
from sinder_cli.images.decoding import decode
from sinder_cli.images.preprocessing import Preprocessing

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg")


SIDE = 168  # pixels: 12 × 12 patches, enough for three tokens to lie four standard deviations out


PLANTED = 2  # the block that writes the defect


SMALL = Config(width=128, depth=4, hidden=512, grid=12)


SMALL_REGISTERS = Config(width=128, depth=3, hidden=512, grid=9, registers=4)


def chunked(name: str) -> str:
    """blocks.3.… → blocks.1.3.…, as training with two chunks of two blocks stores it."""
    parts = name.split(".")
    return ".".join([parts[0], str(int(parts[1]) // 2), *parts[1:]]) if parts[0] == "blocks" else name


def random_tensors(config: Config, seed: int = 0) -> dict[str, Tensor]:
    """Gaussian weights at scales that keep tokens distinct, LayerScale of ones, in the official order."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in tensor_shapes(config).items():
        drawn = torch.randn(shape, generator=generator)
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            state[name] = torch.ones(shape)
        elif name.endswith("bias"):
            state[name] = torch.zeros(shape)
        elif name.endswith(("proj.weight", "fc2.weight", "w3.weight")) and name.startswith("blocks"):
            state[name] = drawn * 0.25 / shape[1] ** 0.5
        elif name == "patch_embed.proj.weight":
            state[name] = drawn * 4 / drawn[0].numel() ** 0.5
        else:
            state[name] = drawn / shape[-1] ** 0.5 if len(shape) == 2 else drawn * 4
    return state


def planted(config: Config, photographs: Path) -> dict[str, Tensor]:
    """Random weights in which one neuron fires on four patches, by their position, and writes one large direction."""
    state = random_tensors(config)
    generator = torch.Generator().manual_seed(1)
    inputs = mlp_inputs(config, state, photographs).double()
    moment = inputs.T @ inputs / len(inputs) + torch.ones(config.width, config.width, dtype=torch.float64)
    trigger = torch.linalg.eigh(moment).eigenvectors[:, 0].float()  # where normalized tokens have least
    rows = state["pos_embed"][0, 1:].unflatten(0, (config.grid, config.grid))
    for row, column in ((2, 3), (4, 8), (7, 5), (9, 9)):  # of 12 × 12
        r, c = (int((at + 0.5) * config.grid / 12) for at in (row, column))
        reach = config.grid // 24
        rows[r - reach : r + reach + 1, c - reach : c + reach + 1] += 24 * (config.width / 192) ** 0.5 * trigger
    nu = torch.randn(config.width, generator=generator)
    nu -= nu.mean()
    first, last = ("w12", "w3") if config.mlp == "SwiGLU" else ("fc1", "fc2")
    mlp = f"blocks.{PLANTED}.mlp"
    state[f"{mlp}.{first}.weight"][0] = 10 * trigger
    state[f"{mlp}.{first}.bias"][0] = -10 * 1.2
    if config.mlp == "SwiGLU":  # the gate alone sees the trigger
        state[f"{mlp}.{first}.weight"][config.hidden] = 0
        state[f"{mlp}.{first}.bias"][config.hidden] = 1
    state[f"{mlp}.{last}.weight"][:, 0] = 12 * nu / nu.norm()
    return state


@torch.no_grad()
def mlp_inputs(config: Config, state: dict[str, Tensor], photographs: Path) -> Tensor:
    """What the MLP of the planted block reads on the photographs, `[K · tokens, N]`."""
    with torch.device("meta"):  # no values that the state would replace
        module = VisionTransformer(config, config.width // 64, attention_kernel())
    module.load_state_dict(state, assign=True)
    preprocess = Preprocessing(SIDE, IMAGENET_MEAN, IMAGENET_STD)
    x = module.embed(torch.stack([preprocess(decode(path)) for path in sorted(photographs.iterdir())]))
    *before, block = list(module.blocks)[: PLANTED + 1]
    for earlier in before:
        x = earlier(x)
    read: Tensor = block.norm2(x + block.attn(block.norm1(x)))
    return read.flatten(0, 1)
