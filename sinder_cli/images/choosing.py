"""Which images of a source are taken: a sample by seed, and an even spread."""

from __future__ import annotations

from collections.abc import Sequence


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
