"""What a plugin describes a model by: a Backbone and its layer map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from sinder_cli.backbone.weights import Weights

    ScalarFunction = Callable[[Tensor], Tensor]


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Backbone:
    """A Vision Transformer as a plugin describes it: embed → blocks → norm, with its layer map.

    `layers` names tensors of `weights`. These are the weights that the plugin received, perhaps `located` or `renamed`.
    The functions are called with gradients on or off, on any device, for any batch size and any image of whole patches,
    at least 5 × 5 of them; they do not modify their arguments.

    `embed(module, images)` takes normalized images `[B, 3, H, W]` and returns the tokens `[B, prefix + patches, N]`
    (patches row by row) and a context that every block may need, shared by all images of the batch, or None.
    `run_block(module, index, tokens, context)` runs one block on the residual stream.
    `finish(module, tokens)` applies the final norm.
    `build()` makes the module, with any initialization; its state dict has exactly the names of `weights`.
    `forward(module, images)` is the library's own forward pass to the normalized tokens `[B, prefix + patches, N]`;
    only `sinder check-backbone` calls it, to compare `embed`, `run_block` and `finish` with it.
    `sidecars` are small text files, by name, that are needed besides the weights to describe the backbone again, such
    as the `config.json` of a Hugging Face folder; a run directory keeps them.
    `hub_source()` returns the Python files, by name, of a package that needs only torch, for an export to `torch.hub`:
    `build()` of its `model.py` makes the module, whose `forward(images)` returns tokens after the final norm.
    """

    name: str
    layers: LayerMap
    weights: Weights
    patch_size: int
    prefix_tokens: int  # cls and registers, cls first
    has_cls: bool
    image_size: int  # pixels; the default side of a square input
    build: Callable[[], nn.Module]
    embed: Callable[[Any, Tensor], tuple[Tensor, Any]]  # the first argument is the module that `build` made
    run_block: Callable[[Any, int, Tensor, Any], Tensor]
    finish: Callable[[Any, Tensor], Tensor]
    forward: Callable[[Any, Tensor], Tensor] | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    sample_images: Callable[[int, int], list[Image]] | None = None  # (count, seed); for models that bring their data
    sidecars: Mapping[str, str] = field(default_factory=dict)
    hub_source: Callable[[], Mapping[str, str]] | None = None
    license: str | None = None  # of the weights, as model cards name it, if known: `apache-2.0`

    @property
    def depth(self) -> int:
        return len(self.layers.blocks)

    @property
    def width(self) -> int:
        return self.layers.width


Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "leaky_relu", "tanh", "sigmoid", "softplus"]


class LayerRecord(BaseModel):
    """A frozen record that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class WeightRef(LayerRecord):
    """One tensor of the checkpoint by name, or the rows [start, stop) of it when a projection is fused."""

    name: str
    rows: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"


class NormMap(LayerRecord):
    """A normalization; only LayerNorm centres its input. `eps` is added to the variance."""

    kind: Literal["layernorm", "rmsnorm"] = "layernorm"
    weight: WeightRef | None = None
    bias: WeightRef | None = None
    eps: float = Field(default=1e-6, ge=0)


class AttentionMap(LayerRecord):
    """`x ← x + scale ⊙ (output · inner_norm(mix(value · norm(x))))`; weights are stored `[out, in]`.

    `heads` and `mixing` are used only to convert a model; nothing else in the engine depends on them. Mixing is
    `plain` if tokens mix by softmax(QKᵀ/√d) alone, without rotary positions, relative biases, or norms of queries and
    keys.
    """

    norm: NormMap
    query: WeightRef | None = None
    key: WeightRef | None = None
    value: WeightRef
    output: WeightRef
    query_bias: WeightRef | None = None
    key_bias: WeightRef | None = None
    value_bias: WeightRef | None = None
    output_bias: WeightRef | None = None
    scale: WeightRef | None = None
    inner_norm: NormMap | None = None
    heads: int | None = Field(default=None, ge=1)
    mixing: Literal["plain", "other"] = "plain"


