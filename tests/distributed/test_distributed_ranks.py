"""Processes that share a run: what they tell each other, and how all end when one does."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from sinder_cli import distributed as module
from sinder_cli.distributed import ALONE, LostRankError, Ranks, launched, require_alike, tells
from sinder_cli.errors import BadInputError, ConflictError

ALONE_OF_TORCHRUN = {"WORLD_SIZE": "1", "RANK": "0"}


def test_without_torchrun_there_is_one_and_it_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == ALONE
    said = "from sinder_cli.distributed import joined; joined(print).__enter__(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", f"import sys; {said}"], check=True, env=os.environ | ALONE_OF_TORCHRUN)


def test_torchrun_says_who_is_who(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in (given | {"MASTER_ADDR": "node", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert launched() == Ranks(rank=5, size=8, local_rank=1, local_size=4)
    assert not launched().writes


def test_shares_are_apart_and_make_up_the_whole() -> None:
    shares = [Ranks(rank, 3).share(range(8)) for rank in range(3)]
    assert [list(share) for share in shares] == [[0, 3, 6], [1, 4, 7], [2, 5]]


def exchanged(ranks: Ranks) -> list[Any]:
    mine = torch.tensor([1.0, 10.0]) * (ranks.rank + 1)
    return [
        ranks.all_gather(ranks.rank),
        ranks.gather(f"of {ranks.rank}"),
        ranks.from_rank0(lambda: ranks.rank),
        ranks.machine_first(lambda: ranks.rank),
        ranks.all_reduce(mine.clone()).tolist(),
        ranks.broadcast(mine.clone()).tolist(),
    ]


def test_values_are_told_and_tensors_summed(forked: Any) -> None:
    first, second = forked(exchanged).answers()
    assert first == [[0, 1], ["of 0", "of 1"], 0, 0, [3.0, 30.0], [1.0, 10.0]]
    assert second == [[0, 1], [], 0, 1, [3.0, 30.0], [1.0, 10.0]]
    assert exchanged(ALONE) == [[0], ["of 0"], 0, 0, [1.0, 10.0], [1.0, 10.0]]


def test_ranks_that_differ_are_refused_by_what_differs(forked: Any) -> None:
    def work(ranks: Ranks) -> None:
        require_alike({"model": "same", "images": ranks.rank}, ranks)

    answers = forked(work).answers()
    assert all(isinstance(answer, ConflictError) for answer in answers)
    assert str(answers[0]).startswith("the processes cannot share a run: images differs between rank 0 and 1")


def test_an_error_on_one_rank_ends_the_other(forked: Any) -> None:
    def work(ranks: Ranks) -> Any:
        if ranks.rank == 1:
            try:
                raise BadInputError("broken", "as a test wants it")
            finally:
                os.environ["TELLS"] = str(tells(ranks))
        try:
            ranks.all_gather(None)
        except LostRankError:
            return tells(ranks)

    told, error = forked(work).answers()
    assert told is False
    assert isinstance(error, BadInputError)


def test_a_killed_rank_is_lost_to_the_other_at_once(forked: Any) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.all_gather(None)

    began = time.monotonic()
    error, nothing = forked(work).answers()
    assert isinstance(error, LostRankError)
    assert (error.exit_code, nothing) == (75, None)
    assert "--resume" in str(error)
    assert time.monotonic() - began < 15


def test_a_rank_that_hangs_is_lost_by_its_heartbeat(forked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)

    def work(ranks: Ranks) -> None:
        ranks.all_gather(None)
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        ranks.all_gather(None)  # for ever

    both = forked(work)
    both.processes[0].join(30)
    assert both.processes[0].exitcode == 75
    assert isinstance(pickle.loads(both.pipes[0].recv_bytes()), LostRankError)
    both.processes[1].kill()


def test_a_rank_may_leave_early_and_another_take_its_time(forked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    slow = 3 * module.MISSED_BEATS * 0.05

    def work(ranks: Ranks) -> str:
        ranks.all_gather(None)
        if ranks.writes:
            time.sleep(slow)
        return "done"

    assert forked(work).answers() == ["done", "done"]


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_other_within_thirty_seconds(forked: Any) -> None:
    began = time.monotonic()

    def work(ranks: Ranks) -> None:
        ranks.all_gather(None)
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        ranks.all_gather(None)  # for ever

    both = forked(work)
    both.processes[0].join(40)
    assert both.processes[0].exitcode == 75
    assert time.monotonic() - began < 30
    both.processes[1].kill()
