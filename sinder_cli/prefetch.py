"""Loading ahead of the computation, in one background thread, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def loaded_ahead(load: Callable[[Item], Loaded], items: Iterable[Item], ahead: int) -> Iterator[Loaded]:
    """Yield `load(item)` for each item in turn, loading at most `ahead` items in advance; items may be endless."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending: deque[Future[Loaded]] = deque()
        for item in items:
            pending.append(pool.submit(load, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
