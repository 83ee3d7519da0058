"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from sinder_cli.repairing.results import RepairResult
from sinder_cli.report.formatting import counted, degrees, duration, number, numbers, percent
from sinder_cli.report.repair.facts import run_facts, stop_reason


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


def test_skipped_steps_and_images_are_reported(make_result: Callable[..., RepairResult]) -> None:
    result = make_result()
    result.summary.update(skipped_steps=1, skipped_images=3)
    values = {fact.name: fact.value for fact in run_facts(result)}
    assert values["Steps"] == "12 (1 step skipped)"
    assert values["Images seen in steps"] == "12 (3 images skipped)"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            {"before": 0, "changed": 0, "steps": 0, "stopped_by": "healthy"},
            "nothing to repair: no image has an outlying",
        ),
        ({}, "no outlying token is left on the images that the repair is judged on"),
        ({"changed": 0, "stopped_by": "fidelity"}, "cls or good tokens were spoilt, in several evaluations in a row"),
        ({"after": 2, "stopped_by": "no_improvement"}, "no better state in many evaluations in a row"),
        (
            {"after": 2, "stopped_by": "no_gain"},
            "no step left has a gain of 3: 100\N{NO-BREAK SPACE}% of the latest images",
        ),
        (
            {"after": 2, "stopped_by": "no_gain", "recipe": "paper"},
            "100\N{NO-BREAK SPACE}% of the latest images without a defect (goal: 75\N{NO-BREAK SPACE}%)",
        ),
        ({"after": 2, "stopped_by": "max_steps"}, "the step limit of 1,000, with 70"),
    ],
)
def test_a_run_says_why_it_ended(make_result: Callable[..., RepairResult], how: dict[str, Any], words: str) -> None:
    result = make_result(**how)
    assert result.summary["stopped_by"] == how.get("stopped_by", "clean")
    assert stop_reason(result).startswith(words)


def test_the_state_that_is_kept_is_named(make_result: Callable[..., RepairResult]) -> None:
    kept = [
        {fact.name: fact.value for fact in run_facts(make_result(changed=changed))}["State that is kept"]
        for changed in (3, 0)
    ]
    assert kept == ["after step 12", "the original"]
