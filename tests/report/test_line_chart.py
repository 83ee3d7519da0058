"""The layout of a chart, in plain numbers."""

from __future__ import annotations

import math

import pytest
from matplotlib.figure import Figure

from sinder_cli.report.drawing.canvas import ChartKind
from sinder_cli.report.drawing.line_chart import MAX_POINTS, Marks, draw_line, line_chart, thinned_points
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


def test_points_and_marks_lie_where_the_axes_say() -> None:
    figure = Figure()
    draw_line(figure, "n", [(0, 0), (50, 2), (100, 4)], ("x", "y"), None, Marks(goal=4, kept=50))
    [axes] = figure.axes
    line, goal, kept = axes.lines
    assert line.get_xydata().tolist() == [[0, 0], [50, 2], [100, 4]]
    assert set(goal.get_ydata()) == {4}
    assert set(kept.get_xdata()) == {50}
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 100), (0, 4))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "1", "2", "3", "4"]


def test_many_points_are_averaged_and_the_chart_says_so() -> None:
    points = [(float(step), 1.0) for step in range(30_000)]
    thinned, averaged = thinned_points(points)
    assert len(thinned) <= MAX_POINTS
    assert (averaged, thinned[0]) == (125, (62.0, 1.0))
    chart = line_chart(points, "n", "N", ("x", "y"))
    assert chart is not None
    assert chart.caption == "N: each point is the mean of 125 steps"
    assert len(chart.rows) == 30_000


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart([], "n", "N", ("x", "y")) is None
    assert line_chart([(1, math.nan), (2, math.inf)], "n", "N", ("x", "y")) is None


@pytest.mark.parametrize(("kind", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("csv", b"x,y")])
def test_a_chart_is_written_in_every_format_the_same_each_time(kind: ChartKind, begin: bytes) -> None:
    files = []
    for _ in range(2):
        chart = line_chart([(0, 1), (1, 3)], "n", "N", ("x", "y"), marks=Marks(goal=2, kept=1))
        assert chart is not None
        files.append(chart.written(kind))
    assert files[0].startswith(begin)
    assert files[0] == files[1]
    if kind == "csv":
        assert files[0] == b"x,y\n0,1\n1,3\n"


def test_marks_of_a_logarithmic_scale_are_where_their_labels_say() -> None:
    for tick in log_ticks(12, 432):
        assert math.isclose(12 * (432 / 12) ** tick.at, float(tick.label))
    assert [tick.label for tick in log_ticks(12, 432)] == ["20", "50", "100", "200"]
    assert [tick.at for tick in log_ticks(21, 22)] == [0, 1]
    assert len(log_ticks(7, 7)) == 1
    assert len(log_ticks(1e-3, 1e5)) <= 9
