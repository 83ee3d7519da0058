"""Which device a backbone runs on."""

from __future__ import annotations

import pytest
import torch

from sinder_cli.backbone.device import resolve_device
from sinder_cli.distributed import ALONE, Ranks
from sinder_cli.errors import UnavailableError


@pytest.mark.parametrize(
    ("name", "ranks", "resolved", "current"),
    [
        ("auto", ALONE, "cuda", 0),
        ("cuda:1", ALONE, "cuda:1", 1),
        ("cuda", Ranks(1, 2, local_rank=1, local_size=2), "cuda:1", 1),
        ("cpu", ALONE, "cpu", None),
    ],
)
def test_the_device_of_a_process_becomes_its_current_one(
    name: str, ranks: Ranks, resolved: str, current: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert resolve_device(name, ranks) == resolved
    assert chosen == ([] if current is None else [current])


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: pytest.fail("it is not there"))
    with pytest.raises(UnavailableError, match="cannot use device 'cuda:2'"):
        resolve_device("cuda:2")
