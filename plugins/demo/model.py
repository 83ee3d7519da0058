"""The demo backbone: a plain pre-norm ViT, 192 wide and 12 blocks deep. It needs nothing but torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import DEPTH, GRID, HEADS, HIDDEN, PATCH, WIDTH


class Block(nn.Module):
    """`x ← x + Attn(LN x)`, then `x ← x + MLP(LN x)`."""

    def __init__(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = attention
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def mix(self, x: Tensor) -> Tensor:
        """Compute the attention sub-layer's contribution, `[B, T, N]` → `[B, T, N]`."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, d]
        return self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: `[B, T, N]` → `[B, T, N]`."""
        x = x + self.mix(x)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class DemoVit(nn.Module):
    """cls and patches, a learned position embedding resized to the image, 12 blocks, a final norm."""

    def __init__(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(torch.zeros(1, 1 + GRID * GRID, WIDTH))
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.blocks = nn.ModuleList(Block(attention) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    @property
    def sequence(self) -> list[Block]:
        """The blocks, in the order in which they run."""
        return [cast("Block", block) for block in self.blocks]

    def embed(self, images: Tensor) -> Tensor:
        """Embed images `[B, 3, H, W]` as tokens `[B, 1 + patches, N]`."""
        patches = self.patches(images)  # [B, N, h, w]
        cls_position, grid = self.position[:, :1], self.position[:, 1:]
        grid = grid.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
        if patches.shape[-2:] != grid.shape[-2:]:
            grid = functional.interpolate(grid, patches.shape[-2:], mode="bicubic", antialias=True)
        cls = (self.cls + cls_position).expand(images.shape[0], -1, -1)
        return torch.cat([cls, (patches + grid).flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens after the final norm, `[B, 1 + patches, N]`, of images `[B, 3, H, W]`."""
        x = self.embed(images)
        for block in self.sequence:
            x = block(x)
        normalized: Tensor = self.norm(x)
        return normalized


def build() -> DemoVit:
    """Build the module with PyTorch's own attention."""
    return DemoVit(functional.scaled_dot_product_attention)
