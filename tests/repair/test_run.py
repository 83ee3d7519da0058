"""What a repair decides around its steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sinder_cli.repair.run import _seen_already

BEFORE, LATEST = object(), object()


def repair(keep: str, best: int | None, last_look: int, last_move: int, *, changed: bool = True) -> Any:
    return SimpleNamespace(
        prepared=SimpleNamespace(
            deltas=SimpleNamespace(changed=[object()] if changed else []),
            start=SimpleNamespace(settings=SimpleNamespace(keep=keep)),
        ),
        guard=SimpleNamespace(before=BEFORE, latest=LATEST),
        progress=SimpleNamespace(
            best=None if best is None else SimpleNamespace(step=best), last_look=last_look, last_move=last_move
        ),
    )


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (repair("best", None, 0, 0, changed=False), BEFORE),
        (repair("best", 10, 10, 9), LATEST),
        (repair("best", 5, 10, 9), None),  # an earlier state is put back
        (repair("best", 10, 10, 12), None),  # moved since
        (repair("last", 5, 10, 9), LATEST),
        (repair("last", 5, 10, 12), None),
    ],
)
def test_the_guard_looks_again_at_a_state_only_if_it_has_not_seen_it(state: Any, expected: object) -> None:
    assert _seen_already(state) is expected
