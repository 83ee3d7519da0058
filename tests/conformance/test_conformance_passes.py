"""Tokens and passes: what the engine relies on, and how each breach of it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawn_vit import N, Vit
from torch import Tensor
from torch.nn import functional

from sinder_cli.conformance import passes
from sinder_cli.conformance import passes as tokens
from sinder_cli.conformance.subject import Candidate, NonconformityError

Make = Callable[..., Candidate]


def forward_of(subject: Candidate) -> str:
    assert subject.backbone.forward is not None
    return passes.forward_agrees(subject, subject.backbone.forward)


CHECKS: dict[str, Callable[[Candidate], str]] = {
    "prefix": tokens.tokens_are_counted,
    "patches": tokens.patches_lie_row_by_row,
    "forward": forward_of,
    "batches": passes.images_are_apart,
    "inputs": passes.blocks_keep_their_input,
    "gradients": passes.gradients_arrive,
}


def embedding(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A plugin that does something to the tokens `[B, T, N]` of its module."""
    return {"embed": lambda module, images: (change(module.embed(images)), None)}


def block(change: Callable[[Vit, int, Tensor], Tensor]) -> dict[str, Any]:
    """A plugin that runs a block in some other way."""
    return {"run_block": lambda module, index, tokens, _: change(module, index, tokens)}


def columns_first(module: Vit, images: Tensor) -> tuple[Tensor, None]:
    x = module.embed(images)
    h, w = (side // 4 for side in images.shape[-2:])
    return torch.cat([x[:, :2], x[:, 2:].unflatten(1, (h, w)).transpose(1, 2).flatten(1, 2)], dim=1), None


def in_place(module: Vit, index: int, x: Tensor) -> Tensor:
    return x.add_(module.blocks[index](x) - x) if not x.requires_grad else module.blocks[index](x)


def without_gradients(module: Vit, index: int, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = module.blocks[index](x)
    return x + (y - x)


BREACHES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a prefix token too few": ("prefix", {"prefix_tokens": 1}, r"embed gives \[2, 37, 96\], not 1 prefix tokens"),
    "a cls token that is none": (
        "prefix",
        {"prefix_tokens": 0} | embedding(lambda x: x[:, 2:]),
        "it has a cls token, and no prefix token",
    ),
    "patches before the prefix": ("prefix", embedding(lambda x: x.roll(-2, dims=1)), "prefix token 0 depends on the"),
    "the prefix in the middle": ("patches", embedding(lambda x: x.roll(1, dims=1)), "pixels of patch 0, 0 move"),
    "columns first": ("patches", {"embed": columns_first}, "pixels of patch 1, 3 move patch token 16 most"),
    "tokens that know of all others": (
        "patches",
        embedding(lambda x: x + 0.01 * x[:, 2:].mean(dim=1, keepdim=True)),
        "move 37 tokens, even far ones",
    ),
    "another norm at the end": (
        "forward",
        {"finish": lambda _, x: functional.layer_norm(x, (N,), eps=1e-6)},
        "at 6 × 6 patches a relative error of",
    ),
    "a forward of cls alone": (
        "forward",
        {"forward": lambda module, images: module(images)[:, 0]},
        r"the blocks give \[1, 38, 96\] for \[1, 96\]",
    ),
    "an embedding that is right at one size": (
        "forward",
        {"forward": lambda module, images: module(images) * (1.01 if images.shape[-1] == 28 else 1.0)},
        "at 5 × 7 patches a relative error of 9.9e-03",
    ),
    "images that see each other": (
        "batches",
        block(lambda module, index, x: module.blocks[index](x) + 0.01 * x.mean(dim=0)),
        "a batch of 2 is not two batches of 1",
    ),
    "dropout": (
        "batches",
        block(lambda module, index, x: module.blocks[index](x) + 1e-6 * torch.randn_like(x)),
        "two passes over the same images differ",
    ),
    "a block that writes in place": ("inputs", block(in_place), "block 0 changes the tokens that it is given"),
    "a block that merges tokens": (
        "inputs",
        block(lambda module, index, x: module.blocks[index](x)[:, ::2]),
        r"block 0 returns \[1, 19, 96\] for \[1, 37, 96\]",
    ),
    "a block without gradients": (
        "gradients",
        block(without_gradients),
        "block 0, attention.value .* gets no gradient",
    ),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_right_plugin_passes(check: Callable[[Candidate], str], subject: Make) -> None:
    assert check(subject())


@pytest.mark.parametrize(("check", "wrong", "told"), BREACHES.values(), ids=BREACHES)
def test_a_breach_is_reported(check: str, wrong: dict[str, Any], told: str, subject: Make) -> None:
    with pytest.raises(NonconformityError, match=told):
        CHECKS[check](subject(**wrong))


def test_a_stem_that_mixes_neighbours_is_local_enough(subject: Make) -> None:
    def mixed(x: Tensor) -> Tensor:
        grid = x[:, 2:].unflatten(1, (5, 7)).permute(0, 3, 1, 2)
        mean = functional.avg_pool2d(grid, 3, 1, 1).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([x[:, :2], x[:, 2:] + mean], dim=1)

    assert tokens.patches_lie_row_by_row(subject(**embedding(mixed))) == "one patch moves 9 tokens"


def test_no_parameter_is_left_to_be_trained(subject: Make) -> None:
    looked_at = subject()
    passes.gradients_arrive(looked_at)
    assert not any(parameter.requires_grad for parameter in looked_at.module.parameters())
