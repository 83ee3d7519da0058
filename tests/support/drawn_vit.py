"""A small ViT in as many shapes as a layer map can describe, with the map that is right for it.

Every tensor is random, so that no mix-up is hidden by a zero or a one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

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
    PositionMap,
    WeightRef,
    Weights,
)

N, H, P, HEADS, DEPTH, PREFIX = 96, 160, 4, 3, 2, 2
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """How the blocks are built."""

    gated: bool = False
    rms: bool = False
    parallel: bool = False
    inner: bool = False  # norms between value and output, and between hidden and down
    beside: bool = False


class Norm(nn.Module):
    def __init__(self, width: int, rms: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = None if rms else nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return functional.rms_norm(x, x.shape[-1:], self.weight, EPS)
        return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, EPS)


class Branch(nn.Module):
    """One attention and one MLP, each with its LayerScale."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.norm1, self.norm2 = Norm(N, shape.rms), Norm(N, shape.rms)
        self.qkv, self.out = nn.Linear(N, 3 * N), nn.Linear(N, N)
        self.first, self.down = nn.Linear(N, (1 + shape.gated) * H), nn.Linear(H, N)
        self.gamma1, self.gamma2 = nn.Parameter(torch.zeros(N)), nn.Parameter(torch.zeros(N))
        if shape.inner:
            self.inner1, self.inner2 = Norm(N, shape.rms), Norm(H, shape.rms)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.gamma1 * self.out(self.inner1(y) if self.shape.inner else y)

    def mlp(self, x: Tensor) -> Tensor:
        hidden = self.first(self.norm2(x))
        if self.shape.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = functional.silu(gate) * up
        else:
            hidden = functional.gelu(hidden)
        return self.gamma2 * self.down(self.inner2(hidden) if self.shape.inner else hidden)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.parallel = shape.parallel
        self.branches = nn.ModuleList(Branch(shape) for _ in range(1 + shape.beside))

    def forward(self, x: Tensor) -> Tensor:
        y = x + sum(branch.attention(x) for branch in self.branches)
        return y + sum(branch.mlp(x if self.parallel else y) for branch in self.branches)


class Vit(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.zeros(1, PREFIX, N))
        self.row, self.column = nn.Parameter(torch.zeros(16, 1, N)), nn.Parameter(torch.zeros(1, 16, N))
        self.patches = nn.Conv2d(3, N, P, P)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(DEPTH))
        self.norm = Norm(N, shape.rms)

    def embed(self, images: Tensor) -> Tensor:
        x = self.patches(images).permute(0, 2, 3, 1)  # [B, h, w, N]
        x = x + self.row[: x.shape[1]] + self.column[:, : x.shape[2]]
        return torch.cat([self.prefix.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def ref(name: str, start: int | None = None, size: int = N) -> WeightRef:
    return WeightRef(name=name, rows=None if start is None else (start * size, (start + 1) * size))


def norm_map(at: str, rms: bool) -> NormMap:
    if rms:
        return NormMap(kind="rmsnorm", weight=ref(f"{at}.weight"), eps=EPS)
    return NormMap(weight=ref(f"{at}.weight"), bias=ref(f"{at}.bias"), eps=EPS)


def block_map(at: str, shape: Shape, branch: int = 0) -> BlockMap:
    b = f"{at}.branches.{branch}"
    inner1, inner2 = (norm_map(f"{b}.{name}", shape.rms) if shape.inner else None for name in ("inner1", "inner2"))
    mlp = {
        "norm": norm_map(f"{b}.norm2", shape.rms),
        "down": ref(f"{b}.down.weight"),
        "down_bias": ref(f"{b}.down.bias"),
        "scale": ref(f"{b}.gamma2"),
        "inner_norm": inner2,
    }
    first, bias = f"{b}.first.weight", f"{b}.first.bias"
    gated = {"gate": ref(first, 0, H), "gate_bias": ref(bias, 0, H), "up": ref(first, 1, H), "up_bias": ref(bias, 1, H)}
    plain = {"up": ref(first), "up_bias": ref(bias)}
    return BlockMap(
        attention=AttentionMap(
            norm=norm_map(f"{b}.norm1", shape.rms),
            query=ref(f"{b}.qkv.weight", 0),
            key=ref(f"{b}.qkv.weight", 1),
            value=ref(f"{b}.qkv.weight", 2),
            value_bias=ref(f"{b}.qkv.bias", 2),
            output=ref(f"{b}.out.weight"),
            output_bias=ref(f"{b}.out.bias"),
            scale=ref(f"{b}.gamma1"),
            inner_norm=inner1,
        ),
        mlp=GatedMlpMap(activation="silu", **mlp, **gated)
        if shape.gated
        else PlainMlpMap(activation="gelu", **mlp, **plain),
        parallel=shape.parallel,
        beside=block_map(at, replace(shape, beside=False), 1) if shape.beside else None,
    )


def random_state(shape: Shape) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, empty in Vit(shape).state_dict().items():
        drawn = torch.randn(empty.shape, generator=generator)
        if name.split(".")[-2:] in (["norm", "weight"], ["norm1", "weight"], ["norm2", "weight"]) or "inner" in name:
            state[name] = 1 + 0.3 * drawn
        else:
            state[name] = drawn * empty[0].numel() ** -0.5 if empty.dim() in (2, 4) else drawn
    return state


def vit(shape: Shape = Shape()) -> Backbone:
    """The backbone, in memory."""
    return described(Weights.of(MemoryTensors("memory", random_state(shape))), shape)


def described(weights: Weights, shape: Shape) -> Backbone:
    """What a right plugin says of such weights."""
    return Backbone(
        name="small_vit",
        layers=LayerMap(
            width=N,
            blocks=tuple(block_map(f"blocks.{index}", shape) for index in range(DEPTH)),
            position=PositionMap(weight=ref("row")),
            norm=norm_map("norm", shape.rms),
        ),
        weights=weights,
        patch_size=P,
        prefix_tokens=PREFIX,
        has_cls=True,
        image_size=6 * P,
        build=lambda: Vit(shape),
        embed=lambda module, images: (module.embed(images), None),
        run_block=lambda module, index, tokens, _: module.blocks[index](tokens),
        finish=lambda module, tokens: module.norm(tokens),
        forward=lambda module, images: module(images),
    )


def read(path: Path, shape: Shape = Shape()) -> Backbone:
    """How its plugin describes a file."""
    from sinder_cli.backbone.sources import open_checkpoint

    return described(Weights.of(open_checkpoint(path)), shape)
