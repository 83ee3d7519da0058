"""Clamped singular values against a full SVD, and what else of a backbone changes: nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sinder_cli import ModelRequest, api
from sinder_cli.analysis.clamp import clamped, largest_part, with_clamped_rows
from sinder_cli.analysis.tokens import Subject
from sinder_cli.backbone.contract import Backbone, WeightRef, linear_references, references
from sinder_cli.backbone.opening import load_module
from sinder_cli.backbone.weights import rows_of
from sinder_cli.events import silent

SHAPES = {"wide": (12, 30), "tall": (30, 12), "square": (16, 16), "a row": (1, 9), "a column": (9, 1)}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_svd(weight: Tensor, k: int) -> Tensor:
    """The K-th is counted from 1; where there is no K-th, nothing is clamped."""
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    S = S.clamp(max=S[k - 1]) if k <= len(S) else S
    return ((U * S) @ Vh).to(weight.dtype)


@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
@pytest.mark.parametrize("k", [1, 2, 5, 12, 13, 100])
def test_the_largest_singular_values_come_down_to_the_kth(shape: tuple[int, int], k: int) -> None:
    weight = drawn(*shape)
    found = largest_part(weight, k).taken_from(weight)
    torch.testing.assert_close(found, by_svd(weight, k), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
def test_the_first_clamps_nothing(shape: tuple[int, int]) -> None:
    weight = drawn(*shape)
    part = largest_part(weight, 1)
    assert part.U.shape == (shape[0], 0)
    assert torch.equal(part.taken_from(weight), weight)


def test_more_than_there_are_clamps_nothing() -> None:
    weight = drawn(12, 30)
    assert torch.equal(largest_part(weight, 13).taken_from(weight), weight)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
@pytest.mark.parametrize("k", [2, 3, 4, 7, 12])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_weight_below_full_rank_is_clamped_as_any(shape: tuple[int, int], k: int, rank: int) -> None:
    for seed in range(20):  # the rounding of W Wᵀ is now and then mistaken for a direction, which would blow up
        left, right = drawn(shape[0], rank, seed=seed), drawn(rank, shape[1], seed=seed + 100)
        weight = (4 * left).round() @ (4 * right).round() / 16  # whole numbers: of that rank exactly
        found = largest_part(weight, k).taken_from(weight)
        torch.testing.assert_close(found, by_svd(weight, k), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
@pytest.mark.parametrize("k", [1, 4, 12, 50])
def test_a_weight_of_zeros_stays_zero(shape: tuple[int, int], k: int) -> None:
    assert torch.equal(largest_part(torch.zeros(shape), k).taken_from(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_equal_singular_values_above_the_kth_come_down_together(shape: tuple[int, int]) -> None:
    U, _, Vh = torch.linalg.svd(drawn(*shape), full_matrices=False)
    weight = (U * torch.tensor([5.0, 5.0, 5.0, 2.0, *[1.0] * 8])) @ Vh
    for k in (2, 3, 4, 5):
        torch.testing.assert_close(largest_part(weight, k).taken_from(weight), by_svd(weight, k), atol=1e-5, rtol=0)


def test_a_huge_singular_value_leaves_the_small_ones_alone() -> None:
    U, _, Vh = torch.linalg.svd(drawn(20, 20), full_matrices=False)
    S = torch.tensor([3e4, *torch.linspace(2, 1, 19).tolist()])
    weight = (U * S) @ Vh
    found = torch.linalg.svdvals(largest_part(weight, 3).taken_from(weight).double())
    torch.testing.assert_close(found, S.clamp(max=S[2].item()).double(), atol=0.02, rtol=0)  # float32 holds no more


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_precision_of_the_weight_is_kept(dtype: torch.dtype) -> None:
    weight = drawn(12, 30).to(dtype)
    found = largest_part(weight, 3).taken_from(weight)
    assert found.dtype == dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(found.double(), by_svd(weight.double(), 3), atol=8 * eps, rtol=8 * eps)


def parts_of(backbone: Backbone) -> dict[str, Tensor]:
    """Every linear layer of the blocks, each part of a fused projection by itself."""
    refs = [ref for block in backbone.layers.blocks for ref in linear_references(block)]
    stored = backbone.weights.read({ref.name for ref in refs})
    return {str(ref): rows_of(stored[ref.name], ref) for ref in refs}


def by_name(backbone: Backbone) -> dict[str, Tensor]:
    return backbone.weights.read(backbone.weights.names)


@pytest.mark.parametrize("kind", ["small", "gated"])
def test_every_linear_layer_of_every_block_is_clamped_by_itself(kind: str, checkpoint: Callable[..., Path]) -> None:
    backbone = api.open_model(ModelRequest("dinov2_custom", checkpoint(kind)))
    before, after = parts_of(backbone), parts_of(clamped(backbone, 4, silent))
    assert len(after) == backbone.depth * (7 if kind == "gated" else 6)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], by_svd(weight, 4), atol=1e-5, rtol=0, msg=name)
        S = torch.linalg.svdvals(after[name])
        torch.testing.assert_close(S[:4], torch.linalg.svdvals(weight)[3].expand(4), msg=name)


def test_all_other_tensors_are_untouched_and_so_is_the_file(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("small")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    backbone = api.open_model(ModelRequest("dinov2_custom", path))
    lowered = clamped(backbone, 4, silent)
    linear = {ref.name for block in backbone.layers.blocks for ref in linear_references(block)}
    original, found = by_name(backbone), by_name(lowered)
    assert {name for name in original if not torch.equal(original[name], found[name])} == linear
    others = {name: stored for name, stored in lowered.weights.stored_names.items() if name not in linear}
    prints = [replace(each.weights, stored_names=others).fingerprint() for each in (backbone, lowered)]
    assert prints[0] == prints[1]
    assert lowered.weights.fingerprint() != backbone.weights.fingerprint()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_reading_twice_clamps_once(checkpoint: Callable[..., Path]) -> None:
    lowered = clamped(api.open_model(ModelRequest("dinov2_custom", checkpoint("small"))), 4, silent)
    first, second = by_name(lowered), by_name(lowered)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert lowered.weights.source.infos == clamped(lowered, 4, silent).weights.source.source.infos  # type: ignore[attr-defined]


def test_the_tensors_of_the_source_are_not_written_into() -> None:
    weight = drawn(12, 30)
    found = with_clamped_rows([(WeightRef(name="w", rows=(0, 6)), largest_part(weight[:6], 2))], weight)
    assert torch.equal(weight, drawn(12, 30))
    assert not torch.equal(found[:6], weight[:6])
    assert torch.equal(found[6:], weight[6:])


def test_biases_norms_and_scales_are_no_linear_layers(demo: Subject) -> None:
    for block in demo.backbone.layers.blocks:
        roles = dict(references(block))
        names = set(linear_references(block))
        assert {role for role, ref in roles.items() if ref in names} == {
            "attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down"
        }  # fmt: skip


def test_the_label_says_what_was_done(demo: Subject) -> None:
    source = clamped(demo.backbone, 7, silent).weights.source
    assert source.label == f"{demo.backbone.weights.source.label}, singular values clamped at K = 7"


def test_the_clamped_demo_has_the_clamped_singular_values(demo: Subject) -> None:
    lowered = clamped(demo.backbone, 10, silent)
    module = load_module(lowered)
    loaded = dict(module.named_parameters())
    before = parts_of(demo.backbone)
    for block in demo.backbone.layers.blocks:
        for ref in linear_references(block):
            S = torch.linalg.svdvals(before[str(ref)].double())
            found = torch.linalg.svdvals(rows_of(loaded[ref.name], ref).double())
            torch.testing.assert_close(found, S.clamp(max=S[9].item()), atol=1e-4, rtol=1e-5, msg=str(ref))
    planted = torch.linalg.svdvals(before["blocks.5.down.weight"])
    assert planted[0] > 20 * planted[9]  # what clamping is for
