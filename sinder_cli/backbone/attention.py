"""Attention kernels that plugins may offer; all compute softmax(QKᵀ/√d) V."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from sinder_cli.errors import UnavailableError

if TYPE_CHECKING:
    from torch import Tensor

    AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]

AttentionName = Literal["auto", "sdpa", "xformers", "eager"]


def attention_kernel(name: AttentionName = "auto") -> AttentionKernel:
    """A function of q, k, v, each `[batch, heads, tokens, head width]`, that returns the same shape.

    `auto` is PyTorch's fused kernel. Raises `UnavailableError` if xformers is asked for and cannot run here.
    """
    if name == "xformers":
        return _xformers_kernel()
    if name == "eager":
        return _eager
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention


def require_attention(name: AttentionName, device: str) -> None:
    """Refuse a kernel that does not run on a resolved device. Raises `UnavailableError`."""
    attention_kernel(name)
    if name == "xformers" and not device.startswith("cuda"):
        raise _no_xformers(f"its kernels do not run on device {device!r}")


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.softmax(dim=-1) @ v


def _xformers_kernel() -> AttentionKernel:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from xformers.ops import memory_efficient_attention
    except Exception as error:  # a wheel built for another torch fails in many ways
        raise _no_xformers(f"{type(error).__name__}: {error}") from error
    import torch

    if not torch.cuda.is_available():
        raise _no_xformers("its kernels need a CUDA device")

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # xformers wants [batch, tokens, heads, head width]
        mixed: Tensor = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return mixed.transpose(1, 2)

    return kernel


def _no_xformers(why: str) -> UnavailableError:
    return UnavailableError("cannot use xformers attention", why, "use --attention sdpa")
