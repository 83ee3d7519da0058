"""The attention of the cls token in a block of any backbone, watched while the block runs.

No plugin is asked for it: whatever computes attention calls PyTorch's fused kernel or a softmax over scores, and both
are seen from outside, with queries and keys as they are after rotary embeddings and norms.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from torch import Tensor

SOFTMAX = frozenset({torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax})


class ClsAttention(TorchFunctionMode):
    """Inside this context, keeps the attention weights of the first token, `[B, heads, T]`, of the last such call.

    `weights` stays None where attention is computed by a kernel that it does not know, such as xformers'.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is scaled_dot_product_attention:
            self._keep(_first_row(*args, **kwargs))
        elif func in SOFTMAX and isinstance(result, torch.Tensor) and result.dim() == 4:
            self._keep(result[:, :, 0])
        return result

    def _keep(self, weights: Tensor) -> None:
        if weights.dim() == 3:
            self.weights = weights.detach().float()


def _first_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,  # noqa: ARG001  # the arguments of the fused kernel, by its names
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001
    is_causal: bool = False,  # noqa: ARG001
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q₀Kᵀ · scale + mask) of the first query: q and K `[B, heads, T, d]` → `[B, heads, T]`."""
    if enable_gqa:  # several heads of queries share a key
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = (query[..., :1, :].float() @ key.float().transpose(-2, -1))[..., 0, :]
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is not None:
        row = attn_mask[..., 0, :]
        scores = scores.masked_fill(~row, -math.inf) if row.dtype == torch.bool else scores + row
    return scores.softmax(dim=-1)
