"""Batches of images of one shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from torch import Tensor

Key = TypeVar("Key")

WAITING_BATCHES = 4  # images that wait for others of their shape, in batches: memory that many shapes may take


def equal_shapes(images: Iterable[tuple[Key, Tensor]], size: int) -> Iterator[tuple[list[Key], Tensor]]:
    """Images `[3, H, W]` with their keys, in batches `[B ≤ size, 3, H, W]` of one shape each.

    A batch comes as soon as it is full; when too many images wait, the shape that most of them have goes first.
    The order depends on the images alone.
    """
    waiting: dict[torch.Size, list[tuple[Key, Tensor]]] = {}
    count = 0
    for key, image in images:
        group = waiting.setdefault(image.shape, [])
        group.append((key, image))
        count += 1
        if len(group) < size and count < WAITING_BATCHES * size:
            continue
        fullest = max(waiting, key=lambda shape: len(waiting[shape]))
        count -= len(waiting[fullest])
        yield _stacked(waiting.pop(fullest))
    for group in waiting.values():
        yield _stacked(group)


def _stacked(group: list[tuple[Key, Tensor]]) -> tuple[list[Key], Tensor]:
    return [key for key, _ in group], torch.stack([image for _, image in group])
