"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from sinder_cli.repair.results import RepairResult
from sinder_cli.report.repair.facts import run_facts, stop_reason
from sinder_cli.report.wording import counted, degrees, duration, number, numbers, percent


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (0.012341, "0.01234"),
        (21.084, "21.08"),
        (432.46, "432.5"),
        (12345.6, "12,346"),
        (math.nan, "not finite"),
    ],
)
def test_numbers_have_four_digits(value: float, words: str) -> None:
    assert number(value) == words


def test_numbers_that_differ_are_told_apart() -> None:
    assert numbers([0.99, 1.0]) == ["0.99", "1"]
    assert numbers([21.0001, 21.0002, 5]) == ["21.0001", "21.0002", "5"]
    assert numbers([123456.1, 123456.2]) == ["123456.1", "123456.2"]
    assert numbers([7, 7]) == ["7", "7"]


def test_angles_have_a_decimal_while_small() -> None:
    assert [degrees(value) for value in (3.14, 9.96, 47.2, None)] == ["3.1°", "10°", "47°", "–"]
    assert degrees(None, "") == ""


def test_shares_times_and_counts() -> None:
    assert percent(0.0048) == "0.48\N{NO-BREAK SPACE}%"
    assert [duration(seconds) for seconds in (5.04, 66.2, 3599.7, 11_040)] == [
        "5.0 s",
        "1 min 06 s",
        "1 h 00 min",
        "3 h 04 min",
    ]
    assert [counted(count, "step") for count in (0, 1, 1200)] == ["0 steps", "1 step", "1,200 steps"]


def test_skipped_steps_and_images_are_told(make_result: Callable[..., RepairResult]) -> None:
    result = make_result()
    result.summary.update(skipped_steps=1, skipped_images=3)
    values = {fact.name: fact.value for fact in run_facts(result)}
    assert values["Steps"] == "12 (1 step skipped)"
    assert values["Images seen"] == "12 (3 images skipped)"


def test_a_run_that_used_up_its_steps_says_so(make_result: Callable[..., RepairResult]) -> None:
    assert stop_reason(make_result(stopped_by="max_steps")).startswith("the step limit, with 80")
