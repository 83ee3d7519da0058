"""Two ranks as threads of one process, which exchange copies as processes do: for what is too small for a fork."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

from torch import Tensor
from torch.backends import cuda, cudnn

from sinder_cli.distributed import Ranks

T = TypeVar("T")


def side_by_side(work: Callable[[Ranks], T]) -> list[T]:
    """What the work returns on each of two ranks."""
    barrier, sent = Barrier(2, timeout=60), [b"", b""]

    class Threaded(Ranks):
        def all_gather(self, value: Any) -> list[Any]:
            sent[self.rank] = pickle.dumps(value)
            barrier.wait()
            values = [pickle.loads(each) for each in sent]
            barrier.wait()
            return values

        def all_reduce(self, tensor: Tensor) -> Tensor:
            one, other = self.all_gather(tensor)
            return tensor.copy_(one + other)

        def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
            return tensor.copy_(self.all_gather(tensor)[source])

    def run(rank: int) -> T:
        try:
            return work(Threaded(rank, 2))
        except BaseException:
            barrier.abort()
            raise

    # Passes set switches of the whole process; two threads may put them back in the wrong order.
    switches = (cuda.matmul, cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, range(2)))
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
