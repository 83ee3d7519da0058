"""The figures of one image: which of its maps stand in which file, and what the caption says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from sinder_cli.report.analysis.facts import has_broken_tokens, norm_factor
from sinder_cli.report.analysis.image_maps import ImageMaps, Scales, SideMaps
from sinder_cli.report.drawing.pictures import LabelledPicture, encoded
from sinder_cli.report.drawing.rows import Row, draw_rows
from sinder_cli.report.drawing.scales import ANGLES, ColourScale

if TYPE_CHECKING:
    from sinder_cli.analysis.records import Analysis

BEFORE_NORM = "before the final norm"


class ImageFigure(NamedTuple):
    """One figure of an image: the ending of its file's name, its caption, and what is on it."""

    name: str
    caption: str
    rows: list[Row]
    scale: ColourScale | None = None

    def png(self, name: str) -> bytes:
        """A PNG file that carries its caption; `name` is that of the image."""
        texts = {"Title": f"{name}: {self.name}", "Description": self.caption}
        return encoded(draw_rows(self.rows, self.scale), texts=texts)


def file_of(index: int, image: str, figure: str) -> str:
    """`figures/0007-name-pca.png`: image 7 (from 0), whose name is kept as far as any file system can hold it."""
    kept = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePosixPath(image).stem).strip("-")[:40]
    return f"figures/{index:04d}-{kept or 'image'}-{figure}.png"


def image_figures(image: ImageMaps, scales: Scales, labels: Sequence[str], analysis: Analysis) -> Iterator[ImageFigure]:
    """All figures of one image; `labels` names the sides of a comparison, and is one empty text without."""
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
    """The photograph, and beside it one map a side."""
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
        """What grey patches are, where there are any."""
        return " Dark grey: tokens that are not finite." if has_broken_tokens(self.analysis) else ""

    def pca(self, block: int) -> str:
        """Of the principal components."""
        out = "all but the marked" if self.analysis.settings.get("exclude_masked") else "all"
        both = " and both sides" if len(self.labels) > 1 else ""
        return (
            f"{self.image}, and the first three principal components of its patch tokens after block {block},"
            f" {BEFORE_NORM}, as red, green and blue. One basis for all {self.analysis.images:,} images{both}, from"
            f" {out} patch tokens; the sign of a component makes its largest entry positive; colours are clipped to the"
            f" 1st to 99th percentile.{self.grey}"
        )

    def norm(self, block: int, scale: ColourScale) -> str:
        """Of the norms."""
        return (
            f"L2 norms of the patch tokens of {self.image} after block {block}, {BEFORE_NORM}: {scale.words}, the same"
            f" scale for every image.{self.grey}"
        )

    def attention(self, block: int) -> str:
        """Of the attention."""
        return (
            f"Attention of cls to the patches of {self.image} in block {block}, mean over its heads; each map from its"
            f" own smallest to its own largest weight."
        )

    def angles(self) -> str:
        """Of angles and masks."""
        settings = self.analysis.settings
        return (
            f"{self.image}: angle between each patch token, {BEFORE_NORM}, and the direction ν predicted from the"
            f" weights (cumulative stage), 0° to 90°, bright where aligned; and the patches that equation (5) marks"
            f" (amber): inner ones with −|cos| more than {settings.get('mask_threshold', 4):g} standard deviations"
            f" below their image's mean. Grey: σ₁/σ₂ is below {settings.get('min_gap', 1.1):g}, so that ν is not"
            f" determined and nothing is marked.{self.grey}"
        )

    def targets(self, block: int, scale: ColourScale, label: str) -> str:
        """Of the learning targets."""
        kernel = self.analysis.settings.get("kernel", 3)
        return (
            f"{self.image}{f', {label}' if label else ''}: L2 norms after block {block}, its first defective one,"
            f" {BEFORE_NORM}, as they are, and with each marked token at its learning target: the average of its"
            f" {kernel} × {kernel} neighbours, weighted by a Gaussian and exp(−|cos|/τ). Scale of block {block}:"
            f" {scale.words}.{self.grey}"
        )

    def inpainted(self, block: int, scale: ColourScale, label: str, words: str) -> str:
        """Of the cosines to the inpainted original."""
        factor = norm_factor(self.analysis)
        return (
            f"{self.image}{f', {label}' if label else ''}: cosine between each patch token after block {block},"
            f" {BEFORE_NORM}, and the same token of the inpainted original, whose outlying tokens are replaced where"
            f" they appear by the average of their unmarked neighbours, {scale.words}; bright where they differ; and"
            f" the patches (amber) whose norm is above {factor} × the median in some block. {words}.{self.grey}"
        )

    def cosine(self, block: int, scale: ColourScale) -> str:
        """Of the cosines between both sides."""
        return (
            f"{self.image}: cosine between the patch tokens of {' and '.join(self.labels)} after block {block},"
            f" {BEFORE_NORM}, {scale.words}; bright where they differ.{self.grey}"
        )
