"""The attention of cls, watched from outside, against a softmax written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from sinder_cli.analysis.per_image import ClsAttention
from sinder_cli.analysis.tokens import Subject
from sinder_cli.defects.tokens import in_precision, residual_stream

B, HEADS, T, D = 2, 3, 7, 8


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return drawn(B, HEADS, T, D), drawn(B, HEADS, T, D, seed=1), drawn(B, HEADS, T, D, seed=2)


def looped(q: Tensor, k: Tensor, scale: float, mask: Any = None) -> Tensor:
    """softmax over keys of q₀·k/√d, one image and head at a time; `mask` gives what is added for a key."""
    rows = []
    for b in range(len(q)):
        for head in range(q.shape[1]):
            scores = [
                scale * sum(x * y for x, y in zip(q[b, head, 0].tolist(), key, strict=True))
                + (0.0 if mask is None else mask(b, head, at))
                for at, key in enumerate(k[b, head].tolist())
            ]
            powers = [math.exp(score) for score in scores]
            rows.append([power / sum(powers) for power in powers])
    return torch.tensor(rows).reshape(*q.shape[:2], -1)


def test_the_fused_kernel_gives_the_softmax_of_the_first_query() -> None:
    q, k, v = qkv()
    with ClsAttention() as watched:
        result = scaled_dot_product_attention(q, k, v)
    assert torch.equal(result, scaled_dot_product_attention(q, k, v))
    assert watched.weights is not None
    torch.testing.assert_close(watched.weights, looped(q, k, D**-0.5))
    torch.testing.assert_close(torch.einsum("bht,bhtd->bhd", watched.weights, v), result[:, :, 0])


def test_a_given_scale_is_used() -> None:
    q, k, v = qkv()
    with ClsAttention() as watched:
        scaled_dot_product_attention(q, k, v, scale=0.9)
    torch.testing.assert_close(watched.weights, looped(q, k, 0.9))


@pytest.mark.parametrize("shape", [(T, T), (B, 1, T, T), (B, HEADS, T, T), (B, 1, 1, T)])
def test_a_mask_of_numbers_is_added(shape: tuple[int, ...]) -> None:
    q, k, v = qkv()
    mask = drawn(*shape, seed=5)
    with ClsAttention() as watched:
        result = scaled_dot_product_attention(q, k, v, mask)
    whole = mask.expand(B, HEADS, T, T)
    torch.testing.assert_close(watched.weights, looped(q, k, D**-0.5, lambda b, h, at: whole[b, h, 0, at].item()))
    torch.testing.assert_close(torch.einsum("bht,bhtd->bhd", watched.weights, v), result[:, :, 0])


def test_a_mask_of_truths_leaves_keys_out() -> None:
    q, k, v = qkv()
    mask = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(3)) > 0.4
    with ClsAttention() as watched:
        result = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    expected = looped(q, k, D**-0.5, lambda b, _, at: 0.0 if mask[b, 0, 0, at] else -math.inf)
    assert watched.weights is not None
    torch.testing.assert_close(watched.weights, expected)
    assert bool(watched.weights[~mask[:, :, 0].expand(B, HEADS, T)].eq(0).all())
    torch.testing.assert_close(torch.einsum("bht,bhtd->bhd", watched.weights, v), result[:, :, 0])


def test_heads_that_share_a_key_are_seen() -> None:
    q, k, v = drawn(B, 4, T, D), drawn(B, 2, T, D, seed=1), drawn(B, 2, T, D, seed=2)
    with ClsAttention() as watched:
        result = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    shared = [part[:, [0, 0, 1, 1]] for part in (k, v)]
    assert watched.weights is not None
    torch.testing.assert_close(watched.weights, looped(q, shared[0], D**-0.5))
    torch.testing.assert_close(torch.einsum("bht,bhtd->bhd", watched.weights, shared[1]), result[:, :, 0])


@pytest.mark.parametrize(
    "softmax",
    [lambda x: x.softmax(dim=-1), lambda x: torch.softmax(x, -1), lambda x: functional.softmax(x, dim=-1)],
    ids=["method", "torch", "functional"],
)
def test_of_an_eager_softmax_it_is_the_first_row(softmax: Callable[[Tensor], Tensor]) -> None:
    q, k, v = qkv()
    with ClsAttention() as watched:
        softmax(q @ k.transpose(-2, -1) * D**-0.5) @ v
    torch.testing.assert_close(watched.weights, looped(q, k, D**-0.5))


def test_the_last_call_is_kept() -> None:
    q, k, v = qkv()
    with ClsAttention() as watched:
        scaled_dot_product_attention(k, q, v)
        scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(watched.weights, looped(q, k, D**-0.5))


def test_calls_of_other_shapes_are_no_attention_of_heads() -> None:
    q, k, v = (part.flatten(0, 1) for part in qkv())
    with ClsAttention() as watched:
        scaled_dot_product_attention(q, k, v)
        torch.softmax(q, dim=-1)
        torch.softmax(q[0, 0], dim=0)
    assert watched.weights is None


def test_nothing_is_seen_of_an_unknown_kernel() -> None:
    q, k, v = qkv()
    with ClsAttention() as watched:
        scores = (q @ k.transpose(-2, -1) * D**-0.5).exp()
        (scores / scores.sum(dim=-1, keepdim=True)) @ v
    assert watched.weights is None


def test_nothing_is_seen_before_or_after() -> None:
    q, k, v = qkv()
    watched = ClsAttention()
    scaled_dot_product_attention(q, k, v)
    with watched:
        pass
    scaled_dot_product_attention(q, k, v)
    assert watched.weights is None


def test_weights_are_float32_and_carry_no_gradient_whatever_runs() -> None:
    q, k, v = (part.bfloat16().requires_grad_(True) for part in qkv())
    with ClsAttention() as watched:
        scaled_dot_product_attention(q, k, v)
    assert watched.weights is not None
    assert watched.weights.dtype == torch.float32
    assert not watched.weights.requires_grad
    torch.testing.assert_close(watched.weights, looped(q.detach().float(), k.detach().float(), D**-0.5))


@torch.no_grad()
def by_hand(subject: Subject, images: Tensor, heads: int) -> Tensor:
    """The row of cls of softmax(QKᵀ/√d) in the last block, `[B, heads, T]`, from a hook on its fused projection."""
    block = subject.module.blocks[-1]
    projection = block.qkv if hasattr(block, "qkv") else block.attn.qkv
    seen: list[Tensor] = []
    handle = projection.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    *_, _last = residual_stream(subject.backbone, subject.module, images)
    handle.remove()
    q, k, _ = seen[-1].chunk(3, dim=-1)
    width = q.shape[-1] // heads
    rows = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        rows.append(torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width), dim=-1)[:, 0])
    return torch.stack(rows, dim=1)


@torch.no_grad()
def watched_in(subject: Subject, images: Tensor, dtype: str = "float32") -> Tensor | None:
    with ClsAttention() as watched:
        *_, _last = residual_stream(in_precision(subject.backbone, dtype), subject.module, images)
    return watched.weights


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize(("name", "heads"), [("demo_vit", 3), ("dinov2_custom", 2)])
def test_in_a_backbone_it_is_that_of_the_last_block(
    name: str, heads: int, attention: str, opened: Callable[..., Subject], checkpoint: Callable[..., Path]
) -> None:
    subject = opened(name, None if name == "demo_vit" else checkpoint("small"), attention=attention)
    images = drawn(2, 3, 84, 112)
    found = watched_in(subject, images)
    assert found is not None
    assert found.shape == (2, heads, subject.backbone.prefix_tokens + 6 * 8)
    torch.testing.assert_close(found, by_hand(subject, images, heads), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_under_autocast_it_stays_near(
    attention: str, opened: Callable[..., Subject], checkpoint: Callable[..., Path]
) -> None:
    subject = opened("dinov2_custom", checkpoint("small"), attention=attention)
    images = drawn(1, 3, 84, 84)
    exact, near = by_hand(subject, images, 2), watched_in(subject, images, "bfloat16")
    assert near is not None
    assert near.dtype == torch.float32
    torch.testing.assert_close(near.sum(dim=-1), torch.ones(1, 2), atol=0.02, rtol=0)
    assert torch.corrcoef(torch.stack([near.flatten(), exact.flatten()]))[0, 1] > 0.98
