"""The inpainted original: a loop over tokens and blocks agrees with it, and on the demo it is near the clean twin."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from slow_inpainting import slow_pass
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sinder_cli import Backbone, ModelRequest, api
from sinder_cli.backbone.opening import load_module
from sinder_cli.defects import inpainting
from sinder_cli.defects.detection import norm_ratios, outlying
from sinder_cli.defects.inpainting import inpainted
from sinder_cli.defects.tokens import in_precision, last_tokens, patch_grid, residual_stream

N, PATCH, PREFIX, DEPTH = 12, 2, 2, 4
H, W = 6, 8
MODULE: Any = None
CONTEXT = "the context"
Spots = dict[int, list[tuple[int, int]]]  # block → places where a token becomes outlying
CORNERS = [(0, 0), (0, 7), (5, 0), (5, 7)]
SPOTS: dict[str, Spots] = {
    "one inner token": {1: [(2, 3)]},
    "tokens of the border": {1: [(0, 3), (5, 5), (2, 0), (3, 7)]},
    "corners": {0: CORNERS},
    "a cluster, filled inwards": {1: [(r, c) for r in range(1, 4) for c in range(2, 7)]},
    "a cluster in a corner": {2: [(r, c) for r in range(4) for c in range(4)]},
    "a whole row and the last block": {3: [(2, c) for c in range(8)]},
    "the same and others in two blocks": {0: [(1, 1)], 2: [(1, 1), (1, 2), (4, 4)]},
    "none": {},
}


def tiny(spots: Spots, size: float = 200.0) -> Backbone:
    """Four blocks in which tokens mix, cls and a register among them, and some become outlying where one wants."""
    generator = torch.Generator().manual_seed(0)
    project = torch.randn(N, 3 * PATCH * PATCH, generator=generator)
    prefix = 5 * torch.randn(PREFIX, N, generator=generator)
    inner = torch.randn(DEPTH, N, N, generator=generator) / N**0.5
    mixing = torch.randn(DEPTH, PREFIX + H * W, PREFIX + H * W, generator=generator).softmax(dim=-1)
    direction = torch.randn(N, generator=generator)

    def embed(_module: Any, images: Tensor) -> tuple[Tensor, str]:
        patches = torch.nn.functional.unfold(images, PATCH, stride=PATCH)  # [B, 3·P·P, patches]
        tokens = (project @ patches).transpose(1, 2)
        return torch.cat([prefix.expand(len(images), -1, -1), tokens], dim=1), CONTEXT

    def run_block(_module: Any, index: int, tokens: Tensor, context: str) -> Tensor:
        assert context == CONTEXT
        tokens = tokens + (0.3 * mixing[index] @ tokens @ inner[index].T).tanh()
        for row, column in spots.get(index, []):
            tokens[:, PREFIX + row * W + column] += size * direction.to(tokens.dtype)
        return tokens

    return Backbone(
        name="tiny",
        layers=SimpleNamespace(width=N, blocks=(None,) * DEPTH),  # type: ignore[arg-type]
        weights=SimpleNamespace(),  # type: ignore[arg-type]
        patch_size=PATCH,
        prefix_tokens=PREFIX,
        has_cls=True,
        image_size=W * PATCH,
        build=torch.nn.Identity,
        embed=embed,
        run_block=run_block,
        finish=lambda _, tokens: tokens,
    )


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, H * PATCH, W * PATCH, generator=torch.Generator().manual_seed(5))


def run(backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
    return backbone.run_block(MODULE, block, tokens, CONTEXT)


@pytest.mark.parametrize("spots", SPOTS.values(), ids=SPOTS)
def test_the_pass_is_that_of_loops_over_tokens_and_blocks(spots: Spots) -> None:
    backbone, batch = tiny(spots), images()
    seen: list[Tensor] = []

    def see(block: int, marked: Tensor) -> None:
        assert block == len(seen)
        seen.append(marked)

    found = list(residual_stream(inpainted(backbone, seen=see), MODULE, batch))
    for image in range(len(batch)):
        embedded, _ = backbone.embed(MODULE, batch[image : image + 1])
        blocks = [partial(run, backbone, block) for block in range(DEPTH)]
        expected, marks = slow_pass(embedded, blocks, PREFIX, (H, W), 3.0)
        for block in range(DEPTH):
            torch.testing.assert_close(found[block][image], expected[block][0], rtol=1e-4, atol=1e-4)
            assert set(seen[block][image].flatten().nonzero()[:, 0].tolist()) == marks[block]
            assert marks[block] == {row * W + column for row, column in spots.get(block, [])}


def test_a_pass_without_outlying_tokens_has_the_originals_bits() -> None:
    backbone = tiny({})
    for one, other in zip(
        residual_stream(backbone, MODULE, images()), residual_stream(inpainted(backbone), MODULE, images()), strict=True
    ):
        assert torch.equal(one, other)


def test_an_image_without_them_is_left_alone_beside_others() -> None:
    backbone, batch = tiny({1: [(2, 3)]}, size=20.0), images(3)
    batch[1] *= 200  # a spike of 20 is nothing there
    marks: list[Tensor] = []
    found = last_tokens(inpainted(backbone, seen=lambda _, marked: marks.append(marked)), MODULE, batch)
    assert [int(marks[1][image].sum()) for image in range(3)] == [1, 0, 1]
    original = last_tokens(backbone, MODULE, batch)
    assert torch.equal(found[1], original[1])
    assert not torch.equal(found[0], original[0])


def test_cls_and_registers_are_not_replaced_but_hear_of_it() -> None:
    backbone = tiny({1: [(2, 3)]})
    before, after = (
        list(residual_stream(each, MODULE, images()))
        for each in (backbone, inpainted(backbone))
    )  # fmt: skip
    assert torch.equal(before[1][:, :PREFIX], after[1][:, :PREFIX])
    assert not torch.equal(before[2][:, :PREFIX], after[2][:, :PREFIX])


def test_a_fully_marked_image_keeps_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny({})
    monkeypatch.setattr(inpainting, "outlying", lambda ratios, *_: torch.ones_like(ratios, dtype=torch.bool))
    assert torch.equal(last_tokens(inpainted(backbone), MODULE, images()), last_tokens(backbone, MODULE, images()))


def test_what_stands_out_from_the_embedding_on_is_no_outlier() -> None:
    batch = images()
    batch[:, :, :PATCH, :PATCH] *= 30  # the first patch has much contrast
    backbone = tiny({})
    start = norm_ratios(patch_grid(backbone, backbone.embed(MODULE, batch)[0], batch).norm(dim=-1))
    assert bool((start[:, 0, 0] > 3).all())
    assert torch.equal(last_tokens(inpainted(backbone), MODULE, batch), last_tokens(backbone, MODULE, batch))


def test_the_factor_says_what_is_outlying() -> None:
    backbone = tiny({1: [(2, 3)]}, size=20.0)
    found = {factor: last_tokens(inpainted(backbone, factor), MODULE, images()) for factor in (0.0, 3.0, 1000.0)}
    assert torch.equal(found[0.0], found[3.0])
    assert torch.equal(found[1000.0], last_tokens(backbone, MODULE, images()))
    assert not torch.equal(found[3.0], found[1000.0])


def test_a_factor_of_0_is_the_default_and_replaces_no_more() -> None:
    backbone = tiny({1: [(2, 3)]}, size=5.0)  # it rises, and is not outlying
    embedded, risen = (
        norm_ratios(patch_grid(backbone, tokens, images()).norm(dim=-1))[:, 2, 3]
        for tokens in (backbone.embed(MODULE, images())[0], list(residual_stream(backbone, MODULE, images()))[1])
    )
    assert bool(((risen > 1.6 * embedded) & (risen < 2.9)).any())
    assert torch.equal(last_tokens(inpainted(backbone, 0.0), MODULE, images()), last_tokens(backbone, MODULE, images()))


def test_a_block_keeps_the_tokens_that_it_gave() -> None:
    backbone, given = tiny({1: [(2, 3)]}), []

    def run_block(module: Any, index: int, tokens: Tensor, context: str) -> Tensor:
        leaving = backbone.run_block(module, index, tokens, context)
        given.append((leaving, leaving.clone()))
        return leaving

    last_tokens(inpainted(replace(backbone, run_block=run_block)), MODULE, images())
    assert len(given) == DEPTH
    assert all(torch.equal(leaving, copy) for leaving, copy in given)


def test_a_forward_pass_of_the_whole_original_is_not_taken_over() -> None:
    assert inpainted(replace(tiny({}), forward=lambda _module, images: images)).forward is None


def test_an_infinite_token_is_replaced_and_spoils_no_other() -> None:
    found = last_tokens(inpainted(tiny({1: [(2, 3)]}, size=torch.inf)), MODULE, images())
    assert bool(found.isfinite().all())


def test_tokens_keep_their_dtype() -> None:
    backbone = in_precision(tiny({1: [(2, 3)]}), "bfloat16")
    embedded, context = backbone.embed(MODULE, images())
    tokens = inpainted(backbone).run_block(
        MODULE, 1, embedded.bfloat16(), inpainted(backbone).embed(MODULE, images())[1]
    )
    assert tokens.dtype == backbone.run_block(MODULE, 1, embedded.bfloat16(), context).dtype


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    backbone = api.open_model(ModelRequest("demo_vit"))
    source, preprocess = api.drawn_images(backbone, 0), api.preprocessing(backbone, None)
    return torch.stack([preprocess(source.load(index)) for index in range(4)])


def test_the_demo_comes_nearer_to_its_clean_twin_without_outliers(pictures: Tensor) -> None:
    demo, clean = (api.open_model(ModelRequest(name)) for name in ("demo_vit", "demo_vit_clean"))
    module = load_module(demo)
    twin = last_tokens(clean, load_module(clean), pictures)
    original, better = (last_tokens(each, module, pictures) for each in (demo, inpainted(demo)))
    near, nearer = (cosine_similarity(tokens, twin, dim=-1) for tokens in (original, better))  # [B, T]
    assert bool((nearer[:, 0] > near[:, 0]).all())
    assert nearer[:, 0].min() > 0.9999
    assert nearer[:, 1:].mean() > near[:, 1:].mean() + 0.01
    spoilt = near[:, 1:] < 0.5
    assert nearer[:, 1:][spoilt].mean() > near[:, 1:][spoilt].mean() + 0.3

    def outliers(tokens: Tensor) -> int:
        ratios = norm_ratios(patch_grid(demo, tokens, pictures).norm(dim=-1))
        return int(outlying(ratios, torch.zeros_like(ratios), 3.0).sum())

    assert outliers(original) >= 3 * len(pictures)
    assert outliers(better) == 0
