"""The layer map: data that names the tensors of each block by role.

Everything the engine does to a backbone, it does through this map; no architecture is ever asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from torch import Tensor

    ScalarFunction = Callable[[Tensor], Tensor]

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "leaky_relu", "tanh", "sigmoid", "softplus"]


class Record(BaseModel):
    """A frozen record that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class WeightRef(Record):
    """One tensor of the checkpoint by name, or the rows [start, stop) of it when a projection is fused."""

    name: str
    rows: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"


class NormMap(Record):
    """A normalization; only LayerNorm centres its input. `eps` is what it adds to the variance."""

    kind: Literal["layernorm", "rmsnorm"] = "layernorm"
    weight: WeightRef | None = None
    bias: WeightRef | None = None
    eps: float = Field(default=1e-6, ge=0)


class AttentionMap(Record):
    """`x ← x + scale ⊙ (output · inner_norm(mix(value · norm(x))))`; weights are stored `[out, in]`.

    `heads` and `mixing` are for those who convert a model; nothing that the engine does depends on them. Mixing is
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


class _Mlp(Record):
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


class BlockMap(Record):
    """One transformer block. In a parallel block both sub-layers read the same input.

    `beside` is a second pair of sub-layers whose outputs are added to those of the first, as timm's 18×2 models have:
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


class PositionMap(Record):
    """A learned position embedding `[…, tokens, width]`, the first `prefix` rows of which are no patches."""

    weight: WeightRef
    prefix: int = Field(0, ge=0)


class StemMap(Record):
    """What makes tokens of an image: patch projection `[N, 3, P, P]`, cls, registers, mask token, a norm after them.

    It is for those who convert a model to another library; nothing else depends on it.
    """

    patch: WeightRef
    patch_bias: WeightRef | None = None
    cls: WeightRef | None = None
    registers: WeightRef | None = None
    mask: WeightRef | None = None
    norm: NormMap | None = None


class LayerMap(Record):
    """All blocks of a backbone in the order they run, and the width N of its residual stream.

    `stem` and the final `norm` are needed for conversions to other libraries alone.
    """

    width: int = Field(ge=1)
    blocks: tuple[BlockMap, ...] = Field(min_length=1)
    position: PositionMap | None = None
    stem: StemMap | None = None
    norm: NormMap | None = None


def references(record: Record, path: str = "") -> Iterator[tuple[str, WeightRef]]:
    """Every weight reference inside a map, with the role that leads to it: `attention.norm.weight`."""
    for field in type(record).model_fields:
        value = getattr(record, field)
        role = f"{path}.{field}" if path else field
        if isinstance(value, WeightRef):
            yield role, value
        elif isinstance(value, Record):
            yield from references(value, role)


def trained_references(block: BlockMap) -> dict[str, WeightRef]:
    """The weights whose singular values a repair may change: value, output and every MLP weight (SINDER, section 4).

    Queries and keys only steer the mixing of tokens, which the linearization drops; they and all biases stay.
    """
    mlp = block.mlp
    gate = {"mlp.gate": mlp.gate} if isinstance(mlp, GatedMlpMap) else {}
    attention = {"attention.value": block.attention.value, "attention.output": block.attention.output}
    own = attention | gate | {"mlp.up": mlp.up, "mlp.down": mlp.down}
    beside = trained_references(block.beside) if block.beside else {}
    return own | {f"beside.{role}": ref for role, ref in beside.items()}


def linear_references(block: BlockMap) -> tuple[WeightRef, ...]:
    """Every linear layer's weight of a block: queries and keys, as far as the map names them, and the trained ones."""
    steering = [ref for branch in block.branches for ref in (branch.attention.query, branch.attention.key)]
    return (*(ref for ref in steering if ref is not None), *trained_references(block).values())
