"""Figures of an analysis, over all images and of single images: their files, contents and captions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

from sinder_cli.defects.settings import MIN_GAP, STAGES, Stage
from sinder_cli.report.analysis.facts import has_broken_tokens, labels_of, norm_factor, rule_words, sides_of
from sinder_cli.report.analysis.image_maps import ImageMaps, Scales, SideMaps
from sinder_cli.report.drawing.canvas import Chart
from sinder_cli.report.drawing.charts import draw_angles, draw_cosines, draw_norms, draw_positions
from sinder_cli.report.drawing.pictures import LabelledPicture, encoded
from sinder_cli.report.drawing.rows import Row, draw_rows
from sinder_cli.report.drawing.scales import ANGLES, ColourScale, norm_scale
from sinder_cli.report.formatting import counted

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.analysis.records import Analysis, Distribution, Side
    from sinder_cli.analysis.run import AnalysisResult
    from sinder_cli.analysis.survey import Survey


TITLE_LETTERS = 52  # at most, in one line of a title
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
    """One side of an analysis: its records, its survey, its label, and the ending of its file names."""

    record: Side
    survey: Survey
    label: str
    ending: str


def analysis_charts(result: AnalysisResult) -> list[ChartGroup]:
    """Return all charts, ready to be drawn; the cosines of a comparison come first."""
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
    rows = [
        {"block": pair.block} | _numbers("patch", pair.patch_cosine) | _numbers("cls", pair.cls_cosine)
        for pair in analysis.comparison or ()
    ]
    return ChartGroup("Both sides, block by block", caption, [Chart("cosine", title, caption, 2.9, draw, rows)])


def _numbers(name: str, distribution: Distribution | None) -> dict[str, object]:
    """Return the columns of a distribution in a table of numbers; empty where there is none."""
    fields = ("count", "mean", "min", "p01", "median", "p99", "max")
    return {f"{name} {field}": None if distribution is None else getattr(distribution, field) for field in fields}


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
        rows = [
            {"block": block.block}
            | _numbers("patch", block.patch_norm)
            | _numbers("cls", block.cls_norm)
            | _numbers("register", block.register_norm)
            for block in side.record.blocks
        ]
        charts.append(Chart(f"norms{side.ending}", _flat(title), caption, 3.1, draw, rows))
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
    rows = [
        {"block": block.block, "sigma1/sigma2": block.gap[stage]}
        | _numbers("degrees", block.angle_deg.get(stage))
        | {"observed degrees": block.observed.angle_to_predicted_deg[stage] if block.observed else None}
        for block in blocks
    ]
    return Chart(f"angles-{stage}{side.ending}", _flat(title), caption, 2.9, draw, rows)


def _angle_caption(analysis: Analysis, stage: str) -> str:
    return (
        f"Angle between each patch token and the direction ν that the weights predict for {stage}; grey where σ₁/σ₂ is"
        f" below {_min_gap(analysis):g} and ν is not determined. Dots: angle between ν and the direction that outlying"
        f" tokens share. {_taken(analysis)} {VIOLIN}"
    )


def _position_group(analysis: Analysis, sides: list[ChartSide]) -> ChartGroup:
    """Return the maps of positions at the first block of every verdict and at the last block."""
    firsts = {side.record.verdict.first_block for side in sides}
    blocks = sorted({len(analysis.blocks) - 1, *(block for block in firsts if block is not None)})
    *others, last = map(str, blocks)
    named = f"{', '.join(others)} and {last}" if others else last
    charts = [chart for block in blocks for chart in _position_charts(analysis, sides, block)]
    return ChartGroup("Positions", _position_caption(analysis, named), charts)


def _position_charts(analysis: Analysis, sides: list[ChartSide], block: int) -> Iterator[Chart]:
    shares = [
        {words: side.survey.shares[block].get(rule) for rule, words in rule_words(analysis).items()} for side in sides
    ]
    known = [share for side in shares for share in side.values() if share is not None]
    top = max(share.nan_to_num().max().item() for share in known)
    rows, columns = analysis.grid
    for side, share in zip(sides, shares, strict=True):
        title = _title(f"Where tokens are marked, block {block}", side.label)
        draw = partial(draw_positions, title=title, shares=share, top=top or 0.01)  # a scale must not have length 0
        height = min(5.0, 1.1 + 3.4 / len(share) * rows / columns)
        caption = _position_caption(analysis, str(block))
        yield Chart(f"positions-block-{block}{side.ending}", _flat(title), caption, height, draw, _position_rows(share))


def _position_rows(shares: Mapping[str, Tensor | None]) -> list[dict[str, object]]:
    """Return a row per place of the grid with the share that each rule marks; empty where no token lies."""
    known = {rule: share.tolist() for rule, share in shares.items() if share is not None}
    rows, columns = next(share.shape for share in shares.values() if share is not None)
    return [
        {"row": row, "column": column}
        | {rule: _finite(known[rule][row][column]) if rule in known else None for rule in shares}
        for row in range(rows)
        for column in range(columns)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _position_caption(analysis: Analysis, block: str) -> str:
    rows, columns = analysis.grid
    other = (
        ""
        if analysis.settings.get("resize") == "square"  # all images have this grid
        else " If an image has another grid, each of its tokens counts at its place relative to the image, and several"
        " tokens may share one place; grey: no token at this place."
    )
    return (
        f"Share of the tokens at each place of the {rows} × {columns} grid that each rule marks after block {block}, in"
        f" percent; colours from 0 to the largest share of the block.{other} {_taken(analysis)}"
    )


def _min_gap(analysis: Analysis) -> float:
    return float(analysis.settings.get("min_gap", MIN_GAP))


def _taken(analysis: Analysis) -> str:
    return f"From {counted(analysis.images, 'image')}, {analysis.tapped}."


def _title(what: str, label: str) -> str:
    return f"{what}\n{fill(label, TITLE_LETTERS, max_lines=2, placeholder=' …')}"


def _flat(title: str) -> str:
    return ", ".join(part.strip() for part in title.split("\n"))


BEFORE_NORM = "before the final norm"


class ImageFigure(NamedTuple):
    """One figure of an image: the ending of its file name, its caption, its pictures and their scale."""

    name: str
    caption: str
    rows: list[Row]
    scale: ColourScale | None = None

    def png(self, name: str) -> bytes:
        """Return a PNG file that contains its caption; `name` is the name of the image."""
        texts = {"Title": f"{name}: {self.name}", "Description": self.caption}
        return encoded(draw_rows(self.rows, self.scale), texts=texts)


def file_of(index: int, image: str, figure: str) -> str:
    """Return `figures/0007-name-pca.png`: image 7 (from 0), its name cut so that any file system can hold it."""
    kept = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePosixPath(image).stem).strip("-")[:40]
    return f"figures/{index:04d}-{kept or 'image'}-{figure}.png"


def image_figures(image: ImageMaps, scales: Scales, labels: Sequence[str], analysis: Analysis) -> Iterator[ImageFigure]:
    """Yield all figures of one image.

    `labels` names the sides of a comparison; for a single side it is one empty text.
    """
    last = len(analysis.blocks) - 1
    captions = Captions(image.name, labels, analysis)
    yield ImageFigure("pca", captions.pca(last), [_row_of(image, labels, "pca")])
    yield ImageFigure(
        "norm", captions.norm(last, scales.norms[last]), [_row_of(image, labels, "norm")], scales.norms[last]
    )
    if any(side.attention for side in image.sides):
        yield ImageFigure("attention", captions.attention(last), [_row_of(image, labels, "attention")])
    yield ImageFigure("angles", captions.angles(), list(_angle_rows(image.sides, labels)), ANGLES)
    for side, label, number in zip(image.sides, labels, ("", "-other"), strict=False):
        if side.block is not None:
            scale = scales.norms[side.block]
            yield ImageFigure(
                f"targets{number}", captions.targets(side.block, scale, label), [Row(label, side.targets)], scale
            )
    for side, label, number in zip(image.sides, labels, ("", "-other"), strict=False):
        if side.inpainted is not None and side.somewhere is not None and scales.inpainted is not None:
            maps = [image.photograph, side.inpainted, side.somewhere]
            caption = captions.inpainted(last, scales.inpainted, label, side.inpainted_words)
            yield ImageFigure(f"inpainted{number}", caption, [Row(label, maps)], scales.inpainted)
    if image.cosine:
        yield ImageFigure(
            "cosine", captions.cosine(last, scales.cosine), [Row("", [image.photograph, image.cosine])], scales.cosine
        )


def _row_of(image: ImageMaps, labels: Sequence[str], kind: str) -> Row:
    """Return a row with the photograph and one map per side."""
    found: list[tuple[str, LabelledPicture | None]] = [
        (label, getattr(side, kind)) for side, label in zip(image.sides, labels, strict=True)
    ]
    maps = [each._replace(label=f"{each.label}, {label}" if label else each.label) for label, each in found if each]
    return Row("", [image.photograph, *maps])


def _angle_rows(sides: Sequence[SideMaps], labels: Sequence[str]) -> Iterator[Row]:
    for side, label in zip(sides, labels, strict=True):
        of = f", {label}" if label else ""
        yield Row(f"Angle to the predicted direction ν{of}", side.angles)
        yield Row(f"Marked by equation (5){of}", side.masks)


class Captions(NamedTuple):
    """Captions of one image's figures: what is shown, where it was taken, and by which rule and scale."""

    image: str
    labels: Sequence[str]
    analysis: Analysis

    @property
    def grey(self) -> str:
        """Explanation of grey patches; empty if there are none."""
        return " Dark grey: tokens that are not finite." if has_broken_tokens(self.analysis) else ""

    def pca(self, block: int) -> str:
        """Return the caption of the principal components."""
        out = "all but the marked" if self.analysis.settings.get("exclude_masked") else "all"
        both = " and both sides" if len(self.labels) > 1 else ""
        return (
            f"{self.image}, and the first three principal components of its patch tokens after block {block},"
            f" {BEFORE_NORM}, as red, green and blue. One basis for all {self.analysis.images:,} images{both}, from"
            f" {out} patch tokens; the sign of a component makes its largest entry positive; colours are clipped to the"
            f" 1st to 99th percentile.{self.grey}"
        )

    def norm(self, block: int, scale: ColourScale) -> str:
        """Return the caption of the norms."""
        return (
            f"L2 norms of the patch tokens of {self.image} after block {block}, {BEFORE_NORM}: {scale.words}, the same"
            f" scale for every image.{self.grey}"
        )

    def attention(self, block: int) -> str:
        """Return the caption of the attention."""
        return (
            f"Attention of cls to the patches of {self.image} in block {block}, mean over its heads; each map from its"
            f" own smallest to its own largest weight."
        )

    def angles(self) -> str:
        """Return the caption of angles and masks."""
        settings = self.analysis.settings
        return (
            f"{self.image}: angle between each patch token, {BEFORE_NORM}, and the direction ν predicted from the"
            f" weights (cumulative stage), 0° to 90°, bright where aligned; and the patches that equation (5) marks"
            f" (amber): inner ones with −|cos| more than {settings.get('mask_threshold', 4):g} standard deviations"
            f" below their image's mean. Grey: σ₁/σ₂ is below {settings.get('min_gap', 1.1):g}, so that ν is not"
            f" determined and nothing is marked.{self.grey}"
        )

    def targets(self, block: int, scale: ColourScale, label: str) -> str:
        """Return the caption of the learning targets."""
        kernel = self.analysis.settings.get("kernel", 3)
        return (
            f"{self.image}{f', {label}' if label else ''}: L2 norms after block {block}, its first defective one,"
            f" {BEFORE_NORM}, as they are, and with each marked token at its learning target: the average of its"
            f" {kernel} × {kernel} neighbours, weighted by a Gaussian and exp(−|cos|/τ). Scale of block {block}:"
            f" {scale.words}.{self.grey}"
        )

    def inpainted(self, block: int, scale: ColourScale, label: str, words: str) -> str:
        """Return the caption of the cosines to the inpainted original."""
        factor = norm_factor(self.analysis)
        return (
            f"{self.image}{f', {label}' if label else ''}: cosine between each patch token after block {block},"
            f" {BEFORE_NORM}, and the same token of the inpainted original, whose outlying tokens are replaced where"
            f" they appear by the average of their unmarked neighbours, {scale.words}; bright where they differ; and"
            f" the patches (amber) whose norm is above {factor} × the median in some block. {words}.{self.grey}"
        )

    def cosine(self, block: int, scale: ColourScale) -> str:
        """Return the caption of the cosines between both sides."""
        return (
            f"{self.image}: cosine between the patch tokens of {' and '.join(self.labels)} after block {block},"
            f" {BEFORE_NORM}, {scale.words}; bright where they differ.{self.grey}"
        )
