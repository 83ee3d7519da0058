"""A chart in a page says what the chart in a file says."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from functools import partial

from made_analysis import Made
from matplotlib.figure import Figure

from sinder_cli.analysis.records import Distribution, PairRecord
from sinder_cli.report.analysis.figures import analysis_charts
from sinder_cli.report.drawing.canvas import Chart
from sinder_cli.report.drawing.charts import draw_cosines

TITLE = "<0.123456> & #2b5c8a, 12.34567 font: 1px x"


def texts_of(svg: str) -> list[str]:
    root = ElementTree.fromstring(re.sub(r"xlink:href", "href", svg))
    return ["".join(element.itertext()) for element in root.iter("text")]


def ticks_of(chart: Chart) -> list[list[str]]:
    """What matplotlib writes on each axis that it draws."""
    kept: list[Figure] = []

    def draw(figure: Figure) -> None:
        kept.append(figure)
        chart.draw(figure)

    Chart(chart.name, chart.title, chart.caption, chart.height, draw).svg()
    labels = []
    for axes in kept[0].axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            inside = [tick for tick in axis.get_major_ticks() if low - 1e-9 <= tick.get_loc() <= high + 1e-9]
            labels.append([tick.label1.get_text() for tick in inside if tick.label1.get_visible()])
    return labels


def alike(median: float) -> Distribution:
    low, high = median - 1e-3, median + 1e-4
    return Distribution(count=9, mean=median, min=low, p01=low, median=median, p99=high, max=high)


def cosine_chart(median: float) -> Chart:
    pairs = [PairRecord(block=at, patch_cosine=alike(median), cls_cosine=None, agreement={}) for at in range(3)]
    return Chart("cosine", TITLE, "", 2.9, partial(draw_cosines, title=TITLE, pairs=pairs))


def test_numbers_and_names_in_a_drawing_are_not_cut_short() -> None:
    chart = cosine_chart(0.9991)
    texts = texts_of(chart.svg())
    assert TITLE in texts
    assert "0.992" in texts
    for labels in ticks_of(chart):
        assert set(labels) <= set(texts)


def test_every_axis_of_every_chart_tells_its_ticks_apart() -> None:
    for group in analysis_charts(Made(compared=True, drawn=0).result()):
        for chart in group.charts:
            texts = texts_of(chart.svg())
            for labels in ticks_of(chart):
                shown = [label for label in labels if label]
                assert len(set(shown)) == len(shown), (chart.name, labels)
                assert set(shown) <= set(texts), (chart.name, labels)


def test_coordinates_in_a_drawing_are_cut_to_a_hundredth() -> None:
    svg = cosine_chart(0.9991).svg()
    assert not re.search(r' (?:d|x|y)="[^"]*\d\.\d{3}', svg)
    assert "var(--line)" in svg
