"""Several ranks: forked from the test where that is enough, and under torchrun as a user starts them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_vit
import torch
from photographs import copied_photographs
from planted_dinov2 import PHOTOGRAPHS, SMALL, planted
from safetensors.torch import save_file

from sinder_cli.distributed import Ranks, joined

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sinder_cli")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Both ranks share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The tiny planted ViT in memory: `plant`, `coloured`."""
    return tiny_vit


class Forked:
    """Two ranks forked from this process; `answers` has what each returned, or the exception that it ended with."""

    def __init__(self, work: Callable[[Ranks], Any]) -> None:
        context = multiprocessing.get_context("fork")
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            port = str(listening.getsockname()[1])
        self.pipes, self.processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = context.Process(target=_serve, args=(work, theirs, environment), daemon=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, which take no part
                process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def answers(self, seconds: float = 60) -> list[Any]:
        """In the order of the ranks; None from one that was killed."""
        found: list[Any] = []
        for pipe in self.pipes:
            assert pipe.poll(seconds), "a rank does not end"
            try:
                found.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                found.append(None)
        return found


def _serve(work: Callable[[Ranks], Any], pipe: Any, environment: dict[str, str]) -> None:
    os.environ.update(environment)

    def abandon(error: Exception) -> None:
        pipe.send_bytes(pickle.dumps(error))
        os._exit(75)

    try:
        with joined(abandon) as ranks:
            answer = work(ranks)
    except Exception as error:
        answer = error
    pipe.send_bytes(pickle.dumps(answer))  # send() would pass tensors on as handles to files of this process


@pytest.fixture
def forked() -> type[Forked]:
    """Run a function of `Ranks` in two processes."""
    return Forked


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photographs."""
    return copied_photographs(tmp_path_factory.mktemp("photographs"), PHOTOGRAPHS)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """A small planted checkpoint for `dinov2_custom`."""
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    save_file(planted(SMALL, photographs), path)
    return path


@pytest.fixture(scope="session")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen[str]]:
    """Start `sinder` as two ranks, with these arguments."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_HOME": str(tmp_path_factory.mktemp("torch"))}

    def start(*arguments: str | Path) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([*TORCHRUN, *map(str, arguments)], stdout=pipe, stderr=pipe, text=True, env=environment)

    return start
