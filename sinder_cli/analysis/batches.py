"""The images of an analysis, in batches of one shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.distributed import ALONE, Ranks
from sinder_cli.events import Emit, tracked
from sinder_cli.images.loading import Changes, LoadedImage, load_in_order, readable, skip_all, spread
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.processes import worker_count
from sinder_cli.images.sources import ImageSource

if TYPE_CHECKING:
    from torch import Tensor

Key = TypeVar("Key")

WAITING_BATCHES = 4  # images that wait for others of their shape, in batches: memory that many shapes may take


@dataclass
class ImageBatches:
    """Images of a source, which can be gone through more than once; those that cannot be decoded are told once."""

    source: ImageSource
    preprocess: Preprocessing
    indices: Sequence[int]
    settings: AnalyzeSettings
    emit: Emit
    ranks: Ranks = ALONE
    skipped: dict[str, str] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)

    def share(self) -> Iterator[tuple[list[str], Tensor]]:
        """Named batches `[B, 3, H, W]` of the images that are this rank's, with progress."""
        mine = self.ranks.share(self.indices)
        loaded = tracked(self._loaded(mine), self.emit, "analyzing", len(mine), "images")
        return self._batched(loaded)

    @property
    def names(self) -> list[str]:
        """The names of all images of all ranks."""
        return [self.source.name(index) for index in self.indices]

    def gather(self) -> None:
        """Let rank 0 know, and tell, what the others could not decode, and how many images were changed."""
        skip_all(self.ranks.gather(self.skipped), self.skipped, self.emit)
        for other in self.ranks.gather(self.changes):
            self.changes.merge(other)
        if self.ranks.writes:
            self.changes.tell(self.emit, self.preprocess.max_tokens)

    def again(self, most: int | Literal["all"]) -> tuple[int, Iterator[tuple[list[str], Tensor]]]:
        """At most so many of the images that could be decoded, evenly spread: their number, and named batches."""
        there = [index for index in self.indices if self.source.name(index) not in self.skipped]
        chosen = spread(there, len(there) if most == "all" else most)
        return len(chosen), self._batched(self._loaded(chosen))

    def _loaded(self, indices: Sequence[int]) -> Iterator[LoadedImage]:
        return load_in_order(
            self.source, self.preprocess, indices, worker_count(self.settings.workers, self.ranks.local_size)
        )

    def _batched(self, loaded: Iterator[LoadedImage]) -> Iterator[tuple[list[str], Tensor]]:
        return equal_shapes(readable(loaded, self.skipped, self.emit, self.changes), self.settings.batch_size)


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