class _Mlp(LayerRecord):
    norm: NormMap
    activation: Annotated[Activation | Any, Field(description="a name, or any function of one tensor, elementwise")]
    up: WeightRef
    up_bias: WeightRef | None = None
    down: WeightRef
    down_bias: WeightRef | None = None
    scale: WeightRef | None = None
    inner_norm: NormMap | None = None

    @model_validator(mode="after")
    def _activation_is_a_function(self) -> _Mlp:
        known = Activation.__args__  # type: ignore[attr-defined]
        if not callable(self.activation) and self.activation not in known:
            raise ValueError(f"activation {self.activation!r} is neither a function nor one of {', '.join(known)}")
        return self


class PlainMlpMap(_Mlp):
    """`x ← x + scale ⊙ down · inner_norm(φ(up · norm(x)))`."""

    kind: Literal["plain"] = "plain"


class GatedMlpMap(_Mlp):
    """`x ← x + scale ⊙ down · inner_norm(φ(gate · norm(x)) ⊙ (up · norm(x)))`."""

    kind: Literal["gated"] = "gated"
    gate: WeightRef
    gate_bias: WeightRef | None = None


class BlockMap(LayerRecord):
    """One transformer block. In a parallel block both sub-layers read the same input.

    `beside` is a second pair of sub-layers whose outputs are added to those of the first, as in timm's 18×2 models:
    `x ← x + attention(x) + beside.attention(x)`, then the same with the MLPs.
    """

    attention: AttentionMap
    mlp: Annotated[PlainMlpMap | GatedMlpMap, Field(discriminator="kind")]
    parallel: bool = False
    beside: BlockMap | None = None

    @property
    def branches(self) -> tuple[BlockMap, ...]:
        """This block and those beside it."""
        return (self, *(self.beside.branches if self.beside else ()))


class PositionMap(LayerRecord):
    """A learned position embedding `[…, tokens, width]`, whose first `prefix` rows do not belong to patches."""

    weight: WeightRef
    prefix: int = Field(0, ge=0)


class StemMap(LayerRecord):
    """Parts that turn an image into tokens: patch projection `[N, 3, P, P]`, cls, registers, mask token, final norm.

    They are used only to convert a model to another library; nothing else depends on them.
    """

    patch: WeightRef
    patch_bias: WeightRef | None = None
    cls: WeightRef | None = None
    registers: WeightRef | None = None
    mask: WeightRef | None = None
    norm: NormMap | None = None


class LayerMap(LayerRecord):
    """All blocks of a backbone in the order they run, and the width N of its residual stream.

    `stem` and the final `norm` are used only for conversions to other libraries.
    """

    width: int = Field(ge=1)
    blocks: tuple[BlockMap, ...] = Field(min_length=1)
    position: PositionMap | None = None
    stem: StemMap | None = None
    norm: NormMap | None = None


def references(record: LayerRecord, path: str = "") -> Iterator[tuple[str, WeightRef]]:
    """Yield every weight reference inside a map with its role, the path to it, such as `attention.norm.weight`."""
    for name in type(record).model_fields:
        value = getattr(record, name)
        role = f"{path}.{name}" if path else name
        if isinstance(value, WeightRef):
            yield role, value
        elif isinstance(value, LayerRecord):
            yield from references(value, role)


def trained_references(block: BlockMap) -> dict[str, WeightRef]:
    """Return the weights whose singular values a repair may change: value, output and every MLP weight.

    Source: SINDER, section 4. Queries and keys only control the mixing of tokens, which the linearization drops; they
    and all biases stay unchanged.
    """
    mlp = block.mlp
    gate = {"mlp.gate": mlp.gate} if isinstance(mlp, GatedMlpMap) else {}
    attention = {"attention.value": block.attention.value, "attention.output": block.attention.output}
    own = attention | gate | {"mlp.up": mlp.up, "mlp.down": mlp.down}
    beside = trained_references(block.beside) if block.beside else {}
    return own | {f"beside.{role}": ref for role, ref in beside.items()}


def linear_references(block: BlockMap) -> tuple[WeightRef, ...]:
    """Return the weights of all linear layers of a block: the trained ones, and queries and keys if mapped."""
    steering = [ref for branch in block.branches for ref in (branch.attention.query, branch.attention.key)]
    return (*(ref for ref in steering if ref is not None), *trained_references(block).values())
