"""One analysis: backbones and images in, the document and what its figures are drawn from out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli import __version__
from sinder_cli.analysis.features import FeatureFiles
from sinder_cli.analysis.per_image import Portrait, portraits, shown_blocks
from sinder_cli.analysis.records import Analysis, Side
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.analysis.survey import ImageBatches, Survey, Surveys, require_comparable, survey
from sinder_cli.analysis.tokens import Subject, featured
from sinder_cli.analysis.verdict import judge
from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.opening import load_module
from sinder_cli.defects.inpainting import outlying_factor
from sinder_cli.defects.prediction import predict
from sinder_cli.distributed import Ranks, require_alike
from sinder_cli.escaping import printable
from sinder_cli.events import Emit
from sinder_cli.images.loading import require_some, sampled
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.sources import ImageSource
from sinder_cli.memory import out_of_memory_reported
from sinder_cli.notebooks import Shown

if TYPE_CHECKING:
    from sinder_cli.defects.prediction import Prediction


@dataclass(frozen=True)
class AnalysisInput:
    """The backbones of an analysis, one or two, and the images that they are run on."""

    backbones: Sequence[Backbone]
    source: ImageSource
    preprocess: Preprocessing
    device: str
    features: Path | None = None  # a new folder for the tokens of the last block
    draw: bool = False  # prepare portraits of images


@dataclass(frozen=True)
class AnalysisResult(Shown):
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
    """Return the document: the first backbone, the second if there is one, and how they were run."""
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
    """Return one backbone's part of the document."""
    return Side(
        model=subject.backbone.name,
        weights=printable(subject.backbone.weights.source.label),
        fingerprint=subject.backbone.weights.fingerprint(),
        verdict=judge(survey.blocks, settings.min_tokens, outlying_factor(settings.norm_factor)),
        blocks=survey.blocks,
        inpainting=survey.inpainting,
    )


def run_analysis(given: AnalysisInput, settings: AnalyzeSettings, emit: Emit, ranks: Ranks) -> AnalysisResult | None:
    """Run the backbones over all images; each of several ranks takes its share, and rank 0 alone gets the result.

    `settings.method` `inpaint` adds the inpainted original as a second side. Features are those of the inpainted side
    where there is one, else of the first. Raises `UsageError` for two backbones that do not compare.
    """
    require_comparable(given.backbones)
    first, preprocess, device = given.backbones[0], given.preprocess, given.device
    shown = shown_blocks(first.depth, settings.blocks)
    require_alike({"images": given.source.fingerprint()}, ranks)
    chosen = sampled(len(given.source), settings.limit, settings.seed)
    images = ImageBatches(given.source, preprocess, chosen, settings, emit, ranks)
    subjects = [_subject(backbone, device, emit, ranks) for backbone in given.backbones]
    if settings.method == "inpaint":
        subjects.append(subjects[0].inpainted(settings))
    written = subjects[featured(subjects)].backbone
    files = None if given.features is None else FeatureFiles.made(given.features, images.names, written)
    grid = (preprocess.size // first.patch_size,) * 2
    sizes = f"at image size {preprocess.size}, resize {settings.resize} and batch size {settings.batch_size}"
    with out_of_memory_reported(sizes, "lower --image-size or --batch-size, or use --resize square"):
        draw = given.draw and settings.figures != 0
        kept = files.write if files is not None else None
        surveys = survey(subjects, images.share(), grid, settings, device, draw, ranks, kept)
    images.gather()
    if surveys is None:
        return None
    require_some(surveys.images, len(images.skipped))
    drawn, again = images.again(settings.figures if surveys.basis else 0)
    return AnalysisResult(
        analysis=analysis_of(subjects, surveys, _resolved(settings, given, shown), grid, images.skipped),
        predictions=tuple(subject.prediction for subject in subjects),
        surveys=surveys.sides,
        blocks=shown,
        portraits=portraits(subjects, again, surveys.basis, settings, device) if surveys.basis else iter(()),
        drawn=drawn,
        mean=preprocess.mean,
        std=preprocess.std,
    )


def _subject(backbone: Backbone, device: str, emit: Emit, ranks: Ranks) -> Subject:
    """Return a backbone with its predictions and with its weights in place."""
    module = load_module(backbone, device)
    return Subject(backbone, module, ranks.from_rank0(lambda: predict(backbone, emit=emit, device=device)))


def _resolved(settings: AnalyzeSettings, given: AnalysisInput, shown: tuple[int, ...]) -> AnalyzeSettings:
    """Return the settings with what was chosen where the user left it open."""
    preprocess = given.preprocess
    chosen = {
        "device": given.device,
        "blocks": shown,
        "image_size": None if settings.resize == "none" else preprocess.size,
        "max_tokens": preprocess.max_tokens,
    }
    return settings.model_copy(update=chosen)
