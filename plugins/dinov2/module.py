"""The DINOv2 vision transformer; its state dict has the names and the order of the official checkpoints.

Shapes: B images, T tokens, N width, A heads, D = N / A, H hidden width of the MLP, h × w patches, G native grid.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from .config import Config

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

NORM_EPS = 1e-6
SCALE_OFFSET = 0.1  # of the official interpolation; it prevents the loss of a row by rounding, and shifts every sample


class VisionTransformer(nn.Module):
    """DINOv2 in three steps: `embed`, the `blocks`, `norm`."""

    def __init__(self, config: Config, heads: int, kernel: Kernel) -> None:
        super().__init__()
        N = config.width
        self.config = config
        self.cls_token = _parameter(1, 1, N)
        self.pos_embed = _parameter(1, 1 + config.grid**2, N)
        self.register_tokens = _parameter(1, config.registers, N) if config.registers else None
        self.mask_token = _parameter(1, N) if config.mask_token else None  # of pre-training; checkpoints have it
        projection = nn.Conv2d(3, N, kernel_size=config.patch, stride=config.patch)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        self.blocks = nn.ModuleList(Block(config, heads, kernel) for _ in range(config.depth))
        self.norm = nn.LayerNorm(N, eps=NORM_EPS)

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return tokens `[B, 1 + registers + h·w, N]` of images `[B, 3, h·P, w·P]`.

        Patches that `masks`, bool `[B, h·w]`, marks are replaced by the mask token, as in pre-training.
        Raises `ValueError` if the images are not made of whole patches, or there is no mask token.
        """
        height, width = images.shape[-2:]
        if height % self.config.patch or width % self.config.patch:
            raise ValueError(f"an image of {height} × {width} px is not made of patches of {self.config.patch} px")
        patches = self.patch_embed(images)  # [B, N, h, w]
        rows, columns = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2)  # [B, h·w, N]
        if masks is not None:
            if self.mask_token is None:
                raise ValueError("these weights have no mask token")
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype)[None], patches)
        cls = self.cls_token.expand(images.shape[0], -1, -1)
        x = torch.cat([cls, patches], dim=1) + self.position(rows, columns)
        if self.register_tokens is None:
            return x
        return torch.cat([x[:, :1], self.register_tokens.expand(images.shape[0], -1, -1), x[:, 1:]], dim=1)

    def position(self, rows: int, columns: int) -> Tensor:
        """Return the position embedding `[1, 1 + h·w, N]`, resized in float32 as the official models do it.

        Models with registers resize to the exact size, with antialiasing; models without them resize by a slightly too
        large factor, without antialiasing.
        """
        G = self.config.grid
        if rows == columns == G:
            return self.pos_embed
        position = self.pos_embed.float()
        cls, patches = position[:, :1], position[:, 1:]
        plane = patches.reshape(1, G, G, -1).permute(0, 3, 1, 2)  # [1, N, G, G]
        if self.config.registers:
            plane = interpolate(plane, size=(rows, columns), mode="bicubic", antialias=True)
        else:
            factors = ((rows + SCALE_OFFSET) / G, (columns + SCALE_OFFSET) / G)
            plane = interpolate(plane, scale_factor=factors, mode="bicubic")
        return torch.cat([cls, plane.flatten(2).transpose(1, 2)], dim=1).to(self.pos_embed.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Return normalized tokens `[B, 1 + registers + h·w, N]` of images `[B, 3, h·P, w·P]`."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        normalized: Tensor = self.norm(x)
        return normalized


class Block(nn.Module):
    """`x + ls1 ⊙ attn(norm1(x))`, then `x + ls2 ⊙ mlp(norm2(x))`."""

    def __init__(self, config: Config, heads: int, kernel: Kernel) -> None:
        super().__init__()
        N, H = config.width, config.hidden
        self.norm1 = nn.LayerNorm(N, eps=NORM_EPS)
        self.attn = Attention(config, heads, kernel)
        self.ls1 = LayerScale(N) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(N, eps=NORM_EPS)
        self.mlp = (SwiGLU if config.mlp == "SwiGLU" else plain_mlp)(N, H, config.mlp_bias)
        self.ls2 = LayerScale(N) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: `[B, T, N]` → the same shape."""
        y: Tensor = x + self.ls1(self.attn(self.norm1(x)))
        z: Tensor = y + self.ls2(self.mlp(self.norm2(y)))
        return z


class Attention(nn.Module):
    """Multi-head self-attention with fused queries, keys and values."""

    def __init__(self, config: Config, heads: int, kernel: Kernel) -> None:
        super().__init__()
        N = config.width
        self.heads = heads
        self.kernel = kernel
        self.qkv = nn.Linear(N, 3 * N, bias=config.qkv_bias)
        self.proj = nn.Linear(N, N, bias=config.proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute self-attention: `[B, T, N]` → the same shape."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, A, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each [B, A, T, D]
        mixed: Tensor = self.proj(self.kernel(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class SwiGLU(nn.Module):
    """`w3(SiLU(gate) ⊙ up)`; gate is the first half of `w12(x)` and up the second."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Run the MLP: `[B, T, N]` → the same shape."""
        gate, up = self.w12(x).chunk(2, dim=-1)  # each [B, T, H]
        y: Tensor = self.w3(silu(gate) * up)
        return y


def plain_mlp(width: int, hidden: int, bias: bool) -> nn.Module:
    """Return the module of `fc2(GELU(fc1(x)))`, with the exact GELU."""
    fc1, fc2 = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)
    return nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))


class LayerScale(nn.Module):
    """LayerScale: `gamma ⊙ x`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = _parameter(width)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the entries: `[…, N]` → the same shape."""
        return x * self.gamma


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))
