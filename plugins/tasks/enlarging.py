"""Weighted sums over the channels of an enlarged map, without keeping the enlarged map: task `depth` learns from them.

A bilinear enlargement is a product with one matrix for the rows and one for the columns. The enlarged scores of all
channels are made some rows at a time, forward and again backward, so that they stay in the cache.
Shapes: h × w patches, H × W points, K channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

AT_A_TIME = {"cpu": 2**18}  # enlarged scores; on other devices, as many as
ELSEWHERE = 2**26


def enlarged_sums(scores: Tensor, weights: Tensor, factor: int) -> Tensor:
    """Return the sums `[H, W, m]` over the channels of relu(enlarged scores) × weights.

    `scores` `[h, w, K]` are enlarged `factor` times, bilinear, as `interpolate` does without aligned corners; `weights`
    `[K, m]` are constants.
    """
    rows, columns = (_matrix(length, factor).to(scores) for length in scores.shape[:2])
    found: Tensor = _EnlargedSums.apply(scores, weights, rows, columns)
    return found


def _matrix(length: int, factor: int) -> Tensor:
    """Return the matrix that enlarges a line of points, `[length · factor, length]`."""
    lines = torch.eye(length)[None, None]
    return interpolate(lines, size=(length * factor, length), mode="bilinear", align_corners=False)[0, 0]


class _EnlargedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        tall = (rows @ scores.flatten(1)).unflatten(1, scores.shape[1:])  # [H, w, K]
        ctx.save_for_backward(tall, weights, rows, columns)
        return torch.cat([(columns @ some).relu() @ weights for some in _split(tall, len(columns))])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        tall, weights, rows, columns = ctx.saved_tensors
        found = torch.empty_like(tall)
        at = 0
        for some in _split(tall, len(columns)):
            given = gradients[0][at : at + len(some)] @ weights.T
            given.masked_fill_(columns @ some <= 0, 0)
            found[at : at + len(some)] = columns.T @ given
            at += len(some)
        return (rows.T @ found.flatten(1)).unflatten(1, found.shape[1:]), None, None, None


def _split(tall: Tensor, width: int) -> tuple[Tensor, ...]:
    """Return some rows at a time of a map `[H, w, K]` that becomes `width` points wide."""
    most = AT_A_TIME.get(tall.device.type, ELSEWHERE)
    return tall.split(max(1, most // (width * tall.shape[2])))
