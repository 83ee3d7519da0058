"""Checkpoints of DINOv2: sizes are read from names and shapes, and files of the paper's own code are made canonical.

The file that the authors released has the official names, and a `reg_token` that their model does not read. A state
dict that their code saves during training has, instead of each weight W, the factors of W = U diag(S + ε) Vᵀ: `U`,
`S`, `Vt` and `epsilon`, and for fused queries, keys and values three sets of them, `U_q`, `U_k`, `U_v` and so on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Literal

from sinder_cli import BadInputError, TensorInfo, TensorSource, Weights

from .config import Config

if TYPE_CHECKING:
    from torch import Tensor


ANCHOR = "patch_embed.proj.weight"  # every DINOv2 checkpoint has it, with some prefix or none

HEADS = ("head.", "heads.", "linear_head.", "dino_head.", "ibot_head.", "classifier.")  # after the backbone
DINOV3 = {384: "small", 768: "base", 1024: "large", 1280: "huge_plus", 4096: "7b"}  # by width

_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
_BLOCK = re.compile(r"^blocks\.(\d+)\.")


def canonical(weights: Weights) -> Weights:
    """Return the backbone inside a checkpoint, under the names of the official files.

    Training with sharded blocks stores block 3 of chunk 0 as `blocks.0.3.…`; it becomes `blocks.3.…`. Heads are left
    out, the two halves of a SwiGLU that are stored separately become one tensor, and the extra tensors of the paper's
    code are multiplied or ignored.
    """
    backbone = weights.located(ANCHOR).without(lambda name: name.startswith(HEADS))
    _require_dinov2(backbone)
    return without_leftovers(with_packed(backbone)).renamed(lambda name: _CHUNKED.sub(r"blocks.\1.", name))


def _require_dinov2(weights: Weights) -> None:
    """Raise `BadInputError` for a DINOv3, whose tensors resemble a DINOv2's, with the model name to use for it."""
    if "storage_tokens" not in weights and "rope_embed.periods" not in weights:
        return
    what = f"cannot use weights {weights.source.label}"
    width = weights.shape("norm.weight")[0] if "norm.weight" in weights else 0
    size, patch = DINOV3.get(width, "SIZE"), weights.shape(ANCHOR)[-1]
    name = f"timm/vit_{size}_patch{patch}_dinov3"
    remedy = f"name the model {name}, or {name}_qkvb where queries and values have biases"
    raise BadInputError(what, "it is a DINOv3", remedy)


def infer_config(weights: Weights) -> Config:
    """Return the configuration of canonical weights. Raises `BadInputError`, which names the invalid tensor.

    One tensor of a part shows that the part exists; `require_matching` checks that no other tensor is missing.
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


LOOSE = "reg_token"  # no tensor of this architecture has that name: registers are `register_tokens`
FACTORS = ("U", "S", "Vt", "epsilon")
PACKED = ("w1", "w2")  # gate and up of a SwiGLU, which the official files have as one, `w12`
FUSED = ("_q", "_k", "_v")  # in the order of their rows

_FACTOR = re.compile(rf"^(.+\.)(?:{'|'.join(FACTORS)})(_[qkv])?$")


def with_packed(weights: Weights) -> Weights:
    """Return the weights with gate and up of each SwiGLU as one tensor, if a file stores them separately.

    Raises `BadInputError` for a gate without its up, or with an up of another shape or dtype.
    """
    first, second = (f".{name}." for name in PACKED)
    pairs = {name: name.replace(first, second) for name in weights.names if f".mlp{first}" in name}
    if not pairs:
        return weights
    names: dict[str, str] = {}
    products: dict[str, Product | Stack] = {}
    for name, stored in weights.stored_names.items():
        if name in pairs:
            gate, up = name, pairs[name]
            if up not in weights or weights.info(gate) != weights.info(up):
                what = f"cannot use weights {weights.source.label}"
                raise BadInputError(what, f"{up} is missing or does not match {gate}", "is the file complete?")
            packed = name.replace(first, ".w12.")
            names[packed] = f"{weights.prefix}{packed}"
            products[names[packed]] = Stack((stored, weights.stored_names[up]))
        elif name not in pairs.values():
            names[name] = stored
    return replace(weights, source=MultipliedTensors(weights.source, products), stored_names=names)


def without_leftovers(weights: Weights) -> Weights:
    """Return the weights as in the official files: factors are multiplied when they are read, `reg_token` is ignored.

    Raises `BadInputError` if factors are missing, or if their shapes cannot be multiplied.
    """
    kept = {name: stored for name, stored in weights.stored_names.items() if name != LOOSE}
    ignored = (*weights.ignored, *([weights.stored_names[LOOSE]] if LOOSE in weights else ()))
    layers: dict[str, tuple[str, ...]] = {}
    for name in kept:
        if match := _FACTOR.match(name):
            layers[match[1]] = FUSED if match[2] else ("",)
    if not layers:
        return replace(weights, stored_names=kept, ignored=ignored)
    products = {
        f"{layer}weight": Product(tuple(_factors(weights, layer, suffix) for suffix in suffixes))
        for layer, suffixes in layers.items()
    }
    names: dict[str, str] = {}
    for name, stored in kept.items():  # a weight takes the place of the first tensor of its layer
        match = _FACTOR.match(name)
        layer = match[1] if match else name[: name.rindex(".") + 1] if "." in name else ""
        if layer in layers:
            names.setdefault(f"{layer}weight", f"{weights.prefix}{layer}weight")
        if not match:
            names[name] = stored
    stored_products = {names[name]: product for name, product in products.items()}
    return replace(
        weights, source=MultipliedTensors(weights.source, stored_products), stored_names=names, ignored=ignored
    )


@dataclass(frozen=True)
class Product:
    """A weight given by the stored names of its factors, a set of four for each part of its rows."""

    parts: tuple[tuple[str, str, str, str], ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part)

    def info(self, infos: Mapping[str, TensorInfo]) -> TensorInfo:
        """Return shape and dtype of the weight."""
        rows = sum(infos[u].shape[0] for u, *_ in self.parts)
        return TensorInfo((rows, infos[self.parts[0][2]].shape[1]), infos[self.parts[0][0]].dtype)

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Compute U diag(S + ε) Vᵀ for each part, stacked by rows."""
        import torch

        return torch.cat([tensors[u] * (tensors[s] + tensors[e]) @ tensors[vt] for u, s, vt, e in self.parts])


