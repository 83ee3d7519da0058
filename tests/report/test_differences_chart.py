"""The chart of a task's differences: what it shows, and which way is better."""

from __future__ import annotations

import pytest

from sinder_cli.evaluation.records import DifferenceRecord, FigureRecord, TaskRecord, ValueRecord
from sinder_cli.report.evaluation.charts import Difference, differences, differences_chart

LABELS = {"original": "original", "repaired": "mine", "smoothed": "smoothed"}


def value(side: str, difference: float | None, low: float | None = None, high: float | None = None) -> ValueRecord:
    of = None
    if difference is not None:
        of = DifferenceRecord(value=difference, low=low, high=high, images=9, standing="better")
    return ValueRecord.model_validate({"side": side, "value": 1.0, "images": 9, "to_original": of})


def figure(name: str, better: str, *values: ValueRecord) -> FigureRecord:
    return FigureRecord.model_validate({"name": name, "unit": "", "better": better, "noise": 0, "values": values})


def task(*figures: FigureRecord) -> TaskRecord:
    return TaskRecord(
        task="toy", protocol="", data="", images=9, trained_on=0, settings={}, figures=figures, notes={}, sentences=(),
        skipped={}, seconds=1,
    )  # fmt: skip


TOY = task(
    figure("top-1", "higher", value("original", None), value("repaired", 2, 1, 4), value("smoothed", -1, -3, 0.5)),
    figure("RMSE", "lower", value("original", None), value("repaired", -0.2, -0.3, -0.1)),
    figure("norm", "neither", value("original", None), value("repaired", 7, 6, 8)),
    figure("the same", "higher", value("original", None), value("repaired", 0, 0, 0)),
    figure("of two images", "higher", value("original", None), value("repaired", 5)),
)


def test_positive_is_better_whatever_the_figure() -> None:
    assert differences(TOY) == {
        "top-1": [Difference("repaired", 2, 1, 4), Difference("smoothed", -1, -3, 0.5)],
        "RMSE": [Difference("repaired", 0.2, 0.1, 0.3)],
        "of two images": [Difference("repaired", 5, None, None)],
    }
    assert Difference("smoothed", -1, -3, 0.5).reach == 3
    assert Difference("repaired", 5, None, None).reach == 5


def test_marks_and_intervals_lie_where_the_differences_say() -> None:
    chart = differences_chart(TOY, LABELS)  # type: ignore[arg-type]
    assert chart is not None
    [axes] = chart._figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["top-1", "RMSE", "of two images"]
    drawn = [[float(x) for x in line.get_xdata()] for line in axes.lines[1:] if len(line.get_xdata())]
    assert drawn[:4] == [[0.25, 1.0], [0.5], [-0.75, 0.125], [-0.25]]  # of the widest of the figure
    assert drawn[4:] == [[pytest.approx(1 / 3), 1.0], [pytest.approx(2 / 3)], [1.0]]
    [legend] = chart._figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["mine", "smoothed"]
    assert chart.rows[1] == {"figure": "top-1", "side": "smoothed", "better by": -1, "low": -3, "high": 0.5}


def test_a_task_without_a_difference_has_no_chart() -> None:
    assert differences_chart(task(*TOY.figures[2:4]), LABELS) is None  # type: ignore[arg-type]
