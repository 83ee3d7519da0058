"""An evaluation as files: the document, a CSV of all values, and a page with the images that changed most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sinder_cli.escaping import printable
from sinder_cli.evaluation.contract import SideName
from sinder_cli.evaluation.folder import DOCUMENT, PAGE, PICTURES, TABLE, begin_evaluation
from sinder_cli.evaluation.registry import blamed
from sinder_cli.evaluation.sentences import headline, shown
from sinder_cli.evaluation.settings import EvaluateSettings
from sinder_cli.events import Emit, Warned, tracked
from sinder_cli.files import output_error, write_json, write_text
from sinder_cli.images.decoding import UnreadableImageError
from sinder_cli.report import formatting
from sinder_cli.report.documents import evaluation_document
from sinder_cli.report.drawing.pictures import Panel, enlarged, image_file, reduced
from sinder_cli.report.evaluation.charts import differences_chart
from sinder_cli.report.formatting import Named, counted, csv_text, duration
from sinder_cli.report.templates import html_template

if TYPE_CHECKING:
    from PIL.Image import Image

    from sinder_cli.evaluation.contract import Pixels
    from sinder_cli.evaluation.records import Evaluation, FigureRecord, TaskRecord, ValueRecord
    from sinder_cli.evaluation.run import EvaluationResult, Scored
    from sinder_cli.report.drawing.canvas import Chart, ChartKind

UNJUDGED = ("within noise", "too few images")
SIDE_PIXELS = 320  # of a picture
KINDS = {"better": "good", "worse": "bad"}  # of a standing, as a colour; all others have none


class Cell(NamedTuple):
    """One value of a table, its difference to the original in words, and the class of its colour."""

    value: str
    difference: str
    kind: str


class Row(NamedTuple):
    """One figure: its name, what is better, and a cell per side; None for a side without it."""

    name: str
    better: str
    caution: str
    cells: list[Cell | None]


class ChangedImage(NamedTuple):
    """One of the images that changed most: its name, how, and its pictures."""

    name: str
    change: str
    panels: list[Panel]


class TaskSection(NamedTuple):
    """One task of the page."""

    task: TaskRecord
    facts: list[Named]
    rows: list[Row]
    chart: Chart | None
    notes: list[str]
    images: list[ChangedImage]


def write_evaluation(folder: Path, result: EvaluationResult, settings: EvaluateSettings, emit: Emit) -> None:
    """Write everything into `folder`: the values first, so that no picture that fails can cost the results.

    Raises `CannotCreateError` or `StorageError` for what the file system refuses.
    """
    write_values(folder, result)
    labels = {side.side: side.label for side in result.evaluation.sides}
    sections = [
        TaskSection(
            record,
            _facts(record),
            [_row(figure, result.evaluation) for figure in record.figures],
            _write_chart(folder / PICTURES, differences_chart(record, labels), settings.figure_formats),
            [f"{labels[side]}: {note}" for side, notes in record.notes.items() for note in notes],
            list(_changed(folder / PICTURES, scored, record, labels, settings.figures, emit)),
        )
        for record, scored in zip(result.evaluation.tasks, result.scored, strict=True)
    ]
    write_text(folder / PAGE, render_evaluation_page(result.evaluation, sections))


def _write_chart(folder: Path, chart: Chart | None, formats: Sequence[ChartKind]) -> Chart | None:
    """Write a chart, if there is one, as PNG and in these formats besides; return it."""
    if chart is not None:
        kinds: list[ChartKind] = ["png", *formats]
        for kind in dict.fromkeys(kinds):
            _write_bytes(folder / f"{chart.name}.{kind}", chart.written(kind))
    return chart


def write_values(folder: Path, result: EvaluationResult) -> None:
    """Write the document and the table of all tasks so far; page and pictures of an earlier evaluation are removed.

    Raises `CannotCreateError` or `StorageError` for what the file system refuses.
    """
    begin_evaluation(folder)
    write_json(folder / DOCUMENT, evaluation_document(result.evaluation))
    write_text(folder / TABLE, csv_text(list(result.evaluation.rows())))


def render_evaluation_page(evaluation: Evaluation, sections: Sequence[TaskSection]) -> str:
    """Return the page as one string of HTML that loads nothing."""
    models = list(dict.fromkeys(side.model for side in evaluation.sides))
    return html_template("evaluation.html.jinja").render(
        title=" and ".join(models),
        headline=headline(evaluation),
        sides=evaluation.sides,
        sections=sections,
        settings=formatting.setting_rows(EvaluateSettings, evaluation.settings),
        version=evaluation.sinder,
        paper=formatting,
    )


def _facts(record: TaskRecord) -> list[Named]:
    trained = [Named("Trained on", counted(record.trained_on, "image"))] if record.trained_on else []
    classes = [Named("Classes", f"{len(record.classes):,}")] if record.classes else []
    own = ", ".join(f"{name} {value}" for name, value in record.settings.items())
    return [
        Named("Data", record.data),
        Named("Scored", counted(record.images, "image")),
        *trained,
        *classes,
        *([Named("Skipped", f"{len(record.skipped):,}")] if record.skipped else []),
        *([Named("Settings", own)] if own else []),
        Named("Time of scoring", duration(record.seconds)),
    ]


def _row(figure: FigureRecord, evaluation: Evaluation) -> Row:
    unit = f", {figure.unit}" if figure.unit else ""
    cells = [_cell(figure.of(side.side)) for side in evaluation.sides]
    better = "" if figure.better == "neither" else f"{figure.better} is better"
    if figure.noise:
        better += f"; repetitions differ by ±{figure.noise:g}"
    return Row(f"{figure.name}{unit}", better, figure.caution, cells)


def _cell(value: ValueRecord | None) -> Cell | None:
    if value is None:
        return None
    if value.value is None:
        return Cell(formatting.NOTHING, "", "none")
    number = f"{value.value:.2f}" if abs(value.value) >= 10 else f"{value.value:.4f}"
    if value.to_original is None:
        return Cell(number, "", "none")
    of = value.to_original
    words = shown(of.value)
    if of.low is not None and of.high is not None:
        words += f" [{shown(of.low)}, {shown(of.high)}]"
    return Cell(number, f"{words}, {of.standing}" if of.standing in UNJUDGED else words, KINDS.get(of.standing, "none"))


def _changed(
    folder: Path, scored: Scored, record: TaskRecord, labels: Mapping[SideName, str], most: int, emit: Emit
) -> Iterator[ChangedImage]:
    """Yield the images that the second model changed most, both ways, and write their pictures.

    An image that can no longer be read is left out, with a warning.
    """
    pair = _compared_sides(scored)
    if pair is None or most == 0:
        return
    before, after = (scored.scores[side] for side in pair)
    if before.by_image is None or after.by_image is None:
        return
    changes = (after.by_image - before.by_image).nan_to_num()
    order = changes.argsort(descending=True).tolist()
    half = (min(most, len(order)) + 1) // 2
    best, worst = order[:half], order[half:][::-1][: min(most, len(order)) - half]
    for index in tracked([*best, *worst], emit, f"{record.task}: pictures", len(best) + len(worst), "images"):
        name = printable("/".join(Path(scored.dataset.test.name(index)).parts[-2:]))  # a class is named by its folder
        try:
            photograph = scored.dataset.test.load(index)
        except UnreadableImageError as error:
            emit(Warned(f"no pictures of {name}: {error}"))
            continue
        with blamed(scored.task):
            panels = list(_panels(scored, index, photograph, pair, labels))
        _write_panels(folder, f"{record.task}-{index:05}", panels)
        change = float(changes[index])
        words = "no change" if change == 0 else f"{'better' if change > 0 else 'worse'} by {abs(change):.3g}"
        yield ChangedImage(name, f"{words} as scored", panels)


def _write_panels(folder: Path, stem: str, panels: Sequence[Panel]) -> None:
    for at, panel in enumerate(panels):
        if panel.image is not None:
            _write_bytes(folder / f"{stem}-{at}{panel.image.suffix}", panel.image.content)


def _write_bytes(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise output_error(path, error) from error


def _compared_sides(scored: Scored) -> tuple[SideName, SideName] | None:
    others: tuple[SideName, ...] = ("repaired", "inpainted")
    second = next((side for side in others if side in scored.scores), None)
    return None if second is None else ("original", second)


def _panels(
    scored: Scored, index: int, image: Image, pair: tuple[SideName, SideName], labels: Mapping[SideName, str]
) -> Iterator[Panel]:
    """Yield image, truth, before and after."""
    import numpy as np

    yield Panel("image", "the image", image_file(reduced(np.asarray(image.convert("RGB")), SIDE_PIXELS), "jpeg"))
    if scored.task.truth is not None:
        yield _panel("truth", scored.task.truth(scored.dataset, index))
    for side in pair:
        picture = scored.scores[side].picture
        if picture is not None:
            yield _panel(labels[side], picture(index))


def _panel(label: str, picture: Pixels) -> Panel:
    sharp = max(picture.shape[:2]) < SIDE_PIXELS
    shown_at = enlarged(picture, SIDE_PIXELS) if sharp else reduced(picture, SIDE_PIXELS)
    return Panel(label, f"{label}: what the features say of the image", image_file(shown_at), sharp)
