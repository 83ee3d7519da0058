"""The processes that share a run, as `torchrun` starts them: their ranks, their communication, and lost processes.

If a run has a single process, nothing of this is imported or started.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from sinder_cli.errors import ConflictError, TryAgainError
from sinder_cli.escaping import say
from sinder_cli.memory import is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor


T = TypeVar("T")

TO_JOIN = timedelta(minutes=10)  # for all processes to join
TO_MEET = timedelta(days=1)  # in a collective: rank 0 may have much to write, and the heartbeat finds lost ranks
TO_ANSWER = timedelta(seconds=10)  # for the store, once all have joined
BEAT_SECONDS = 2.0
MISSED_BEATS = 10  # until a rank counts as lost: 20 s, for a promise of 30

SECONDS_TO_TELL = 1.0  # for the process that tells; torchrun ends all others when the first has ended

LOST = ("a process of this run was lost", "it has died or cannot be reached", "continue a repair with --resume")


class LostRankError(TryAgainError):
    """Another process of this run has died, or cannot be reached."""


@dataclass(frozen=True)
class Ranks:
    """This process among `size` processes; rank 0 is the one that writes and prints.

    All ranks must make the same calls. Methods raise `LostRankError` if another rank is gone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_size: int = 1

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items of this rank: every `size`-th."""
        return items[self.rank :: self.size]

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, which must be small and picklable, in the order of ranks."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        with _all_present():
            distributed.all_gather_object(values, value)
        return values

    def gather(self, value: T) -> list[T]:
        """Return the picklable values of all ranks on rank 0, and an empty list on the others."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size if self.writes else []
        with _all_present():
            distributed.gather_object(value, values or None)
        return values

    def from_rank0(self, make: Callable[[], T]) -> T:
        """Return on every rank the picklable value that `make` returns on rank 0."""
        if self.size == 1:
            return make()
        from torch import distributed

        made: list[Any] = [make() if self.writes else None]
        with _all_present():
            distributed.broadcast_object_list(made)
        return made[0]

    def machine_first(self, make: Callable[[], T]) -> T:
        """Return the value of `make`; one process per machine calls it first, so that others find its downloads."""
        made = make() if self.local_rank == 0 else None
        self.all_gather(None)
        return make() if made is None else made

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            from torch import distributed

            with _all_present():
                distributed.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Copy the values of one rank to every rank, in place."""
        if self.size > 1:
            from torch import distributed

            with _all_present():
                distributed.broadcast(tensor, source)
        return tensor


ALONE = Ranks()


def require_alike(facts: Mapping[str, Any], ranks: Ranks) -> None:
    """Raise `ConflictError`, which names the first fact that differs, unless the facts are the same on all ranks."""
    for rank, other in enumerate(ranks.all_gather(facts)):
        for name, fact in facts.items():
            if other[name] != fact:
                what, why = "the processes cannot share a run", f"{name} differs between rank {ranks.rank} and {rank}"
                raise ConflictError(what, why, "give all of them the same files and versions")


def launched() -> Ranks:
    """Return the ranks that `torchrun` set in the environment; `ALONE` without it."""
    given = os.environ
    if int(given.get("WORLD_SIZE", "1")) == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= given.keys():
        return ALONE
    return Ranks(
        rank=int(given["RANK"]),
        size=int(given["WORLD_SIZE"]),
        local_rank=int(given.get("LOCAL_RANK", "0")),
        local_size=int(given.get("LOCAL_WORLD_SIZE", "1")),
    )


@contextmanager
def joined(abandon: Callable[[LostRankError], None]) -> Iterator[Ranks]:
    """Join the processes of this run to one group while the context lasts: NCCL between CUDA devices, else gloo.

    `abandon` is called from another thread when a rank has sent no heartbeat for 20 seconds: this process may wait for
    it forever, and must end. Raises `LostRankError` if the group cannot be made.
    """
    ranks = launched()
    if ranks.size == 1:
        yield ranks
        return
    import torch
    from torch import distributed

    cuda = torch.cuda.is_available() and distributed.is_nccl_available()
    with _all_present():
        store = _store(ranks, TO_JOIN)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=ranks.rank,
            world_size=ranks.size,
            timeout=TO_MEET,
        )
        heartbeat = _Heartbeat(ranks, store.clone(), abandon)
        distributed.barrier()  # by now each rank has sent one heartbeat
    heartbeat.start()
    try:
        yield ranks
        heartbeat.leave()
    except BaseException:
        tells(ranks)  # claims the report before the others see that this one is gone
        raise
    finally:
        distributed.destroy_process_group()
        heartbeat.ended.set()


def tells(ranks: Ranks) -> bool:
    """Return True if this process reports a failure: it is the first to ask, so that the failure is reported once."""
    if ranks.size == 1:
        return True
    try:
        answered_by = _store(ranks, TO_ANSWER).compare_set("sinder.answered_by", "", str(ranks.rank))
    except RuntimeError:  # the store is gone
        return True
    return bool(answered_by == str(ranks.rank).encode())


def tell(line: str) -> None:
    """Print on standard error why this process ends, unless another process of the run prints it."""
    if tells(launched()):
        say(line)
    else:
        time.sleep(SECONDS_TO_TELL)


@contextmanager
def _all_present() -> Iterator[None]:
    """Turn a failure of communication into `LostRankError`: it means that a process is gone."""
    try:
        yield
    except RuntimeError as error:  # its message depends on the backend and the failure
        if is_out_of_memory(error):
            raise
        raise LostRankError(*LOST) from error


def _store(ranks: Ranks, timeout: timedelta) -> Any:
    """Open a new connection to the store that all processes share; torchrun holds the store, else rank 0."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", ranks.rank, ranks.size, timeout=timeout))
    return store


class _Heartbeat(Thread):
    """Thread that counts upwards in the store every two seconds, and checks that the other ranks do so.

    Missed beats are counted in beats of this thread, so that a pause of all processes at once does not count.
    """

    def __init__(self, ranks: Ranks, store: Any, abandon: Callable[[LostRankError], None]) -> None:
        super().__init__(name="sinder-heartbeat", daemon=True)
        self.mine = f"sinder.beat.{ranks.rank}"
        self.others = [f"sinder.beat.{rank}" for rank in range(ranks.size) if rank != ranks.rank]
        self.store, self.abandon = store, abandon
        self.ended = Event()
        store.set_timeout(TO_ANSWER)
        store.set(self.mine, "0")

    def run(self) -> None:
        try:
            self._watch()
        except RuntimeError as error:  # the store is gone, and with it the process that held it
            self._give_up(error)

    def leave(self) -> None:
        """End the heartbeat: the others no longer expect one from this process."""
        self.ended.set()
        self.join()
        self.store.set(self.mine, "left")

    def _watch(self) -> None:
        beats = 0
        last: list[bytes] = [b""] * len(self.others)
        missed = [0] * len(self.others)
        while not self.ended.wait(BEAT_SECONDS):
            beats += 1
            self.store.set(self.mine, str(beats))
            heard = self.store.multi_get(self.others)
            still = [now == before != b"left" for now, before in zip(heard, last, strict=True)]
            missed = [count + 1 if same else 0 for count, same in zip(missed, still, strict=True)]
            last = heard
            if max(missed) >= MISSED_BEATS:
                self._give_up(None)

    def _give_up(self, cause: Exception | None) -> None:
        if not self.ended.is_set():
            error = LostRankError(*LOST)
            error.__cause__ = cause
            self.abandon(error)
