"""A layer map is checked against the weights before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sinder_cli import (
    AttentionMap,
    Backbone,
    BadInputError,
    BlockMap,
    GatedMlpMap,
    LayerMap,
    MemoryTensors,
    NormMap,
    PlainMlpMap,
    PositionMap,
    StemMap,
    WeightRef,
    Weights,
    require_matching,
)
from sinder_cli.backbone.contract import references, trained_references
from sinder_cli.backbone.opening import check_layer_map

N, INNER, HIDDEN = 8, 6, 10
SHAPES = {
    "qkv": (3 * INNER, N), "output": (N, INNER), "norm1": (N,), "scale1": (N,), "value_bias": (INNER,),
    "norm2": (N,), "up": (HIDDEN, N), "gate": (HIDDEN, N), "gate_bias": (HIDDEN,), "down": (N, HIDDEN),
    "scale2": (N,), "position": (1, 5, N),
}  # fmt: skip


def ref(name: str, rows: tuple[int, int] | None = None) -> WeightRef:
    return WeightRef(name=name, rows=rows)


def block_map(rows: tuple[int, int] = (2 * INNER, 3 * INNER), **mlp: Any) -> BlockMap:
    attention = AttentionMap(
        norm=NormMap(weight=ref("norm1")),
        value=ref("qkv", rows),
        output=ref("output"),
        value_bias=ref("value_bias"),
        scale=ref("scale1"),
    )
    fields: dict[str, Any] = {
        "norm": NormMap(weight=ref("norm2")),
        "activation": "silu",
        "gate": ref("gate"),
        "gate_bias": ref("gate_bias"),
        "up": ref("up"),
        "down": ref("down"),
        "scale": ref("scale2"),
    }
    return BlockMap(attention=attention, mlp=GatedMlpMap(**(fields | mlp)))


def unused(*_: Any) -> Any:
    raise AssertionError("no module is built")


def backbone_of(
    block: BlockMap, shapes: dict[str, tuple[int, ...]], position: PositionMap | None = None, width: int = N
) -> Backbone:
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return Backbone(
        name="by hand",
        layers=LayerMap(width=width, blocks=(block,), position=position),
        weights=Weights.of(MemoryTensors("memory", tensors)),
        patch_size=2,
        prefix_tokens=1,
        has_cls=True,
        image_size=4,
        build=unused,
        embed=unused,
        run_block=unused,
        finish=unused,
    )


def refusal(backbone: Backbone) -> str:
    with pytest.raises(BadInputError) as caught:
        check_layer_map(backbone)
    assert caught.value.exit_code == 65
    return str(caught.value)


def test_a_map_that_fits_is_accepted() -> None:
    check_layer_map(backbone_of(block_map(), SHAPES, PositionMap(weight=ref("position"), prefix=1)))


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"position"}))
def test_a_missing_tensor_is_named(name: str) -> None:
    shapes = {other: shape for other, shape in SHAPES.items() if other != name}
    assert f"there is no tensor '{name}'" in refusal(backbone_of(block_map(), shapes))


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("output", (N, INNER + 1), "block 0, attention.output (output): its shape is 8 × 7, not 8 × 6"),
        ("output", (INNER, N), "its shape is 6 × 8, not 8 × 6"),  # stored [in, out]
        ("down", (N, HIDDEN, 1), "block 0, mlp.down (down): its shape is 8 × 10 × 1, not 8 × 10"),
        ("output", (N,), "its shape is 8, not 8 × 6"),
        ("norm1", (N + 1,), "attention.norm.weight (norm1): its shape is 9, not 8"),
        ("scale2", (1,), "mlp.scale (scale2): its shape is 1, not 8"),
        ("gate", (HIDDEN + 1, N), "its shape is 11 × 8, not 10 × 8"),
        ("gate_bias", (HIDDEN + 1,), "its shape is 11, not 10"),
        ("value_bias", (INNER + 1,), "attention.value_bias (value_bias): its shape is 7, not 6"),
    ],
)
def test_a_wrong_shape_is_named_with_its_place(name: str, shape: tuple[int, ...], told: str) -> None:
    assert told in refusal(backbone_of(block_map(), SHAPES | {name: shape}))


def test_quantized_weights_are_refused_by_name() -> None:
    backbone = backbone_of(block_map(), SHAPES)
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()} | {"up": torch.zeros(HIDDEN, N).char()}
    quantized = replace(backbone, weights=Weights.of(MemoryTensors("memory", tensors)))
    assert "block 0, mlp.up: 'up' holds torch.int8: quantized weights" in refusal(quantized)


def test_queries_are_checked_as_well() -> None:
    block = block_map()
    attention = block.attention.model_copy(update={"query": ref("qkv", (0, INNER)), "query_bias": ref("norm1")})
    told = refusal(backbone_of(block.model_copy(update={"attention": attention}), SHAPES))
    assert "attention.query_bias (norm1): its shape is 8, not 6" in told


def test_a_wrong_width_is_refused() -> None:
    assert "not 9" in refusal(backbone_of(block_map(), SHAPES, width=9))


@pytest.mark.parametrize("rows", [(2 * INNER, 3 * INNER + 1), (-1, 5), (5, 5), (7, 6)])
def test_rows_out_of_range_are_refused(rows: tuple[int, int]) -> None:
    told = refusal(backbone_of(block_map(rows), SHAPES))
    assert f"attention.value: rows {rows[0]}:{rows[1]} are out of range of 'qkv', which has 18" in told


def test_rows_of_a_scalar_are_refused() -> None:
    assert "are out of range of 'qkv', which has 0" in refusal(backbone_of(block_map(), SHAPES | {"qkv": ()}))


@pytest.mark.parametrize(
    ("shape", "prefix", "told"),
    [
        ((1, 5, N + 1), 1, "its last size is not width 8"),
        ((), 0, "its last size is not width 8"),
        ((1, 5, N), 5, "5 prefix rows leave no patches"),
    ],
)
def test_a_position_embedding_must_have_patches_of_the_width(shape: tuple[int, ...], prefix: int, told: str) -> None:
    position = PositionMap(weight=ref("position"), prefix=prefix)
    assert told in refusal(backbone_of(block_map(), SHAPES | {"position": shape}, position))


@pytest.mark.parametrize("activation", ["glue", "GELU", None, 3])
def test_an_unknown_activation_is_refused_naming_the_known_ones(activation: object) -> None:
    with pytest.raises(ValidationError, match="neither a function nor one of gelu, gelu_tanh"):
        block_map(activation=activation)


def test_any_function_is_an_activation() -> None:
    assert block_map(activation=torch.sin).mlp.activation is torch.sin


def test_unknown_fields_are_refused_and_records_are_frozen() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        WeightRef(name="a", columns=(0, 1))  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="frozen"):
        ref("a").name = "b"
    with pytest.raises(ValidationError, match="at least 1"):
        LayerMap(width=N, blocks=())


def test_every_reference_comes_with_its_role() -> None:
    roles = dict(references(block_map()))
    assert str(roles["attention.value"]) == "qkv[12:18]"
    assert set(roles) == {
        "attention.norm.weight", "attention.value", "attention.output", "attention.value_bias", "attention.scale",
        "mlp.norm.weight", "mlp.up", "mlp.gate", "mlp.gate_bias", "mlp.down", "mlp.scale",
    }  # fmt: skip


def test_value_output_and_mlp_weights_are_trained_and_no_bias() -> None:
    gated = block_map()
    plain = PlainMlpMap(norm=NormMap(), activation="gelu", up=ref("up"), down=ref("down"))
    assert list(trained_references(gated)) == [
        "attention.value", "attention.output", "mlp.gate", "mlp.up", "mlp.down",
    ]  # fmt: skip
    assert list(trained_references(gated.model_copy(update={"mlp": plain}))) == [
        "attention.value", "attention.output", "mlp.up", "mlp.down",
    ]  # fmt: skip


def test_missing_unexpected_and_misshaped_tensors_are_counted_and_named() -> None:
    tensors = {"a": torch.zeros(2), "b": torch.zeros(2, 3), "odd": torch.zeros(())}
    weights = Weights.of(MemoryTensors("memory", tensors))
    expected = {"a": (2,), "b": (3, 2), **{f"absent{i}": (1,) for i in range(4)}}
    with pytest.raises(BadInputError) as caught:
        require_matching(expected, weights, "a model")
    assert str(caught.value) == (
        "weights memory do not fit a model: 1 tensors match, 4 missing: absent0, absent1, absent2, …, "
        "1 unexpected: odd, 1 mis-shaped: b (2×3 for 3×2); give the checkpoint of this model"
    )
    require_matching({"a": (2,), "b": (2, 3), "odd": ()}, weights, "a model")


def test_a_norm_inside_a_sub_layer_has_its_inner_width() -> None:
    block = block_map()
    inner = NormMap(weight=ref("norm1"))  # N features
    for part, width in (("attention", INNER), ("mlp", HIDDEN)):
        changed = getattr(block, part).model_copy(update={"inner_norm": inner})
        told = refusal(backbone_of(block.model_copy(update={part: changed}), SHAPES))
        assert f"{part}.inner_norm.weight (norm1): its shape is 8, not {width}" in told


def test_sub_layers_beside_others_have_inner_widths_of_their_own() -> None:
    narrow = {"qkv2": (3 * 4, N), "out2": (N, 4)}
    attention = AttentionMap(norm=NormMap(), value=ref("qkv2", (8, 12)), output=ref("out2"))
    beside = block_map().model_copy(update={"attention": attention})
    both = block_map().model_copy(update={"beside": beside})
    check_layer_map(backbone_of(both, SHAPES | narrow))
    told = refusal(backbone_of(both, SHAPES | narrow | {"out2": (N, 5)}))
    assert "block 0, beside.attention.output (out2): its shape is 8 × 5, not 8 × 4" in told


def test_the_stem_and_the_final_norm_are_checked_as_well() -> None:
    def with_outer(**outer: object) -> Backbone:
        backbone = backbone_of(block_map(), SHAPES | {"patch": (N, 3, 2, 2), "cls": (1, 1, N), "flat": (3, 2)})
        return replace(backbone, layers=backbone.layers.model_copy(update=outer))

    check_layer_map(with_outer(stem=StemMap(patch=ref("patch"), cls=ref("cls")), norm=NormMap(weight=ref("norm1"))))
    assert "stem.patch (flat): its shape is 3×2, and its first" in refusal(with_outer(stem=StemMap(patch=ref("flat"))))
    told = refusal(with_outer(stem=StemMap(patch=ref("patch"), registers=ref("flat"))))
    assert "stem.registers (flat): its shape is 3×2, and its last size is not width 8" in told
    assert "norm.weight: there is no tensor 'gone'" in refusal(with_outer(norm=NormMap(weight=ref("gone"))))
