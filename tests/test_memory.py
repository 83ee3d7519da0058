"""Memory that runs out is told as that, however a library says so."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from sinder_cli import ModelRequest, api
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.errors import TryAgainError
from sinder_cli.memory import is_out_of_memory, out_of_memory_reported
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.requests import AnalyzeRequest, RepairRequest

OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("can't start new thread"),
    RuntimeError("could not create a primitive"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
OTHER = [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("shapes differ"), ValueError("out of memory")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_it_is_told_with_what_to_do(error: Exception) -> None:
    assert is_out_of_memory(error)
    with (
        pytest.raises(TryAgainError, match="out of memory: at 3 pixels; take 2") as caught,
        out_of_memory_reported("at 3 pixels", "take 2"),
    ):
        raise error
    assert caught.value.exit_code == 75


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_nothing_else_is_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), out_of_memory_reported("at 3 pixels", "take 2"):
        raise error


def test_an_allocation_that_really_fails_is_recognized() -> None:
    with pytest.raises(TryAgainError), out_of_memory_reported("at 3 pixels", "take 2"):
        torch.empty(1 << 55)


def test_analyze_tells_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("sinder_cli.analysis.run.survey", fails)
    settings = AnalyzeSettings(image_size=140, batch_size=3, limit=1, workers=0)
    with pytest.raises(TryAgainError, match="at image size 140, resize short and batch size 3; lower --image-size"):
        api.analyze(AnalyzeRequest(ModelRequest("demo_vit"), [], settings))


@pytest.mark.parametrize(
    "part", ["preparing.predict", "preparing.load_module", "run.scan", "guard.Guard.remember", "run.write_model"]
)
def test_a_repair_tells_its_sizes_wherever_memory_runs_out(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(f"sinder_cli.repairing.{part}", fails)
    settings = RepairSettings(image_size=140, batch_size=3, eval_images=1, max_steps=1, window=4)
    with pytest.raises(
        TryAgainError, match="at 140 × 140 pixels, batch size 3 and a window of 4 blocks; --resume when"
    ):
        api.repair(RepairRequest(ModelRequest("demo_vit"), [], settings), tmp_path / "run")
