"""Which images of a source are taken, and in which order: a sample, an even spread, endless passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count as counting

from sinder_cli.errors import UsageError

HELD_OUT_SHARE = 0.25  # of all images, at most


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


@dataclass(frozen=True)
class Division:
    """Which images of a source a model is trained on, and which it is looked at on, by index."""

    training: Sequence[int]
    evaluation: Sequence[int]


def divided(count: int, most: int, held_out: bool) -> Division:
    """At most so many images to look at, evenly spread; held out, they are at most a quarter, and not trained on.

    Raises `UsageError` where there are too few to hold one out.
    """
    everything = range(count)
    if not held_out:
        return Division(everything, spread(everything, most))
    evaluation = spread(everything, min(most, int(count * HELD_OUT_SHARE)))
    if not evaluation:
        why = f"there are {count}, and at most a quarter is kept from training"
        raise UsageError("too few images to hold one out", why, "give four or more, or leave --eval-every out")
    return Division(sorted(set(everything) - set(evaluation)), evaluation)


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
