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
    """The normalization in front of a sub-layer; only LayerNorm centres its input."""

    kind: Literal["layernorm", "rmsnorm"] = "layernorm"
    weight: WeightRef | None = None
    bias: WeightRef | None = None


class AttentionMap(Record):
    """`x ← x + scale ⊙ (output · mix(value · norm(x)))`; weights are stored `[out, in]`."""

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


class _Mlp(Record):
    norm: NormMap
    activation: Annotated[Activation | Any, Field(description="a name, or any function of one tensor, elementwise")]
    up: WeightRef
    up_bias: WeightRef | None = None
    down: WeightRef
    down_bias: WeightRef | None = None
    scale: WeightRef | None = None

    @model_validator(mode="after")
    def _activation_is_a_function(self) -> _Mlp:
        known = Activation.__args__  # type: ignore[attr-defined]
        if not callable(self.activation) and self.activation not in known:
            raise ValueError(f"activation {self.activation!r} is neither a function nor one of {', '.join(known)}")
        return self


class PlainMlpMap(_Mlp):
    """`x ← x + scale ⊙ down · φ(up · norm(x))`."""

    kind: Literal["plain"] = "plain"


class GatedMlpMap(_Mlp):
    """`x ← x + scale ⊙ down · (φ(gate · norm(x)) ⊙ (up · norm(x)))`."""

    kind: Literal["gated"] = "gated"
    gate: WeightRef
    gate_bias: WeightRef | None = None


class BlockMap(Record):
    """One transformer block. In a parallel block both sub-layers read the same input."""

    attention: AttentionMap
    mlp: Annotated[PlainMlpMap | GatedMlpMap, Field(discriminator="kind")]
    parallel: bool = False


class PositionMap(Record):
    """A learned position embedding `[…, tokens, width]`, the first `prefix` rows of which are no patches."""

    weight: WeightRef
    prefix: int = Field(0, ge=0)


class LayerMap(Record):
    """All blocks of a backbone in the order they run, and the width N of its residual stream."""

    width: int = Field(ge=1)
    blocks: tuple[BlockMap, ...] = Field(min_length=1)
    position: PositionMap | None = None


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
    return attention | gate | {"mlp.up": mlp.up, "mlp.down": mlp.down}


def linear_references(block: BlockMap) -> tuple[WeightRef, ...]:
    """Every linear layer's weight of a block: queries and keys, as far as the map names them, and the trained ones."""
    steering = (block.attention.query, block.attention.key)
    return (*(ref for ref in steering if ref is not None), *trained_references(block).values())
