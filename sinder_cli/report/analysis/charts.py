"""The charts of an analysis: what each shows, on which scale, and what its caption says."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

from sinder_cli.defects.settings import MIN_GAP, STAGES, Stage
from sinder_cli.report.analysis.facts import labels_of, rule_words, sides_of
from sinder_cli.report.drawing.canvas import Chart
from sinder_cli.report.drawing.lines import draw_cosines
from sinder_cli.report.drawing.positions import draw_positions
from sinder_cli.report.drawing.scales import norm_scale
from sinder_cli.report.drawing.violins import draw_angles, draw_norms
from sinder_cli.report.wording import counted

if TYPE_CHECKING:
    from sinder_cli.analysis.records import Analysis, AnalysisResult, Side
    from sinder_cli.analysis.survey import Survey

TITLE_LETTERS = 52  # in one line of a title
ENDINGS = ("", "-other")  # of the names of a comparison's files
VIOLIN = (
    "Violins: the distribution of all patch tokens, each as wide as its own peak; thin line: smallest to largest; "
    "thick line: 1 % to 99 %; dash: median."
)
STAGE_WORDS: dict[Stage, str] = {
    "attention": "attention stage (I + A)",
    "mlp": "MLP stage (I + C)",
    "block": "block stage (E)",
    "cumulative": "cumulative stage (G)",
}


class ChartGroup(NamedTuple):
    """Charts of one subject, both sides next to each other, with one caption for all of them."""

    heading: str
    caption: str
    charts: list[Chart]


class ChartSide(NamedTuple):
    """One side of an analysis: its records, its outlines, its name, and the ending of its files' names."""

    record: Side
    survey: Survey
    label: str
    ending: str


def analysis_charts(result: AnalysisResult) -> list[ChartGroup]:
    """All charts, ready to be drawn; the cosines of a comparison come first."""
    analysis = result.analysis
    sides = [
        ChartSide(*each) for each in zip(sides_of(analysis), result.surveys, labels_of(analysis), ENDINGS, strict=False)
    ]
    groups = [_norm_group(analysis, sides), _angle_group(analysis, sides), _position_group(analysis, sides)]
    return [_cosine_group(analysis), *groups] if analysis.comparison else groups


def _cosine_group(analysis: Analysis) -> ChartGroup:
    title = "Cosine of the same token on both sides"
    caption = (
        f"Cosine between the tokens of {' and '.join(labels_of(analysis))} at the same place of the same image: median,"
        f" and a band from 1 % to 99 %. {_taken(analysis)}"
    )
    draw = partial(draw_cosines, title=title, pairs=analysis.comparison or ())
    return ChartGroup("Both sides, block by block", caption, [Chart("cosine", title, caption, 2.9, draw)])


def _norm_group(analysis: Analysis, sides: list[ChartSide]) -> ChartGroup:
    scale = norm_scale(block.patch_norm for side in sides for block in side.record.blocks)
    limits = (scale.low / 1.15, scale.high * 1.15)
    caption = f"L2 norms of patch tokens, on a logarithmic axis. {_taken(analysis)} {VIOLIN}"
    charts = []
    for side in sides:
        title = _title("Norms of patch tokens", side.label)
        norms = [block.patch_norm for block in side.record.blocks]
        curves = [curve.norms for curve in side.survey.curves]
        draw = partial(draw_norms, title=title, curves=curves, norms=norms, limits=limits)
        charts.append(Chart(f"norms{side.ending}", _flat(title), caption, 3.1, draw))
    return ChartGroup("Norms", caption, charts)


def _angle_group(analysis: Analysis, sides: list[ChartSide]) -> ChartGroup:
    charts = [_angle_chart(analysis, side, stage) for stage in STAGES for side in sides]
    return ChartGroup(
        "Angles to the predicted direction", _angle_caption(analysis, "the stage above each chart"), charts
    )


def _angle_chart(analysis: Analysis, side: ChartSide, stage: Stage) -> Chart:
    title = _title(f"Angles, {STAGE_WORDS[stage]}", side.label)
    blocks = side.record.blocks
    draw = partial(
        draw_angles,
        title=title,
        curves=[curve.angles.get(stage) for curve in side.survey.curves],
        angles=[block.angle_deg.get(stage) for block in blocks],
        determined=[block.gap[stage] >= _min_gap(analysis) for block in blocks],
        observed=[block.observed.angle_to_predicted_deg[stage] if block.observed else None for block in blocks],
    )
    caption = _angle_caption(analysis, f"the {STAGE_WORDS[stage]}")
    return Chart(f"angles-{stage}{side.ending}", _flat(title), caption, 2.9, draw)


def _angle_caption(analysis: Analysis, stage: str) -> str:
    return (
        f"Angle between each patch token and the direction ν that the weights predict for {stage}; grey where σ₁/σ₂ is"
        f" below {_min_gap(analysis):g} and ν is not determined. Dots: angle between ν and the direction that outlying"
        f" tokens share. {_taken(analysis)} {VIOLIN}"
    )


def _position_group(analysis: Analysis, sides: list[ChartSide]) -> ChartGroup:
    """At the first block of every verdict, and at the last block."""
    firsts = {side.record.verdict.first_block for side in sides}
    blocks = sorted({len(analysis.blocks) - 1, *(block for block in firsts if block is not None)})
    *others, last = map(str, blocks)
    named = f"{', '.join(others)} and {last}" if others else last
    charts = [chart for block in blocks for chart in _position_charts(analysis, sides, block)]
    return ChartGroup("Positions", _position_caption(analysis, named), charts)


def _position_charts(analysis: Analysis, sides: list[ChartSide], block: int) -> Iterator[Chart]:
    shares = [
        {told: side.survey.shares[block].get(rule) for rule, told in rule_words(analysis).items()} for side in sides
    ]
    known = [share for side in shares for share in side.values() if share is not None]
    top = max(share.nan_to_num().max().item() for share in known)
    rows, columns = analysis.grid
    for side, share in zip(sides, shares, strict=True):
        title = _title(f"Where tokens are marked, block {block}", side.label)
        draw = partial(draw_positions, title=title, shares=share, top=top or 0.01)  # a scale needs some length
        height = min(5.0, 1.1 + 3.4 / len(share) * rows / columns)
        caption = _position_caption(analysis, str(block))
        yield Chart(f"positions-block-{block}{side.ending}", _flat(title), caption, height, draw)


def _position_caption(analysis: Analysis, block: str) -> str:
    rows, columns = analysis.grid
    other = (
        ""
        if analysis.settings.get("resize") == "square"  # all images have this grid
        else " Where an image has another grid, its tokens count at the place that they have relative to the image, and"
        " several may share one; grey: no token lay there."
    )
    return (
        f"Of the tokens at each place of the {rows} × {columns} grid, the share that each rule marks after block"
        f" {block}, in percent; colours from 0 to the largest share of the block.{other} {_taken(analysis)}"
    )


def _min_gap(analysis: Analysis) -> float:
    return float(analysis.settings.get("min_gap", MIN_GAP))


def _taken(analysis: Analysis) -> str:
    return f"From {counted(analysis.images, 'image')}, {analysis.tapped}."


def _title(what: str, label: str) -> str:
    return f"{what}\n{fill(label, TITLE_LETTERS, max_lines=2, placeholder=' …')}"


def _flat(title: str) -> str:
    return ", ".join(part.strip() for part in title.split("\n"))
