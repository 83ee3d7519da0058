"""What `analyze` hands on: the document, and what its figures are drawn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli import __version__
from sinder_cli.analysis.per_image import Portrait
from sinder_cli.analysis.records import Analysis, Side
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.analysis.survey import Survey, Surveys
from sinder_cli.analysis.tokens import Subject
from sinder_cli.analysis.verdict import judge
from sinder_cli.defects.inpainting import outlying_factor
from sinder_cli.escaping import printable

if TYPE_CHECKING:
    from sinder_cli.defects.prediction import Prediction


@dataclass(frozen=True)
class AnalysisResult:
    """The findings on one backbone, or on two side by side."""

    analysis: Analysis
    predictions: tuple[Prediction, ...]  # one a side
    surveys: tuple[Survey, ...]  # one a side
    blocks: tuple[int, ...]  # of which angles and masks are drawn
    portraits: Iterator[Portrait]  # made while it is gone through, once: the images to draw are run again
    drawn: int  # how many portraits there will be
    mean: tuple[float, float, float]  # of the normalization of a portrait's image
    std: tuple[float, float, float]
    folder: Path | None = None  # that it was written into


def analysis_of(
    subjects: Sequence[Subject],
    surveys: Surveys,
    settings: AnalyzeSettings,
    grid: tuple[int, int],
    skipped: dict[str, str],
) -> Analysis:
    """The document: the first backbone, the second beside it if there is one, and how they were run."""
    first, *others = (side_of(*pair, settings) for pair in zip(subjects, surveys.sides, strict=True))
    return Analysis(
        **dict(first),
        sinder=__version__,
        images=surveys.images,
        skipped=dict(skipped),
        grid=grid,
        settings=settings.model_dump(exclude={"workers"}),
        other=others[0] if others else None,
        comparison=surveys.pairs or None,
    )


def side_of(subject: Subject, survey: Survey, settings: AnalyzeSettings) -> Side:
    """One backbone's part of the document."""
    return Side(
        model=subject.backbone.name,
        weights=printable(subject.backbone.weights.source.label),
        fingerprint=subject.backbone.weights.fingerprint(),
        verdict=judge(survey.blocks, settings.min_tokens, outlying_factor(settings.norm_factor)),
        blocks=survey.blocks,
        inpainting=survey.inpainting,
    )
