"""Reading the configuration of a DINOv2 checkpoint off the names and shapes of its tensors."""

from __future__ import annotations

import math
import re
from typing import Literal

from sinder_cli import BadInputError, Weights

from .config import Config
from .reference import with_packed, without_leftovers

ANCHOR = "patch_embed.proj.weight"  # every DINOv2 checkpoint has it, whatever it is nested in

HEADS = ("head.", "heads.", "linear_head.", "dino_head.", "ibot_head.", "classifier.")  # behind the backbone
DINOV3 = {384: "small", 768: "base", 1024: "large", 1280: "huge_plus", 4096: "7b"}  # by width

_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
_BLOCK = re.compile(r"^blocks\.(\d+)\.")


def canonical(weights: Weights) -> Weights:
    """The backbone inside a checkpoint, under the names of the official files.

    Training with sharded blocks stores block 3 of chunk 0 as `blocks.0.3.…`; here it is `blocks.3.…`. Heads are left
    out, the two halves of a SwiGLU that are stored apart become one, and what the paper's code leaves in its files is
    taken care of.
    """
    backbone = weights.located(ANCHOR).without(lambda name: name.startswith(HEADS))
    _require_dinov2(backbone)
    return without_leftovers(with_packed(backbone)).renamed(lambda name: _CHUNKED.sub(r"blocks.\1.", name))


def _require_dinov2(weights: Weights) -> None:
    """Refuse a DINOv3, whose tensors are nearly a DINOv2's, by the name under which it can be used."""
    if "storage_tokens" not in weights and "rope_embed.periods" not in weights:
        return
    what = f"cannot use weights {weights.source.label}"
    width = weights.shape("norm.weight")[0] if "norm.weight" in weights else 0
    size, patch = DINOV3.get(width, "SIZE"), weights.shape(ANCHOR)[-1]
    name = f"timm/vit_{size}_patch{patch}_dinov3"
    remedy = f"name the model {name}, or {name}_qkvb where queries and values have biases"
    raise BadInputError(what, "it is a DINOv3", remedy)


def infer_config(weights: Weights) -> Config:
    """The configuration of canonical weights. Raises `BadInputError` naming the tensor that makes no sense.

    One tensor is enough to tell that a part is there: that no other lacks is for `require_matching` to see.
    """
    width, channels, patch, patch_width = _shape(weights, ANCHOR, rank=4)
    if channels != 3 or patch != patch_width:
        raise _unusable(weights, ANCHOR, "is no embedding of square RGB patches")
    mlp, hidden = _mlp(weights)
    parts = {_BLOCK.sub("", name) for name in weights.names}
    return Config(
        width=width,
        depth=_depth(weights),
        hidden=hidden,
        mlp=mlp,
        registers=_shape(weights, "register_tokens", rank=3)[1] if "register_tokens" in weights else 0,
        patch=patch,
        grid=_grid(weights),
        layer_scale="ls1.gamma" in parts,
        qkv_bias="attn.qkv.bias" in parts,
        proj_bias="attn.proj.bias" in parts,
        mlp_bias=not parts.isdisjoint({"mlp.fc1.bias", "mlp.w12.bias"}),
        mask_token="mask_token" in weights,
    )


def _depth(weights: Weights) -> int:
    present = {int(match[1]) for name in weights.names if (match := _BLOCK.match(name))}
    if absent := set(range(len(present))) - present:
        raise _bad(weights, f"it has blocks up to {max(present)}, but none of the tensors of blocks.{min(absent)}")
    return len(present)


def _mlp(weights: Weights) -> tuple[Literal["GELU", "SwiGLU"], int]:
    plain, gated = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.w12.weight"
    if gated not in weights:
        if plain not in weights:
            raise _bad(weights, f"it has neither {plain} nor {gated}")
        return "GELU", _shape(weights, plain, rank=2)[0]
    rows = _shape(weights, gated, rank=2)[0]
    if rows % 2:
        raise _unusable(weights, gated, "cannot be halved into gate and up")
    return "SwiGLU", rows // 2


def _grid(weights: Weights) -> int:
    patches = _shape(weights, "pos_embed", rank=3)[1] - 1
    grid = math.isqrt(patches)
    if grid < 1 or grid**2 != patches:
        raise _unusable(weights, "pos_embed", f"is no square grid: {patches} patches beside cls")
    return grid


def _shape(weights: Weights, name: str, rank: int) -> tuple[int, ...]:
    if name not in weights:
        raise _bad(weights, f"it has no {name}")
    shape = weights.shape(name)
    if len(shape) != rank or min(shape) < 1:
        raise _unusable(weights, name, f"does not have {rank} positive sizes")
    return shape


def _unusable(weights: Weights, name: str, why: str) -> BadInputError:
    return _bad(weights, f"{name}, which is {'×'.join(map(str, weights.shape(name))) or 'a scalar'}, {why}")


def _bad(weights: Weights, why: str) -> BadInputError:
    return BadInputError(f"cannot use weights {weights.source.label}", why, "is it a DINOv2 checkpoint?")