@dataclass(frozen=True)
class Stack:
    """A tensor given by the stored names of the tensors whose rows it stacks; all have the same dtype."""

    names: tuple[str, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return self.names

    def info(self, infos: Mapping[str, TensorInfo]) -> TensorInfo:
        """Return shape and dtype of the tensor."""
        shapes = [infos[name].shape for name in self.names]
        return TensorInfo((sum(shape[0] for shape in shapes), *shapes[0][1:]), infos[self.names[0]].dtype)

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the tensors, stacked by rows."""
        import torch

        return torch.cat([tensors[name] for name in self.names])


@dataclass(frozen=True)
class MultipliedTensors:
    """A source in which some tensors are computed from others."""

    source: TensorSource
    products: Mapping[str, Product | Stack] = field(repr=False)

    @property
    def label(self) -> str:
        return self.source.label

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        infos = self.source.infos
        return {**infos, **{name: product.info(infos) for name, product in self.products.items()}}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read whole tensors in the requested order; the factors of one product at a time."""
        found: dict[str, Tensor] = {}
        for name in names:
            if product := self.products.get(name):
                found[name] = product.of(self.source.read(product.sources))
            else:
                found |= self.source.read([name])
        return found


def _factors(weights: Weights, layer: str, suffix: str) -> tuple[str, str, str, str]:
    """Return the stored names of U, S, Vᵀ and ε. Raises `BadInputError` if one is missing or they do not fit."""
    names = [f"{layer}{factor}{suffix}" for factor in FACTORS]
    what = f"cannot use weights {weights.source.label}"
    if missing := [name for name in names if name not in weights]:
        raise BadInputError(what, f"it lacks factors of {layer}weight: {', '.join(missing)}", "is the file complete?")
    shapes = [weights.shape(name) for name in names]
    u, s, vt, epsilon = shapes
    if [len(shape) for shape in shapes] != [2, 1, 2, 1] or not u[1] == s[0] == epsilon[0] == vt[0]:
        raise BadInputError(what, f"the factors of {layer}weight do not fit: {shapes}", "is the file complete?")
    first, second, third, fourth = (weights.stored_names[name] for name in names)
    return first, second, third, fourth


MODEL = """from torch.nn.functional import scaled_dot_product_attention

from .config import Config
from .official import DinoVisionTransformer


def build(**keywords):
    config = {config!r}
    return DinoVisionTransformer(config, {heads}, scaled_dot_product_attention, **keywords)
"""


def hub_source(config: Config, heads: int) -> dict[str, str]:
    """Return the module's own files, and one that builds it with these sizes."""
    names = ("config.py", "module.py", "official.py")
    own = {name: files(__package__).joinpath(name).read_text(encoding="utf-8") for name in names}
    return own | {"model.py": MODEL.format(config=config, heads=heads)}
