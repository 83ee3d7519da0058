"""The verdict on a repair: nothing is called repaired that is not, and nothing healthy that stands out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sinder_cli.defects.settings import SLACK
from sinder_cli.repairing.guard import Fidelity
from sinder_cli.repairing.verdict import Elsewhere, is_no, is_spoilt, stop_reason, verdict_in, verdict_of

FLOOR = 0.95
WAS = Fidelity(0.9, 0.97, 0.97, 0.9, 0.3)
BETTER = Fidelity(0.99, 0.99, 0.99, 0.95, 0.9)


def side(left: int, fidelity: Fidelity, standing: int | None = None) -> Any:
    """What `verdict_of` asks of a snapshot."""
    marks = torch.arange(100) < (left if standing is None else standing)
    return SimpleNamespace(left=left, standing=marks, fidelity=lambda: fidelity)


def scan(healthy: bool = False, standing: int = 0) -> Any:
    return SimpleNamespace(healthy=healthy, standing=standing)


@pytest.mark.parametrize(
    ("after", "elsewhere", "word", "reason"),
    [
        (side(0, BETTER), None, "repaired", None),
        (side(0, BETTER), Elsewhere(2, 5, 0), "repaired", None),
        (side(3, BETTER), None, "improved", "left"),
        (side(0, BETTER), Elsewhere(2, 5, 1), "improved", "left_elsewhere"),
        # more of a kind that the guard does not show
        (side(0, BETTER), Elsewhere(2, 5, 6), "not improved", "more_elsewhere"),
        (side(0, BETTER, standing=4), None, "improved", "standing"),  # of norms that the rule in force does not mark
        # marked tokens say less
        (side(0, Fidelity(0.99, 0.99, 0.99, 0.95, 0.3 - 2 * SLACK)), None, "improved", "farther"),
        (side(10, BETTER), None, "not improved", "no_fewer"),
        (side(0, Fidelity(0.99, 0.5, 0.99, 0.95, 0.9)), None, "not improved", "spoilt"),  # good tokens are
        (side(0, Fidelity(0.99, 0.99, 0.9, 0.95, 0.9)), None, "not improved", "spoilt"),  # a part of them
        (side(0, Fidelity(0.8, 0.99, 0.99, 0.95, 0.9)), None, "not improved", "spoilt"),  # cls is
        (side(10, Fidelity(0.8, 0.99, 0.99, 0.95, 0.9)), None, "not improved", "spoilt"),  # which comes first
    ],
)
def test_the_verdict_on_what_was_changed(
    after: Any, elsewhere: Elsewhere | None, word: str, reason: str | None
) -> None:
    assert verdict_of(scan(), side(10, WAS), after, True, FLOOR, elsewhere) == (word, reason)


def test_what_was_not_changed_is_not_improved() -> None:
    found = verdict_of(scan(), side(10, WAS), side(0, BETTER), False, FLOOR)
    assert found == ("not improved", "unchanged")


def test_a_summary_says_the_verdict_and_one_without_a_reason_is_not_spoilt() -> None:
    spoilt = {"verdict": "not improved", "verdict_reason": "spoilt"}
    assert (verdict_in(spoilt), is_no(spoilt), is_spoilt(spoilt)) == ("not improved", True, True)
    earlier = {"verdict": "not improved"}
    assert (is_no(earlier), is_spoilt(earlier)) == (True, False)
    assert not any(is_no({"verdict": word}) for word in ("healthy", "repaired", "improved"))


def test_a_model_is_healthy_only_if_no_norm_stands_out() -> None:
    for standing, word, reason in ((0, "healthy", "healthy"), (7, "not improved", "nothing_marked")):
        found = scan(True, standing)
        reasons = (word, None if word == "healthy" else reason)
        assert verdict_of(found, side(0, WAS), side(0, WAS), False, FLOOR) == reasons
        progress: Any = SimpleNamespace(stopped="", clean_fraction=1.0)
        assert stop_reason(found, side(0, WAS), progress, SimpleNamespace(stop_clean_fraction=1.0)) == reason  # type: ignore[arg-type]
