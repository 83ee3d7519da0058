"""The report of an analysis: one offline HTML page, and the folder that it lies in."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sinder_cli.analysis.records import Analysis, FigureFile
from sinder_cli.defects.settings import RISE
from sinder_cli.events import Emit, tracked
from sinder_cli.files import replacing_folder, write_json, write_text
from sinder_cli.report import formatting
from sinder_cli.report.analysis import facts
from sinder_cli.report.analysis.facts import COLOUR_OF, labels_of, sides_of
from sinder_cli.report.analysis.figures import analysis_charts, file_of, image_figures
from sinder_cli.report.analysis.image_maps import (
    DrawnImage,
    ImageMaps,
    Scales,
    drawn_image,
    paint_image,
    shared_scales,
)
from sinder_cli.report.documents import analysis_document
from sinder_cli.report.drawing.pictures import Panel, image_file
from sinder_cli.report.drawing.scales import ANGLES, ColourScale
from sinder_cli.report.templates import html_template

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.analysis.run import AnalysisResult
    from sinder_cli.report.analysis.figures import ChartGroup
    from sinder_cli.report.analysis.image_maps import SideMaps
    from sinder_cli.report.drawing.canvas import Chart, ChartKind
    from sinder_cli.report.drawing.pictures import LabelledPicture


ATTENTION = (
    "Of cls to each patch in the last block, mean over heads;"
    " every map from its own smallest to its own largest weight."
)
UNSEEN = "its kernel does not expose the weights; --attention sdpa or eager does"
INPAINTED = "inpainted"  # the kind of a group
EMBEDDED_IMAGES = 24  # more would make the page too large for a phone


class PanelGroup(NamedTuple):
    """Panels that belong together; `kind` determines where the page puts them."""

    kind: str
    heading: str
    panels: list[Panel]
    note: str = ""


class PageImage(NamedTuple):
    """One image with its pictures and numbers; `attended` is True for each side whose attention is drawn."""

    name: str
    numbers: list[str]
    groups: list[PanelGroup]
    attended: tuple[bool, ...]


class Bar(NamedTuple):
    """A colour scale shown beside the pictures; `where` names the pictures that it applies to."""

    name: str
    scale: ColourScale
    where: str
    uri: str


class SideVerdict(NamedTuple):
    """The verdict on one side."""

    label: str
    colour: str
    sentence: str
    confidence: str


def render_analysis_page(
    analysis: Analysis, groups: Sequence[ChartGroup], images: Sequence[PageImage], drawn: int, scales: Scales | None
) -> str:
    """Return the page as one string of HTML that loads nothing; `drawn` is the number of images with figures."""
    labels = labels_of(analysis)
    return html_template("analysis.html.jinja").render(
        title=" and ".join(labels),
        labels=labels,
        sides=facts.side_names(analysis),
        verdicts=[
            SideVerdict(label, COLOUR_OF[side.verdict.kind], side.verdict.sentence, side.verdict.confidence)
            for label, side in zip(labels, sides_of(analysis), strict=True)
        ],
        analysis=analysis,
        images_sentence=facts.images_sentence(analysis),
        measures=facts.key_measures(analysis),
        norm_factor=facts.norm_factor(analysis),
        rise=RISE,
        gains=facts.gain_sentences(analysis),
        gain_measures=facts.gain_measures(analysis),
        gain_images=facts.gain_images(analysis),
        caution=formatting.CAUTION,
        blocks=facts.block_rows(analysis),
        pairs=facts.pair_rows(analysis),
        groups=[(group, [chart.svg() for chart in group.charts]) for group in groups],
        images=images,
        drawn=drawn,
        attention=_attention_words(analysis, images),
        broken=facts.has_broken_tokens(analysis),
        bars=_bars(scales, len(labels) > 1, _is_inpainted(images)) if scales else [],
        excluded=bool(analysis.settings.get("exclude_masked")),
        settings=facts.setting_rows(analysis),
        origin=facts.origin_rows(analysis),
        paper=formatting,
    )


def embedded(image: ImageMaps, scales: Scales, labels: Sequence[str]) -> PageImage:
    """Return one image's part of the page.

    `labels` names the sides of a comparison; for a single side it is one empty text.
    """
    outlying = " → ".join(f"{side.outlying:,}" for side in image.sides)
    largest = " → ".join(formatting.number(side.largest) for side in image.sides)
    numbers = [f"Outlying tokens {outlying}", f"Largest norm {largest}"]
    if any(side.broken for side in image.sides):
        numbers.append(f"Tokens not finite {' → '.join(f'{side.broken:,}' for side in image.sides)}")
    attended = tuple(side.attention is not None for side in image.sides)
    return PageImage(image.name, numbers, list(_groups(image, scales, labels)), attended)


def _attention_words(analysis: Analysis, images: Sequence[PageImage]) -> list[str]:
    """Return what the maps of attention show, if there are any, and why a side has none."""
    sides = sides_of(analysis)
    drawn = [any(image.attended[at] for image in images) for at in range(len(sides))]
    words = [ATTENTION] if any(drawn) else []
    for side, name, seen in zip(sides, facts.short_names(analysis), drawn, strict=True):
        if not seen:
            of = f" of {name}" if len(sides) == 2 else ""
            cls = any(block.cls_norm for block in side.blocks)
            words.append(f"The attention{of} is not drawn: {UNSEEN if cls else 'there is no cls token'}.")
    return words


def _groups(image: ImageMaps, scales: Scales, labels: Sequence[str]) -> Iterator[PanelGroup]:
    """Yield the groups of panels of one image.

    A single side has the photograph among its maps; for two sides it comes first, in a group of its own, and then both
    sides' maps, kind by kind.
    """
    photograph = _panel(image.photograph, sharp=False)
    alone = len(image.sides) == 1
    if not alone:
        yield PanelGroup("whole", "", [photograph, *([_panel(image.cosine)] if image.cosine else [])])
    for side, label in zip(image.sides, labels, strict=True):
        maps = [side.pca, side.norm, *([side.attention] if side.attention else [])]
        yield PanelGroup("main", _headed("Last block", label), [*([photograph] if alone else []), *map(_panel, maps)])
    for kind, heading in (("angles", "Angle to ν"), ("masks", "Marked by equation (5)")):
        for side, label in zip(image.sides, labels, strict=True):
            yield PanelGroup(kind, _headed(heading, label), [_panel(each) for each in getattr(side, kind)])
    for side, label in zip(image.sides, labels, strict=True):
        yield _target_group(side, label, scales)
    for side, label in zip(image.sides, labels, strict=True):
        if side.inpainted is not None:
            panels = [_panel(side.inpainted), _panel(side.somewhere)] if side.somewhere else [_panel(side.inpainted)]
            yield PanelGroup(INPAINTED, _headed("Against the inpainted original", label), panels, side.inpainted_words)


def _is_inpainted(images: Sequence[PageImage]) -> bool:
    return any(group.kind == INPAINTED for image in images for group in image.groups)


def _target_group(side: SideMaps, label: str, scales: Scales) -> PanelGroup:
    if side.block is None:
        return PanelGroup("targets", _headed("Learning target", label), [], "No block of this image is defective.")
    note = f"Norms {scales.norms[side.block].words}"
    heading = _headed(f"Learning target, block {side.block}", label)
    return PanelGroup("targets", heading, [_panel(each) for each in side.targets], note)


def _headed(heading: str, label: str) -> str:
    return f"{heading}, {label}" if label else heading


def _panel(shown: LabelledPicture, sharp: bool = True) -> Panel:
    if shown.picture is None:
        return Panel(shown.label, shown.alt, None)
    return Panel(shown.label, shown.alt, image_file(shown.picture, "png" if sharp else "jpeg"), sharp)


def _bars(scales: Scales, compared: bool, inpainted: bool) -> list[Bar]:
    shown = [
        ("Norm", scales.norms[-1], "on every map of the last block; each learning target names its own scale"),
        ("Angle", ANGLES, "on every map"),
        *([("Cosine", scales.cosine, "on every map")] if compared else []),
        *([("Inpainted", scales.inpainted, "on every map")] if inpainted and scales.inpainted else []),
    ]
    return [Bar(name, scale, where, image_file(scale.bar()).uri) for name, scale, where in shown]


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
        formats = ("png", *dict.fromkeys(result.analysis.settings.get("figure_formats", ())))
        charts = [chart for group in groups for chart in group.charts]
        figures = [_write_chart(temporary, chart, kind) for chart in charts for kind in formats]
        shown: list[PageImage] = []
        scales: Scales | None = None  # the same for all images
        for index, (image, shared) in enumerate(_painted(result, emit)):
            scales = shared
            figures += _write_figures(temporary, index, image, shared, result.analysis)
            if index < EMBEDDED_IMAGES:
                shown.append(embedded(image, shared, _side_labels(result.analysis)))
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


def _write_chart(folder: Path, chart: Chart, kind: ChartKind) -> FigureFile:
    figure = FigureFile(file=f"figures/{chart.name}.{kind}", caption=f"{chart.title}. {chart.caption}")
    (folder / figure.file).write_bytes(chart.written(kind))
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
