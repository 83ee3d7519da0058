"""How many cores a process may use, and how many threads torch is given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sinder_cli import cores


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Eight cores, and a file that a quota may be written to."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "QUOTA_V2", tmp_path / "cpu.max")
    monkeypatch.setattr(cores, "QUOTA_V1", (tmp_path / "quota", tmp_path / "period"))
    for name in cores.THREADS:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("quota", "found"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("250000 100000", 3),
        ("50000 100000", 1),
        ("9900000 100000", 8),
        ("?", 8),
    ],
)
def test_a_quota_of_time_counts_as_cores(bound: Path, quota: str, found: int) -> None:
    (bound / "cpu.max").write_text(f"{quota}\n")
    assert cores.usable_cores() == found


@pytest.mark.parametrize(("quota", "found"), [("-1", 8), ("300000", 3)])
def test_a_quota_of_the_older_kind_counts_too(bound: Path, quota: str, found: int) -> None:
    (bound / "quota").write_text(quota)
    (bound / "period").write_text("100000")
    assert cores.usable_cores() == found


def test_torch_gets_as_many_threads_as_there_is_time_for(bound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores.heed_quota()
    assert "OMP_NUM_THREADS" not in os.environ  # no quota: torch heeds the binding by itself
    (bound / "cpu.max").write_text("200000 100000")
    monkeypatch.setenv("MKL_NUM_THREADS", "5")
    cores.heed_quota()
    assert "OMP_NUM_THREADS" not in os.environ  # the user has chosen
    monkeypatch.delenv("MKL_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores.heed_quota()
    assert os.environ["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that it is put back at the end
