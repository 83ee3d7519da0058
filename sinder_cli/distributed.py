"""The processes that share a run, as `torchrun` starts them: who is which, what they tell each other, who is lost.

Started alone, nothing of this is imported or started.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from sinder_cli.errors import ConflictError, TryAgainError
from sinder_cli.memory import is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor


T = TypeVar("T")

TO_JOIN = timedelta(minutes=10)  # until all processes are there
TO_MEET = timedelta(days=1)  # in a collective: rank 0 may have much to write, and who is lost shows by the heartbeat
TO_ANSWER = timedelta(seconds=10)  # for the store, once all have joined
BEAT_SECONDS = 2.0
MISSED_BEATS = 10  # until a rank counts as lost: 20 s, for a promise of 30

LOST = ("a process of this run was lost", "it has died or cannot be reached", "a repair goes on with --resume")


class LostRankError(TryAgainError):
    """Another process of this run has died, or cannot be reached."""


@dataclass(frozen=True)
class Ranks:
    """This process among `size` of them; rank 0 is the one that writes and prints.

    All ranks call each method alike. Raises `LostRankError` where one of them is gone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_size: int = 1

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part: every `size`-th."""
        return items[self.rank :: self.size]

    def all_gather(self, value: T) -> list[T]:
        """The small picklable values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        with _all_present():
            distributed.all_gather_object(values, value)
        return values

    def gather(self, value: T) -> list[T]:
        """The picklable values of all ranks, on rank 0; nothing elsewhere."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size if self.writes else []
        with _all_present():
            distributed.gather_object(value, values or None)
        return values

    def from_rank0(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank; picklable."""
        if self.size == 1:
            return make()
        from torch import distributed

        made: list[Any] = [make() if self.writes else None]
        with _all_present():
            distributed.broadcast_object_list(made)
        return made[0]

    def machine_first(self, make: Callable[[], T]) -> T:
        """What each process makes, one on each machine before the others: they find what it has downloaded."""
        made = make() if self.local_rank == 0 else None
        self.all_gather(None)
        return make() if made is None else made

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            from torch import distributed

            with _all_present():
                distributed.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The values of one rank on every rank, in place."""
        if self.size > 1:
            from torch import distributed

            with _all_present():
                distributed.broadcast(tensor, source)
        return tensor


ALONE = Ranks()


def require_alike(facts: Mapping[str, Any], ranks: Ranks) -> None:
    """Raises `ConflictError` naming the first of the facts that is not the same on all ranks."""
    for rank, other in enumerate(ranks.all_gather(facts)):
        for name, fact in facts.items():
            if other[name] != fact:
                what, why = "the processes cannot share a run", f"{name} differs between rank {ranks.rank} and {rank}"
                raise ConflictError(what, why, "give all of them the same files and versions")


def launched() -> Ranks:
    """What `torchrun` says in the environment; alone without it."""
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
    """The processes of this run as one group, for as long as this lasts: NCCL between CUDA devices, else gloo.

    `abandon` is called from another thread when a rank has not been heard of for 20 seconds: whatever this process
    waits for may never come, and it must end. Raises `LostRankError` when the group cannot be made.
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
        distributed.barrier()  # by now each has beaten once
    heartbeat.start()
    try:
        yield ranks
        heartbeat.leave()
    except BaseException:
        tells(ranks)  # before the others see that this one is gone
        raise
    finally:
        distributed.destroy_process_group()
        heartbeat.ended.set()


def tells(ranks: Ranks) -> bool:
    """Whether it is this process that tells what went wrong: the first of all that asks, so that it is told once."""
    if ranks.size == 1:
        return True
    try:
        told_by = _store(ranks, TO_ANSWER).compare_set("sinder.told_by", "", str(ranks.rank))
    except RuntimeError:  # nobody there to ask
        return True
    return bool(told_by == str(ranks.rank).encode())


@contextmanager
def _all_present() -> Iterator[None]:
    """Failures of communication mean that a process is gone."""
    try:
        yield
    except RuntimeError as error:  # of every kind, by backend and by what exactly went wrong
        if is_out_of_memory(error):
            raise
        raise LostRankError(*LOST) from error


def _store(ranks: Ranks, timeout: timedelta) -> Any:
    """A connection of its own to the store that all processes share; kept by torchrun, else by rank 0."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", ranks.rank, ranks.size, timeout=timeout))
    return store


class _Heartbeat(Thread):
    """Counts upwards in the store every two seconds, and watches that the others do.

    Missed beats are counted in beats of its own, so that a pause of all processes together is none.
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
        except RuntimeError as error:  # the store is gone, and whoever kept it
            self._give_up(error)

    def leave(self) -> None:
        """From now on nobody need hear of this process."""
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
