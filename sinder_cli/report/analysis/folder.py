"""The output folder of an analysis: numbers, directions, figures and a page, written completely or not at all."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.analysis.records import Analysis, FigureFile
from sinder_cli.events import Emit, tracked
from sinder_cli.files import replacing_folder, write_json, write_text
from sinder_cli.report.analysis.facts import labels_of
from sinder_cli.report.analysis.figures import analysis_charts, file_of, image_figures
from sinder_cli.report.analysis.image_maps import (
    DrawnImage,
    ImageMaps,
    Scales,
    drawn_image,
    paint_image,
    shared_scales,
)
from sinder_cli.report.analysis.page import EMBEDDED_IMAGES, embedded, render_analysis_page
from sinder_cli.report.documents import analysis_document

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.analysis.run import AnalysisResult
    from sinder_cli.report.drawing.canvas import Chart

SCALED_BY = 64  # first images, whose maps set the colours of all; kept in memory until all of them were seen
PREFIXES = ("", "other.")
CONTENT = "defect directions before the final norm, rows of unit norm; a row of zeros: no outlying token was observed"


def write_analysis(folder: Path, result: AnalysisResult, emit: Emit) -> Analysis:
    """Write everything into `folder`, which is absent or empty; return the record with its figures listed.

    Images are drawn as they come and not kept in memory. If writing fails, nothing is left of the folder.
    Raises `CannotCreateError` or `StorageError` for what the file system refuses.
    """
    with replacing_folder(folder) as temporary:
        (temporary / "figures").mkdir()
        _write_directions(temporary / "directions.safetensors", result)
        groups = analysis_charts(result)
        figures = [_write_chart(temporary, chart) for group in groups for chart in group.charts]
        shown, scales = [], None
        for index, (image, scales) in enumerate(_painted(result, emit)):
            figures += _write_figures(temporary, index, image, scales, result.analysis)
            if index < EMBEDDED_IMAGES:
                shown.append(embedded(image, scales, _side_labels(result.analysis)))
        analysis = result.analysis.model_copy(update={"figures": tuple(figures)})
        write_json(temporary / "report.json", analysis_document(analysis))
        write_text(temporary / "report.html", render_analysis_page(analysis, groups, shown, result.drawn, scales))
    return analysis


def _write_directions(path: Path, result: AnalysisResult) -> None:
    """Write predicted and observed directions, each as a float32 tensor `[blocks, N]`.

    Names of the second side's tensors begin with `other.`.
    """
    from sinder_cli.backbone.sources import infos_of
    from sinder_cli.backbone.storing import write_safetensors

    tensors: dict[str, Tensor] = {}
    for prefix, prediction, survey in zip(PREFIXES, result.predictions, result.surveys, strict=False):
        tensors |= {f"{prefix}predicted.{stage}": prediction.directions(stage) for stage in prediction.stages}
        tensors[f"{prefix}observed"] = survey.observed
    metadata = {"model": " | ".join(labels_of(result.analysis)), "content": CONTENT}
    write_safetensors(path, infos_of(tensors), tensors.values(), metadata)


def _write_chart(folder: Path, chart: Chart) -> FigureFile:
    figure = FigureFile(file=f"figures/{chart.name}.png", caption=f"{chart.title}. {chart.caption}")
    (folder / figure.file).write_bytes(chart.png())
    return figure


def _painted(result: AnalysisResult, emit: Emit) -> Iterator[tuple[ImageMaps, Scales]]:
    """Yield every image's maps, in colours that the first images determine for all."""
    labels = _side_labels(result.analysis)
    images = (drawn_image(portrait, result.mean, result.std) for portrait in result.portraits)
    for each, scales in tracked(_with_scales(images, result.analysis), emit, "drawing", result.drawn, "images"):
        yield paint_image(each, scales, labels), scales


def _with_scales(images: Iterator[DrawnImage], analysis: Analysis) -> Iterator[tuple[DrawnImage, Scales]]:
    first = deque(islice(images, SCALED_BY))
    scales = shared_scales(analysis, first)
    while first:
        yield first.popleft(), scales
    for each in images:
        yield each, scales


def _write_figures(folder: Path, index: int, image: ImageMaps, scales: Scales, analysis: Analysis) -> list[FigureFile]:
    figures = []
    for figure in image_figures(image, scales, _side_labels(analysis), analysis):
        file = FigureFile(file=file_of(index, image.name, figure.name), caption=figure.caption)
        (folder / file.file).write_bytes(figure.png(image.name))
        figures.append(file)
    return figures


def _side_labels(analysis: Analysis) -> list[str]:
    """Return the names of both sides; one empty text for a single side, whose pictures need no name."""
    return labels_of(analysis) if analysis.other else [""]
