"""The vision transformer with the methods of the official models, for an export to torch.hub.

Programs that load `torch.hub.load("facebookresearch/dinov2", …)` call these: cls by default, a dictionary with
`is_training`, `forward_features`, `get_intermediate_layers`. Names, attributes and results are the official ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import Config
from .module import SCALE_OFFSET, VisionTransformer

LAYERS = {"mlp": "GELU", "swiglu": "SwiGLU", "swiglufused": "SwiGLU"}  # official names of MLPs → ours
INITIAL_STD, INITIAL_TOKEN_STD = 0.02, 1e-6


class PatchEmbed(nn.Module):
    """Patches of images `[B, 3, h·P, w·P]` as tokens `[B, h·w, N]`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        side, grid = config.grid * config.patch, config.grid
        self.img_size, self.patch_size = (side, side), (config.patch, config.patch)
        self.patches_resolution, self.num_patches = (grid, grid), grid**2
        self.in_chans, self.embed_dim = 3, config.width
        self.flatten_embedding = True
        self.proj = nn.Conv2d(3, config.width, kernel_size=config.patch, stride=config.patch)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Project the patches, row by row. Raises `ValueError` if the images are not made of whole patches."""
        (height, width), patch = x.shape[-2:], self.patch_size[0]
        if height % patch or width % patch:
            raise ValueError(f"an image of {height} × {width} px is not made of patches of {patch} px")
        tokens: Tensor = self.norm(self.proj(x).flatten(2).transpose(1, 2))
        return tokens


class DinoVisionTransformer(VisionTransformer):
    """DINOv2 as the official code offers it. Shapes: B images, N width, h × w patches of P pixels.

    Keywords are those of the official models. `img_size` gives another grid of positions, which trained weights do
    not fit; `interpolate_antialias` and `interpolate_offset` say how positions are resized; `init_values` is what
    LayerScale begins with. The others must agree with the architecture, which the weights determine.

    Raises `TypeError` for an unknown keyword, and `ValueError` for one that names another architecture.
    """

    def __init__(
        self,
        config: Config,
        heads: int,
        kernel: Callable[[Tensor, Tensor, Tensor], Tensor],
        *,
        img_size: int | tuple[int, int] | None = None,
        interpolate_antialias: bool | None = None,
        interpolate_offset: float | None = None,
        init_values: float = 1.0,
        **architecture: Any,
    ) -> None:
        _require_same(config, architecture)
        config = replace(config, grid=config.grid if img_size is None else _grid(config, img_size))
        super().__init__(config, heads, kernel)
        registers = config.registers
        self.embed_dim = self.num_features = config.width
        self.n_blocks, self.num_heads = config.depth, heads
        self.patch_size, self.num_register_tokens = config.patch, registers
        self.num_tokens, self.chunked_blocks, self.init_values = 1, False, init_values
        self.interpolate_antialias = bool(registers) if interpolate_antialias is None else interpolate_antialias
        usual = 0.0 if registers else SCALE_OFFSET
        self.interpolate_offset = usual if interpolate_offset is None else interpolate_offset
        self.patch_embed: Any = PatchEmbed(config)
        self.head = nn.Identity()
        for block in self.blocks:
            _complete(block, config.width, heads)

    def init_weights(self) -> None:
        """Give all weights the values that a training begins with; until then, they are none that mean anything."""
        nn.init.trunc_normal_(self.pos_embed, std=INITIAL_STD)
        for token in (self.cls_token, self.register_tokens):
            if token is not None:
                nn.init.normal_(token, std=INITIAL_TOKEN_STD)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith("gamma"):
                nn.init.constant_(parameter, self.init_values)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        """Return the positions `[1, 1 + patches, N]` for tokens `x`, cls and patches, of images `[B, 3, w, h]`.

        The official code calls the first side w. Positions are resized in float32; an offset of 0 means the exact size.
        """
        grid, columns, rows = self.config.grid, h // self.patch_size, w // self.patch_size
        if rows == columns == grid:
            return self.pos_embed
        position = self.pos_embed.float()
        plane = position[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # [1, N, G, G]
        offset = self.interpolate_offset
        factors = ((rows + offset) / grid, (columns + offset) / grid)
        plane = nn.functional.interpolate(
            plane,
            size=None if offset else (rows, columns),
            scale_factor=factors if offset else None,
            mode="bicubic",
            antialias=self.interpolate_antialias,
        )
        return torch.cat([position[:, :1], plane.flatten(2).transpose(1, 2)], dim=1).to(x.dtype)

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return what `prepare_tokens_with_masks` does."""
        return self.prepare_tokens_with_masks(images, masks)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return the tokens before the first block; patches that `masks`, bool `[B, h·w]`, marks are masked.

        Raises `ValueError` if the images are not made of whole patches, or there is no mask token.
        """
        patches = self.patch_embed(x)
        if masks is not None:
            if self.mask_token is None:
                raise ValueError("these weights have no mask token")
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype)[None], patches)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1)
        tokens = tokens + self.interpolate_pos_encoding(tokens, *x.shape[-2:])
        if self.register_tokens is None:
            return tokens
        return torch.cat([tokens[:, :1], self.register_tokens.expand(len(x), -1, -1), tokens[:, 1:]], dim=1)

    def forward_features_list(self, x_list: Sequence[Tensor], masks_list: Sequence[Tensor | None]) -> list[Any]:
        """Return what `forward_features` returns, for each batch in turn; they may be of different sizes."""
        return [self.forward_features(x, masks) for x, masks in zip(x_list, masks_list, strict=True)]

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        """Return a dictionary of normalized tokens by kind, and all tokens before the norm; for a list, a list."""
        if isinstance(x, list):
            return self.forward_features_list(x, masks or [None] * len(x))
        tokens = self.prepare_tokens_with_masks(x, masks)
        for block in self.blocks:
            tokens = block(tokens)
        normalized, first = self.norm(tokens), 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normalized[:, 0],
            "x_norm_regtokens": normalized[:, 1:first],
            "x_norm_patchtokens": normalized[:, first:],
            "x_prenorm": tokens,
            "masks": masks,
        }

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Return the patch tokens after the last `n` blocks, or after the blocks with these numbers, `[B, h·w, N]`.

        With `reshape` they are `[B, N, h, w]`; with `return_class_token`, each comes in a pair with cls `[B, N]`.
        """
        wanted = range(self.n_blocks - n, self.n_blocks) if isinstance(n, int) else n
        tokens, found = self.prepare_tokens_with_masks(x), []
        for at, block in enumerate(self.blocks):
            tokens = block(tokens)
            if at in wanted:
                found.append(self.norm(tokens) if norm else tokens)
        if len(found) != len(wanted):
            raise ValueError(f"only {len(found)} of {len(wanted)} blocks were found")
        patches = [each[:, 1 + self.num_register_tokens :] for each in found]
        if reshape:
            rows, columns = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
            patches = [each.unflatten(1, (rows, columns)).permute(0, 3, 1, 2).contiguous() for each in patches]
        if return_class_token:
            return tuple((each, of[:, 0]) for each, of in zip(patches, found, strict=True))
        return tuple(patches)

    def forward(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """Return cls after the final norm, `[B, N]`; with `is_training`, what `forward_features` returns."""
        features = self.forward_features(*args, **kwargs)
        return features if is_training else self.head(features["x_norm_clstoken"])


def _require_same(config: Config, given: dict[str, Any]) -> None:
    """Raise `TypeError` for an unknown keyword, `ValueError` for one that names another architecture."""
    known = {
        "patch_size": config.patch,
        "in_chans": 3,
        "num_register_tokens": config.registers,
        "ffn_layer": config.mlp,
        "qkv_bias": config.qkv_bias,
        "proj_bias": config.proj_bias,
        "ffn_bias": config.mlp_bias,
        "block_chunks": 0,
        "drop_path_rate": 0.0,
        "drop_path_uniform": True,
    }
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
        meant = LAYERS.get(value, value) if name == "ffn_layer" else value
        if name != "drop_path_uniform" and meant != known[name]:  # without a rate, it makes no difference
            raise ValueError(f"{name} is {known[name]!r} in these weights, not {value!r}")


def _grid(config: Config, size: int | tuple[int, int]) -> int:
    """Return the patches along a side of square images. Raises `ValueError` for others."""
    height, width = (size, size) if isinstance(size, int) else size
    if height != width or height < config.patch:
        raise ValueError(f"img_size {size} is no side of a square of patches of {config.patch} px")
    return height // config.patch


def _complete(block: Any, width: int, heads: int) -> None:
    """Give a block the attributes that programs read of the official ones; none of them changes a result."""
    attention = block.attn
    attention.dim, attention.num_heads, attention.scale = width, heads, (width // heads) ** -0.5
    attention.attn_drop, attention.proj_drop = 0.0, nn.Identity()
    block.drop_path1 = block.drop_path2 = nn.Identity()
    block.sample_drop_ratio = 0.0
