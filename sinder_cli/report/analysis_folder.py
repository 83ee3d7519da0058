"""The folder that an analysis leaves behind: numbers, directions, figures and a page, whole or not at all."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.analysis.records import Analysis, FigureFile
from sinder_cli.events import Emit, tracked
from sinder_cli.files import replacing_folder, write_json, write_text
from sinder_cli.report.analysis_charts import analysis_charts
from sinder_cli.report.analysis_facts import labels_of
from sinder_cli.report.analysis_page import EMBEDDED_IMAGES, embedded, render_analysis_page
from sinder_cli.report.documents import finite
from sinder_cli.report.plates import file_of, plates
from sinder_cli.report.tiles import ImageTiles, Scales, Sitter, image_tiles, shared_scales, sitter

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.analysis.results import AnalysisResult
    from sinder_cli.report.canvas import Chart

SCALED_BY = 64  # images whose maps set the colours of all: they are kept until all of them are seen
PREFIXES = ("", "other.")
CONTENT = "defect directions before the final norm, rows of unit norm; a row of zeros: no outlying token was observed"


def write_analysis(folder: Path, result: AnalysisResult, emit: Emit) -> Analysis:
    """Write everything into `folder`, which is absent or empty; the record comes back with its figures listed.

    Images are drawn as they come and not kept. Nothing is left of a folder that could not be finished.
    Raises `CannotCreateError` or `StorageError` for what the file system refuses.
    """
    with replacing_folder(folder) as temporary:
        (temporary / "figures").mkdir()
        _write_directions(temporary / "directions.safetensors", result)
        groups = analysis_charts(result)
        figures = [_write_chart(temporary, chart) for group in groups for chart in group.charts]
        shown, scales = [], None
        for index, (image, scales) in enumerate(_painted(result, emit)):
            figures += _write_plates(temporary, index, image, scales, result.analysis)
            if index < EMBEDDED_IMAGES:
                shown.append(embedded(image, scales, _side_labels(result.analysis)))
        analysis = result.analysis.model_copy(update={"figures": tuple(figures)})
        write_json(temporary / "report.json", finite(analysis.model_dump(mode="json")))
        write_text(temporary / "report.html", render_analysis_page(analysis, groups, shown, result.drawn, scales))
    return analysis


def _write_directions(path: Path, result: AnalysisResult) -> None:
    """Predicted and observed directions, a `[blocks, N]` float32 tensor each; the second side's begin with `other.`."""
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


def _painted(result: AnalysisResult, emit: Emit) -> Iterator[tuple[ImageTiles, Scales]]:
    """Every image's maps, in colours that the first images settle for all."""
    labels = _side_labels(result.analysis)
    sitters = (sitter(portrait, result.mean, result.std) for portrait in result.portraits)
    for each, scales in tracked(_with_scales(sitters, result.analysis), emit, "drawing", result.drawn, "images"):
        yield image_tiles(each, scales, labels), scales


def _with_scales(sitters: Iterator[Sitter], analysis: Analysis) -> Iterator[tuple[Sitter, Scales]]:
    first = deque(islice(sitters, SCALED_BY))
    scales = shared_scales(analysis, first)
    while first:
        yield first.popleft(), scales
    for each in sitters:
        yield each, scales


def _write_plates(folder: Path, index: int, image: ImageTiles, scales: Scales, analysis: Analysis) -> list[FigureFile]:
    figures = []
    for plate in plates(image, scales, _side_labels(analysis), analysis):
        figure = FigureFile(file=file_of(index, image.name, plate.name), caption=plate.caption)
        (folder / figure.file).write_bytes(plate.png(image.name))
        figures.append(figure)
    return figures


def _side_labels(analysis: Analysis) -> list[str]:
    """The sides' names where there are two; a single one needs none on its pictures."""
    return labels_of(analysis) if analysis.other else [""]
