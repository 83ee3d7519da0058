"""A tiny pre-norm ViT with fused projections, whose defects are planted by the colour of a patch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sinder_cli import (
    AttentionMap,
    Backbone,
    BlockMap,
    GatedMlpMap,
    LayerMap,
    MemoryTensors,
    NormMap,
    PlainMlpMap,
    WeightRef,
    Weights,
)
from sinder_cli.repairing.forward import Directions

N, HIDDEN, DEPTH, HEADS, PATCH, GRID = 32, 24, 6, 2, 2, 12


PLANTED = 60.0


WRITTEN = 6.0


EARLY, LATE = 1, 4  # the blocks whose directions red and blue patches follow


class Block(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(N), nn.LayerNorm(N)
        self.qkv, self.proj = nn.Linear(N, 3 * N), nn.Linear(N, N)
        self.up, self.down = nn.Linear(N, 2 * HIDDEN if gated else HIDDEN), nn.Linear(HIDDEN, N)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(N)), nn.Parameter(torch.ones(N))
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, N // HEADS)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.scale1 * self.proj(mixed)
        hidden = self.up(self.norm2(x))
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = functional.silu(gate) * up
        else:
            hidden = functional.gelu(hidden)
        return x + self.scale2 * self.down(hidden)


class TinyViT(nn.Module):
    """Red patches get a large multiple of ν of the early block, blue ones of the late, green ones NaN."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(N))
        self.patchify = nn.Conv2d(3, N, PATCH, PATCH)
        self.blocks = nn.ModuleList(Block(gated) for _ in range(DEPTH))
        self.register_buffer("nu", torch.zeros(2, N))

    def embed(self, images: Tensor) -> Tensor:
        tokens = self.patchify(images).flatten(2).transpose(1, 2)  # [B, patches, N]
        nu = self.nu
        tokens = tokens - (tokens @ nu.T) @ nu
        colour = functional.avg_pool2d(images, PATCH).flatten(2)  # [B, 3, patches]
        alone = colour - (colour.sum(dim=1, keepdim=True) - colour)
        red, green, blue = (alone > 0.9).to(images.dtype).unbind(dim=1)
        tokens = tokens + PLANTED * (red[..., None] * nu[0] + blue[..., None] * nu[1])
        tokens = torch.where(green[..., None] > 0, torch.nan, tokens)
        return torch.cat([self.cls.expand(len(images), 1, -1), tokens], dim=1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The residual stream after every block."""
        tokens, stream = self.embed(images), []
        for block in self.blocks:
            tokens = block(tokens)
            stream.append(tokens)
        return stream


@dataclass(frozen=True)
class Planted:
    """A tiny ViT, its description, and the directions of its planted defects."""

    module: TinyViT
    backbone: Backbone
    directions: Directions
    image: Callable[..., Tensor]


def block_map(index: int, gated: bool) -> BlockMap:
    def ref(name: str, rows: tuple[int, int] | None = None) -> WeightRef:
        return WeightRef(name=f"blocks.{index}.{name}", rows=rows)

    attention = AttentionMap(
        norm=NormMap(weight=ref("norm1.weight"), bias=ref("norm1.bias")),
        query=ref("qkv.weight", (0, N)),
        key=ref("qkv.weight", (N, 2 * N)),
        value=ref("qkv.weight", (2 * N, 3 * N)),
        output=ref("proj.weight"),
        scale=ref("scale1"),
    )
    mlp: dict[str, Any] = {
        "norm": NormMap(weight=ref("norm2.weight"), bias=ref("norm2.bias")),
        "down": ref("down.weight"),
        "scale": ref("scale2"),
    }
    if gated:
        halves = {"gate": ref("up.weight", (0, HIDDEN)), "up": ref("up.weight", (HIDDEN, 2 * HIDDEN))}
        return BlockMap(attention=attention, mlp=GatedMlpMap(activation="silu", **halves, **mlp))
    return BlockMap(attention=attention, mlp=PlainMlpMap(activation="gelu", up=ref("up.weight"), **mlp))


def plant(gated: bool, dtype: torch.dtype = torch.float64) -> Planted:
    """Random weights; ν of red patches leads up to the late block, that of blue ones from there on."""
    generator = torch.Generator().manual_seed(0)
    module = TinyViT(gated).to(dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name and name.endswith("weight"):
                drawn = 1 + 0.1 * drawn
            elif "scale" in name:
                drawn = 0.3 + 0.05 * drawn
            elif parameter.dim() > 1:
                drawn = drawn * parameter[0].numel() ** -0.5
            else:
                drawn = 0.1 * drawn
            parameter.copy_(drawn)
        module.nu.copy_(torch.linalg.qr(torch.randn(N, 2, generator=generator, dtype=torch.float64))[0].T)
    module.eval().requires_grad_(False)
    red, blue = module.nu.float()
    directions = Directions(
        torch.stack([red if index < LATE else blue for index in range(DEPTH)]),
        [1.0 if index < EARLY else 2.0 for index in range(DEPTH)],  # not determined before the early block
    )
    backbone = Backbone(
        name="tiny",
        layers=LayerMap(width=N, blocks=tuple(block_map(index, gated) for index in range(DEPTH))),
        weights=Weights.of(MemoryTensors("memory", dict(module.state_dict()))),
        patch_size=PATCH,
        prefix_tokens=1,
        has_cls=True,
        image_size=GRID * PATCH,
        build=lambda: TinyViT(gated),
        embed=lambda module, images: (module.embed(images), None),
        run_block=lambda module, index, tokens, context: module.blocks[index](tokens),  # noqa: ARG005
        finish=lambda module, tokens: tokens,  # noqa: ARG005
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    return Planted(module, backbone, directions, coloured)


def coloured(seed: int, dtype: torch.dtype = torch.float64, **spots: list[tuple[int, int]]) -> Tensor:
    """A greyish image `[3, H, W]` in [0, 1], with patches of pure red, green or blue."""
    generator = torch.Generator().manual_seed(1000 + seed)
    image = 0.2 + 0.4 * torch.rand(3, GRID * PATCH, GRID * PATCH, generator=generator, dtype=torch.float64)
    for channel, colour in enumerate(("red", "green", "blue")):
        for row, column in spots.get(colour, []):
            patch = image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            patch.zero_()
            patch[channel] = 1.0
    return image.to(dtype)


def with_writer(planted: Planted) -> Planted:
    """The same, where the first singular value of block 1's `mlp.down` writes an outlier into red patches.

    Red shows in the embedding as a direction a of moderate length; a hidden unit reads it, and the writer writes b.
    """
    module, backbone = planted.module, planted.backbone
    block = module.blocks[EARLY]
    a, b = module.nu
    with torch.no_grad():
        for weight in (block.proj.weight, block.down.weight):
            weight -= b[:, None] * (b @ weight)
        block.down.weight[:, 0] = 20 * b
        block.up.weight[0] = 4 * a / block.norm2.weight
        block.up.bias[0] = -12.0
        if block.gated:
            block.up.weight[HIDDEN] = 0.0
            block.up.bias[HIDDEN] = 1.0

    def embed(module: Any, images: Tensor) -> tuple[Tensor, Any]:
        tokens = module.embed(images)
        along = tokens @ module.nu[0]
        return tokens - (1 - WRITTEN / PLANTED) * along[..., None] * module.nu[0], None

    weights = Weights.of(MemoryTensors("memory", dict(module.state_dict())))
    directions = Directions(planted.directions.nu, [1.0] * DEPTH)
    return replace(planted, backbone=replace(backbone, embed=embed, weights=weights), directions=directions)
