"""Blocks against their map: right for every kind of block, and wrong for each way to describe one wrongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from drawn_vit import H, Shape, norm_map, ref, vit

from sinder_cli import Backbone, BlockMap, MemoryTensors, Weights
from sinder_cli.backbone.opening import load_module
from sinder_cli.conformance.blocks import blocks_follow_the_map, linearization_agrees
from sinder_cli.conformance.subject import Candidate, NonconformityError
from sinder_cli.events import silent

SHAPES = {
    "plain": Shape(),
    "gated": Shape(gated=True),
    "RMSNorm": Shape(rms=True),
    "parallel": Shape(parallel=True),
    "inner norms": Shape(inner=True),
    "gated, with inner RMSNorms": Shape(gated=True, rms=True, inner=True),
    "sub-layers beside others": Shape(beside=True),
    "gated ones beside others, in parallel": Shape(gated=True, beside=True, parallel=True),
}
Make = Callable[..., Candidate]
Mapped = Callable[..., Any]
Change = Callable[[BlockMap], BlockMap]
AT = "blocks.1.branches.0"
GATED = Shape(gated=True)


def with_(part: str, **update: Any) -> Change:
    """A block map with these fields of its attention or MLP replaced."""
    return lambda block: block.model_copy(update={part: getattr(block, part).model_copy(update=update)})


def swapped(block: BlockMap) -> BlockMap:
    """Gate and up in each other's place."""
    mlp: Any = block.mlp
    halves = {"gate": mlp.up, "gate_bias": mlp.up_bias, "up": mlp.gate, "up_bias": mlp.gate_bias}
    return with_("mlp", **halves)(block)


SEEN_BY_BOTH: dict[str, tuple[Shape, Change]] = {
    "another activation": (Shape(), with_("mlp", activation="tanh")),
    "the keys for the values": (Shape(), with_("attention", value=ref(f"{AT}.qkv.weight", 1))),
    "gate and up swapped": (GATED, swapped),
    "no scale of attention": (Shape(), with_("attention", scale=None)),
    "no scale of the MLP": (Shape(), with_("mlp", scale=None)),
    "the scales swapped": (Shape(), with_("mlp", scale=ref(f"{AT}.gamma1"))),
    "the other sub-layer's norm": (Shape(), with_("mlp", norm=norm_map(f"{AT}.norm1", rms=False))),
    "a norm without its weight": (
        Shape(),
        lambda block: with_("mlp", norm=block.mlp.norm.model_copy(update={"weight": None}))(block),
    ),
    "no bias in front of the activation": (Shape(), with_("mlp", up_bias=None)),
    "an inner norm left out": (Shape(inner=True), with_("mlp", inner_norm=None)),
    "sub-layers beside others left out": (
        Shape(beside=True),
        lambda block: block.model_copy(update={"beside": None}),
    ),
}
SEEN_BY_THE_FORMULA: dict[str, tuple[Shape, Change]] = {
    "RMSNorm for LayerNorm in front": (
        Shape(),
        lambda block: with_("attention", norm=block.attention.norm.model_copy(update={"kind": "rmsnorm"}))(block),
    ),
    "an activation that is nearly right": (Shape(), with_("mlp", activation="gelu_tanh")),
    "the bias of the keys for the values'": (Shape(), with_("attention", value_bias=ref(f"{AT}.qkv.bias", 1))),
    "no bias of the values": (Shape(), with_("attention", value_bias=None)),
    "no bias of the output": (Shape(), with_("attention", output_bias=None)),
    "no bias of the MLP's last layer": (Shape(), with_("mlp", down_bias=None)),
    "the gate's bias in the wrong half": (GATED, with_("mlp", gate_bias=ref(f"{AT}.first.bias", 1, H))),
}
BROKEN = SEEN_BY_BOTH | SEEN_BY_THE_FORMULA


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("check", [blocks_follow_the_map, linearization_agrees])
def test_a_right_map_of_every_kind_of_block_passes(check: Callable[..., str], shape: Shape, subject: Make) -> None:
    assert check(subject(shape), silent)


@pytest.mark.parametrize(("shape", "change"), BROKEN.values(), ids=BROKEN)
def test_the_formula_tells_a_wrong_map(shape: Shape, change: Change, subject: Make, mapped: Mapped) -> None:
    wrong = subject(shape, layers=mapped(vit(shape), change))
    with pytest.raises(NonconformityError, match=r"block 1, (attention|mlp): the map's formula is off by "):
        blocks_follow_the_map(wrong, silent)


def test_sub_layers_of_tiny_scale_are_held_against_the_map(subject: Make, mapped: Mapped) -> None:
    def tiny(backbone: Backbone) -> Backbone:
        tensors = backbone.weights.read(backbone.weights.names)
        scaled = {name: tensor * (1e-5 if "gamma" in name else 1) for name, tensor in tensors.items()}
        return replace(backbone, weights=Weights.of(MemoryTensors("memory", scaled)))

    backbone = tiny(vit(Shape()))
    right = Candidate(backbone, load_module(backbone), subject().describe)
    assert blocks_follow_the_map(right, silent)
    layers = mapped(backbone, with_("mlp", down_bias=None))
    with pytest.raises(NonconformityError, match=r"block 1, (attention|mlp): the map's formula is off by "):
        blocks_follow_the_map(replace(right, backbone=replace(backbone, layers=layers)), silent)


@pytest.mark.parametrize(("shape", "change"), SEEN_BY_BOTH.values(), ids=SEEN_BY_BOTH)
def test_so_does_the_linearization(shape: Shape, change: Change, subject: Make, mapped: Mapped) -> None:
    wrong = subject(shape, layers=mapped(vit(shape), change))
    with pytest.raises(NonconformityError, match=r"block 1, (attention|mlp): autograd's mean Jacobian is .*% off"):
        linearization_agrees(wrong, silent)


@pytest.mark.parametrize("check", [blocks_follow_the_map, linearization_agrees])
def test_the_module_is_as_it_was_afterwards(check: Callable[..., str], subject: Make) -> None:
    right = subject(Shape(beside=True, inner=True))
    before = {name: tensor.clone() for name, tensor in right.module.state_dict().items()}
    check(right, silent)
    assert all(torch.equal(tensor, before[name]) for name, tensor in right.module.state_dict().items())


def test_even_where_a_block_raises(subject: Make) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no")

    right = subject()
    before = {name: tensor.clone() for name, tensor in right.module.state_dict().items()}
    with pytest.raises(ValueError, match="no"):
        blocks_follow_the_map(replace(right, backbone=replace(right.backbone, run_block=broken)), silent)
    assert all(torch.equal(tensor, before[name]) for name, tensor in right.module.state_dict().items())
