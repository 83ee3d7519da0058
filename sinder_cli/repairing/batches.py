"""The images of each step; they depend only on the seed and the number of the step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING

import torch

from sinder_cli.distributed import ALONE, Ranks
from sinder_cli.errors import BadInputError
from sinder_cli.escaping import printable
from sinder_cli.events import Emit
from sinder_cli.images.loading import cycled, load_in_order, readable, require_some, shuffled
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.processes import worker_count
from sinder_cli.images.sources import CHANGED, ImageSource
from sinder_cli.repairing.settings import RepairSettings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The images of one step on one rank."""

    pixels: Tensor  # [b, 3, H, W]
    names: tuple[str, ...]
    places: tuple[int, ...]  # in the source


MOST_UNREADABLE = 0.01  # of all images


def step_batches(
    source: ImageSource,
    preprocess: Preprocessing,
    settings: RepairSettings,
    steps_done: int,
    unreadable: dict[str, str],
    emit: Emit,
    ranks: Ranks = ALONE,
) -> Iterator[Batch]:
    """Yield batches without end, beginning with the batch of step `steps_done` + 1.

    Step s takes the images `(s − 1)·B … s·B − 1` of endlessly repeated passes; a rank gets every `ranks.size`-th of
    them. Passes over all images are shuffled, passes over defective images keep their order. Images that cannot be
    decoded are named in a warning once, added to `unreadable`, and missing from their batch (b < B, even 0).
    """
    B = settings.batch_size
    done = steps_done * B
    order = shuffled(len(source), settings.seed, done) if settings.visit == "all" else cycled(len(source), done)
    mine = (index for at, index in zip(count(), order, strict=False) if at % B % ranks.size == ranks.rank)
    loaded = load_in_order(source, preprocess, mine, worker_count(settings.workers, ranks.local_size))
    empty = torch.zeros(0, 3, preprocess.size, preprocess.size)
    while True:
        share = list(islice(loaded, len(range(ranks.rank, B, ranks.size))))
        images = list(readable(share, unreadable, emit))
        pixels = torch.stack([image for _, image in images]) if images else empty
        places = {image.name: image.index for image in share}
        yield Batch(pixels, tuple(name for name, _ in images), tuple(places[name] for name, _ in images))


def forget_mended(source: ImageSource, preprocess: Preprocessing, unreadable: dict[str, str]) -> None:
    """Drop from `unreadable` what can be decoded now: the disk may have been missing when an earlier process tried.

    Names that no image has any more are dropped too: a renamed image is named in a warning when a step cannot read it.
    """
    names = set(map(source.name, range(len(source))))
    for name in unreadable.keys() - names:
        del unreadable[name]
    doubted = [index for index in range(len(source)) if source.name(index) in unreadable]
    for image in load_in_order(source, preprocess, doubted):
        if image.pixels is not None:
            del unreadable[image.name]


def require_readable(source: ImageSource, unreadable: dict[str, str], strict: bool) -> None:
    """Raise `BadInputError` if too many images cannot be decoded: more than 1 %, or any if `strict`.

    A single one is accepted whatever its share, unless an image has become unreadable since the run began.
    """
    require_some(len(source) - len(unreadable), len(unreadable))
    lost = [name for name, problem in unreadable.items() if problem.startswith(CHANGED)]
    most = 0 if strict else int(MOST_UNREADABLE * len(source))
    if len(unreadable) > (most if lost or strict else max(1, most)):
        named = printable(next(reversed(lost or list(unreadable))))
        why = f"{len(unreadable)} of {len(source)} cannot be read, among them {named}"
        raise BadInputError("too many images are missing or broken", why, "mend them, or leave them out of a new run")
