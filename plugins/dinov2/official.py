"""The vision transformer with the methods of the official models, for an export to torch.hub.

Programs that load `torch.hub.load("facebookresearch/dinov2", …)` call these: cls by default, a dictionary with
`is_training`, `forward_features`, `get_intermediate_layers`. Names and results are the official ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .config import Config
from .module import VisionTransformer


class DinoVisionTransformer(VisionTransformer):
    """DINOv2 as the official code offers it. Shapes: B images, N width, h × w patches of P pixels."""

    def __init__(self, config: Config, heads: int, kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__(config, heads, kernel)
        self.embed_dim = self.num_features = config.width
        self.n_blocks, self.num_heads = config.depth, heads
        self.patch_size, self.num_register_tokens = config.patch, config.registers
        self.num_tokens = 1
        self.head = nn.Identity()

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return the tokens before the first block; patches that `masks`, bool `[B, h·w]`, marks are masked."""
        return self.embed(x, masks)

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        """Return a dictionary of normalized tokens by kind, and all tokens before the norm; for a list, a list."""
        if isinstance(x, list):
            return [self.forward_features(each, mask) for each, mask in zip(x, masks or [None] * len(x), strict=True)]
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
