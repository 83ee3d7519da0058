"""Which images of a source are taken, and in which order: a sample, an even spread, endless passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count as counting


def sampled(count: int, limit: int | None, seed: int) -> list[int]:
    """`limit` of `count` images, each at most once, by the seed alone and in the order of the source; else all."""
    if limit is None or limit >= count:
        return list(range(count))
    import numpy as np

    drawn: list[int] = np.random.default_rng(seed).choice(count, limit, replace=False).tolist()
    return sorted(drawn)


def spread(indices: Sequence[int], most: int) -> list[int]:
    """At most so many of the indices, evenly spread."""
    count = min(most, len(indices))
    return [indices[at * len(indices) // count] for at in range(count)]


def shuffled(count: int, seed: int, start: int = 0) -> Iterator[int]:
    """Endless passes over `count` images, each in an order of its own that depends on the seed and the pass alone.

    `start` images are left out at the beginning, without going through them.
    """
    import numpy as np

    first, offset = divmod(start, count)
    for number in counting(first):
        order: list[int] = np.random.default_rng([seed, number]).permutation(count).tolist()
        yield from order[offset:]
        offset = 0


def cycled(count: int, start: int = 0) -> Iterator[int]:
    """Endless passes over `count` images in their order, without the first `start` images."""
    for at in counting(start):
        yield at % count
