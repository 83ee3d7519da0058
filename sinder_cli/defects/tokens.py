"""The residual stream, block by block, always before the final norm."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.device import float32_products

if TYPE_CHECKING:
    from torch import Tensor, nn


def stream_from_embedding(backbone: Backbone, module: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """Yield the embedded tokens, then those after each block, `[B, prefix + h·w, N]`, for images `[B, 3, H, W]`."""
    tokens, context = backbone.embed(module, images)
    yield tokens
    for index in range(backbone.depth):
        tokens = backbone.run_block(module, index, tokens, context)
        yield tokens


def residual_stream(backbone: Backbone, module: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """Yield the tokens after each block in turn, `[B, prefix + h·w, N]`, for normalized images `[B, 3, H, W]`."""
    return islice(stream_from_embedding(backbone, module, images), 1, None)


def in_precision(backbone: Backbone, dtype: str, tf32: bool = False) -> Backbone:
    """Return the backbone with only its forward passes under autocast to `dtype`, and with TF32 products or not."""

    @contextmanager
    def precision(device: torch.device) -> Iterator[None]:
        narrow = torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")
        with narrow, float32_products(tf32):
            yield

    def embed(module: Any, images: Tensor) -> tuple[Tensor, Any]:
        with precision(images.device):
            return backbone.embed(module, images)

    def run_block(module: Any, index: int, tokens: Tensor, context: Any) -> Tensor:
        with precision(tokens.device):
            return backbone.run_block(module, index, tokens, context)

    return replace(backbone, embed=embed, run_block=run_block)


@torch.no_grad()
def last_tokens(backbone: Backbone, module: nn.Module, images: Tensor) -> Tensor:
    """Return the tokens after the last block, before the final norm, in float32."""
    (last,) = deque(residual_stream(backbone, module, images), maxlen=1)
    return last.float()


def patch_grid(backbone: Backbone, tokens: Tensor, images: Tensor) -> Tensor:
    """Return the patch tokens as a grid `[B, h, w, N]`, without cls and registers."""
    h, w = images.shape[-2] // backbone.patch_size, images.shape[-1] // backbone.patch_size
    return tokens[:, backbone.prefix_tokens :].unflatten(1, (h, w))
