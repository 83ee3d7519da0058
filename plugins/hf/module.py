"""The library's own module of an encoder, run block by block.

Shapes: B images, T tokens, N width, H hidden width of the MLP, h × w patches of P pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.initialization import no_init_weights

from .config import Config

Context = dict[str, Any]  # the arguments of every block of a family besides the tokens


def build(config: Config, fused: bool, attention: str) -> nn.Module:
    """Build the encoder without heads and without a defined initialization."""
    family = config.family
    values = {**config.raw, **family.settings, "patch_size": config.patch}
    configuration = getattr(transformers, family.configuration).from_dict(values)
    configuration._attn_implementation = attention
    optional = {family.mask_argument: bool(config.parts.mask)} if family.mask_argument else {}
    with no_init_weights():
        module: nn.Module = getattr(transformers, family.module)(configuration, **family.arguments, **optional)
        if fused:
            for index in range(config.depth):
                module.get_submodule(family.block.format(index)).mlp = FusedSwiGLU(config.width, config.hidden)
    return module


class FusedSwiGLU(nn.Module):
    """`weights_out(SiLU(gate) ⊙ up)`; gate and up are the halves of `weights_in(x)`, as older checkpoints store them.

    The library's module has separate gate and up, and splits such a checkpoint; here the stored tensors are kept.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.weights_in = nn.Linear(width, 2 * hidden)
        self.weights_out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Run the MLP: `[B, T, N]` → the same shape."""
        gate, up = self.weights_in(x).chunk(2, dim=-1)  # each [B, T, H]
        y: Tensor = self.weights_out(silu(gate) * up)
        return y


def embed(config: Config, module: Any, images: Tensor) -> tuple[Tensor, Context]:
    """Return the tokens `[B, T, N]` before the first block, and the further arguments of every block.

    Images have the shape `[B, 3, h·P, w·P]`. Raises `ValueError` if they are not made of whole patches.
    """
    height, width = images.shape[-2:]
    if height % config.patch or width % config.patch:
        raise ValueError(f"an image of {height} × {width} px is not made of patches of {config.patch} px")
    return EMBEDDINGS[config.family.embedding](module, images)


def run_block(config: Config, module: nn.Module, index: int, tokens: Tensor, context: Context) -> Tensor:
    """Run one block on `[B, T, N]`; only the tokens are returned, even if a family returns more."""
    left = module.get_submodule(config.family.block.format(index))(tokens, **context)
    return left[0] if isinstance(left, tuple) else left


def finish(config: Config, module: nn.Module, tokens: Tensor) -> Tensor:
    """Apply the final norm, if the library's last hidden state has one."""
    return module.get_submodule(config.family.norm)(tokens) if config.family.finishes else tokens


def forward(config: Config, module: Any, images: Tensor) -> Tensor:
    """Return the library's last hidden state of images `[B, 3, h·P, w·P]`, by its own forward pass."""
    arguments = INPUTS.get(config.family.embedding, _as_they_are)
    last: Tensor = module(**arguments(module, images)).last_hidden_state
    return last


def _plain(module: Any, images: Tensor) -> tuple[Tensor, Context]:
    return module.embeddings(images), {"attention_mask": None}


def _resized(module: Any, images: Tensor) -> tuple[Tensor, Context]:
    return module.embeddings(images, interpolate_pos_encoding=True), {"attention_mask": None}


def _unmasked(module: Any, images: Tensor) -> tuple[Tensor, Context]:
    """Embed the patches in order, without masking: the configured ratio is 0, and the noise that sorts them ascends."""
    tokens, _, _ = module.embeddings(images, noise=_ascending(module, images), interpolate_pos_encoding=True)
    return tokens, {"attention_mask": None}


def _ascending(module: Any, images: Tensor) -> Tensor:
    patches = module.embeddings.patch_embeddings(images[:1]).shape[1]
    return torch.arange(patches, device=images.device, dtype=torch.float32).expand(len(images), -1)


def _rotary(module: Any, images: Tensor) -> tuple[Tensor, Context]:
    return module.embeddings(images), {"position_embeddings": module.rope_embeddings(images)}


def _normed(module: Any, images: Tensor) -> tuple[Tensor, Context]:
    tokens, context = _resized(module, images)
    return module.pre_layrnorm(tokens), context


def _flattened(module: Any, images: Tensor) -> tuple[Tensor, Context]:
    """Project patches that are flattened with channels last, as in the library's preprocessor."""
    return module.embeddings(*_patches(module, images)), {"attention_mask": None}


def _patches(module: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return flattened patches `[B, h·w, P·P·3]`, and h and w of each image `[B, 2]`."""
    P = module.config.patch_size
    patches = images.unfold(2, P, P).unfold(3, P, P)  # [B, 3, h, w, P, P]
    h, w = patches.shape[2:4]
    flat = patches.permute(0, 2, 3, 4, 5, 1).reshape(len(images), h * w, -1)  # [B, h·w, P·P·3]
    shapes = torch.tensor([[h, w]] * len(images), device=images.device)
    return flat, shapes


def _relative(module: Any, images: Tensor) -> tuple[Tensor, Context]:
    bias = _shared_bias(module.shared_position_bias, module, images)
    return module.embeddings(images), {"attention_mask": bias, "resolution": images.shape[-2:]}


def _relative_of_two(module: Any, images: Tensor) -> tuple[Tensor, Context]:
    tokens, _ = module.embeddings(images)
    bias = _shared_bias(getattr(module.encoder, "relative_position_bias", None), module, images)
    return tokens, {"relative_position_bias": bias, "resolution": images.shape[-2:]}


def _shared_bias(table: Any, module: Any, images: Tensor) -> Tensor | None:
    """Return the biases `[1, heads, T, T]` that all blocks share, or None if there are none."""
    h, w = (side // module.config.patch_size for side in images.shape[-2:])
    return None if table is None else table((h, w))


EMBEDDINGS: Mapping[str, Callable[[Any, Tensor], tuple[Tensor, Context]]] = {
    "plain": _plain,
    "resized": _resized,
    "unmasked": _unmasked,
    "rotary": _rotary,
    "normed": _normed,
    "flattened": _flattened,
    "relative": _relative,
    "relative of two": _relative_of_two,
}


def _as_they_are(_: Any, images: Tensor) -> dict[str, Any]:
    return {"pixel_values": images}


def _to_be_resized(_: Any, images: Tensor) -> dict[str, Any]:
    return {"pixel_values": images, "interpolate_pos_encoding": True}


def _to_be_unmasked(module: Any, images: Tensor) -> dict[str, Any]:
    return {**_to_be_resized(module, images), "noise": _ascending(module, images)}


def _to_be_flattened(module: Any, images: Tensor) -> dict[str, Any]:
    flat, shapes = _patches(module, images)
    mask = torch.ones(flat.shape[:2], dtype=torch.long, device=images.device)
    return {"pixel_values": flat, "pixel_attention_mask": mask, "spatial_shapes": shapes}


# Arguments of the library's own forward pass, for embeddings that need more than images.
INPUTS: Mapping[str, Callable[[Any, Tensor], dict[str, Any]]] = {
    "resized": _to_be_resized,
    "unmasked": _to_be_unmasked,
    "normed": _to_be_resized,
    "flattened": _to_be_flattened,
}
