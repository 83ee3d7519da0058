"""The layout of a chart, in plain numbers."""

from __future__ import annotations

import math

import pytest

from sinder_cli.report.drawing.line_chart import BOTTOM, LEFT, MAX_POINTS, RIGHT, TOP, line_chart
from sinder_cli.report.drawing.scales import log_ticks, round_steps


@pytest.mark.parametrize("largest", [0.0, 1e-4, 0.037, 0.99, 1.0, 3.2, 7.0, 99.9, 100.0, 900.0, 30_000.0])
def test_the_steps_of_an_axis_are_round_and_few(largest: float) -> None:
    steps = round_steps(largest)
    size = steps[1]
    mantissa = size / 10 ** math.floor(math.log10(size) + 1e-9)
    assert steps[0] == 0
    assert 2 <= len(steps) <= 7
    assert steps[-1] >= largest * (1 - 1e-9)
    assert any(math.isclose(mantissa, factor) for factor in (1, 2, 2.5, 5))


@pytest.mark.parametrize("largest", [1, 2, 7, 12, 13])
def test_steps_are_counted_in_whole_numbers(largest: int) -> None:
    assert all(step == int(step) for step in round_steps(largest, whole=True))


def test_points_lie_where_the_axes_say() -> None:
    chart = line_chart([(0, 0), (50, 2), (100, 4)], "n", "x", "y", goal=4, kept=50)
    assert chart is not None
    assert chart.line == [(LEFT, BOTTOM), ((LEFT + RIGHT) / 2, (BOTTOM + TOP) / 2), (RIGHT, TOP)]
    assert chart.goal == TOP
    assert chart.kept == (LEFT + RIGHT) / 2
    assert [tick.label for tick in chart.y_ticks] == ["0", "1", "2", "3", "4"]


def test_many_points_are_averaged_and_the_chart_says_so() -> None:
    chart = line_chart([(step, 1.0) for step in range(30_000)], "n", "x", "y")
    assert chart is not None
    assert len(chart.line) <= MAX_POINTS
    assert chart.averaged == 125


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart([], "n", "x", "y") is None
    assert line_chart([(1, math.nan), (2, math.inf)], "n", "x", "y") is None


def test_marks_of_a_logarithmic_scale_are_where_their_labels_say() -> None:
    for tick in log_ticks(12, 432):
        assert math.isclose(12 * (432 / 12) ** tick.at, float(tick.label))
    assert [tick.label for tick in log_ticks(12, 432)] == ["20", "50", "100", "200"]
    assert [tick.at for tick in log_ticks(21, 22)] == [0, 1]
    assert len(log_ticks(7, 7)) == 1
    assert len(log_ticks(1e-3, 1e5)) <= 9
