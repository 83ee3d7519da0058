"""Work in other processes, ahead of its consumer and in order.

Each process has a pipe of its own and nothing is shared, so that if one side dies, the read on the other side ends at
once. With torch's DataLoader it does not: all workers write into one pipe, where half a message blocks the reader
forever, and the error is raised by a signal handler at any point of the main thread.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from sinder_cli.cores import usable_cores
from sinder_cli.errors import TryAgainError
from sinder_cli.prefetch import loaded_ahead

Item = TypeVar("Item")
Result = TypeVar("Result")
Serve = Callable[[Connection, Sequence[Connection]], None]  # run by a process with its end of a pipe, and our ends

MAX_DEFAULT = 4  # with more processes, decoding is seldom the bottleneck
MOST_SECONDS_TO_END = 5.0  # even a killed process stays if it waits for a file server
NICE = 5  # of the processes that decode: matrix products go first
END = "end"  # sent instead of an item: there are no more


def default_workers(sharing: int = 1) -> int:
    """Return one less than the number of cores per process that shares the machine, between 1 and 4."""
    return min(MAX_DEFAULT, max(1, usable_cores() // sharing - 1))


def worker_count(chosen: int | None, sharing: int = 1) -> int:
    """Return the chosen number of workers, or the default if `sharing` processes share the machine."""
    return default_workers(sharing) if chosen is None else chosen


def in_processes(work: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int) -> Iterator[Result]:
    """Yield `work(item)` for each item in turn; each process is at most `ahead` + 1 items ahead of the consumer.

    Items may be endless; `work`, the items and the results are pickled. An exception of `work` is raised here. Raises
    `TryAgainError` when a process dies or cannot be started. Closing the generator ends the processes.
    """
    with _started(partial(_serve, work, ahead), workers) as pipes:
        owing: deque[Connection] = deque()  # the pipes, in the order in which their answers are expected
        for item, pipe in zip(items, cycle(pipes), strict=False):
            _send(pipe, item)
            owing.append(pipe)
            if len(owing) > workers * (ahead + 1):  # `loaded_ahead` needs so many items before it answers
                yield _receive(owing.popleft())
        for pipe in pipes:
            _send(pipe, END)
        while owing:
            yield _receive(owing.popleft())


def _send(pipe: Connection, item: object) -> None:
    try:
        pipe.send(item)
    except OSError as error:
        raise _died() from error


def _receive(pipe: Connection) -> Any:
    try:
        result, error = pipe.recv()
    except (EOFError, OSError) as end:
        raise _died() from end
    if error is not None:
        raise error
    return result


def _died() -> TryAgainError:
    return TryAgainError("a process that decodes images died", "it was killed or has crashed", "lower --workers")


@contextmanager
def _started(serve: Serve, workers: int) -> Iterator[list[Connection]]:
    """Start `workers` processes and yield the pipes to them; end the processes at the end."""
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []

    def end() -> None:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.kill()

    atexit.register(end)  # before the exit handler of multiprocessing, which would wait for the processes it terminates
    try:
        for _ in range(workers):
            pipe, process = _start(serve, pipes)
            pipes.append(pipe)
            processes.append(process)
        yield pipes
    finally:
        atexit.unregister(end)
        end()
        for process in processes:
            process.join(MOST_SECONDS_TO_END)


def _start(serve: Serve, earlier: Sequence[Connection]) -> tuple[Connection, BaseProcess]:
    # fork: a child must not import the user's script or notebook again, as it does when it is spawned
    context: Any = get_context("fork" if sys.platform == "linux" else None)
    try:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, (ours, *earlier)), daemon=True, name="sinder-images")
        with theirs, _signals_held(), warnings.catch_warnings():
            # Python warns of a fork while threads run, whose locks may be held; these children use none of them
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
    except OSError as error:
        raise TryAgainError("cannot start a process that decodes images", str(error), "lower --workers") from error
    return ours, process


@contextmanager
def _signals_held() -> Iterator[None]:
    """Block SIGINT and SIGTERM, so that a child started meanwhile receives neither before it has set its handlers."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(work: Callable[[Item], Result], ahead: int, pipe: Connection, other_ends: Sequence[Connection]) -> None:
    """Answer each item that arrives, until the last one or until the other side is gone: the work of one process."""
    for end in other_ends:  # the parent's ends of all pipes so far: while they are open here, its death goes unnoticed
        end.close()
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, torchrun and systemd signal the whole group;
        signal.signal(number, signal.SIG_IGN)  # the parent handles it, and may need this process to finish its step
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    warnings.simplefilter("ignore")
    os.nice(NICE)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123  (libtiff writes straight to standard error)
        os.dup2(nowhere.fileno(), 2)
    with suppress(EOFError, OSError):  # the other side is gone
        for answer in loaded_ahead(partial(_answer, work), iter(pipe.recv, END), ahead):
            pipe.send(answer)


def _answer(work: Callable[[Item], Result], item: Item) -> tuple[Result | None, Exception | None]:
    try:
        return work(item), None
    except Exception as error:
        return None, error
