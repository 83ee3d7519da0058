"""One offline HTML page on a repair: the verdict, before and after in numbers and pictures, and how it was run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sinder_cli.escaping import printable
from sinder_cli.files import public_model, write_text
from sinder_cli.report import formatting
from sinder_cli.report.cards import render_card
from sinder_cli.report.drawing.line_chart import Marks, line_chart
from sinder_cli.report.drawing.pictures import Panel, enlarged, image_file, pca_maps, picture
from sinder_cli.report.drawing.scales import FIDELITY, NormSpread, norm_scale
from sinder_cli.report.formatting import Named, number
from sinder_cli.report.repair import facts
from sinder_cli.report.repair.pictures import write_pictures
from sinder_cli.report.templates import html_template

if TYPE_CHECKING:
    from sinder_cli.repairing.folder import RunFolder
    from sinder_cli.repairing.guard import Snapshot
    from sinder_cli.repairing.results import RepairResult
    from sinder_cli.report.drawing.canvas import Chart
    from sinder_cli.report.drawing.pictures import Picture
    from sinder_cli.report.drawing.scales import ColourScale
    from sinder_cli.report.repair.facts import Recorded


def render_repair_page(result: RepairResult, drawn: Sequence[Chart] | None = None) -> str:
    """Return the page as one string of HTML that loads nothing: styles, charts and pictures are inside it."""
    samples = samples_of(result)
    drawn = repair_charts(result) if drawn is None else drawn
    return html_template("repair.html.jinja").render(
        model=public_model(result.model),
        verdict=facts.verdict(result),
        changed=bool(result.summary["changed_weights"]),
        comparison=facts.comparison(result),
        rule=facts.rule_words(result),
        run=facts.run_facts(result),
        blocks=facts.block_rows(result),
        block_words=facts.block_words(result),
        marked=facts.marked_tokens(result),
        marked_count=int(result.before.ever.sum()),
        samples=samples,
        ratios_uri=image_file(samples.ratios.bar()).uri,
        fidelity_uri=image_file(samples.fidelity.bar()).uri,
        charts=[(chart, chart.svg()) for chart in drawn],
        guard=any(chart.name.startswith(GUARD) for chart in drawn),
        kept=result.summary["best_step"],
        caution=formatting.CAUTION,
        settings=facts.setting_facts(result),
        origin=facts.origin_facts(result),
        patches=tuple(result.before.samples.shape[1:3]),
        guard_images=formatting.counted(result.summary["evaluation_images"], "image"),
        judged_on=facts.guard_images(result.summary),
        paper=formatting,
    )


def write_repair(folder: RunFolder, result: RepairResult) -> None:
    """Write page, card and the first image's pictures into the run directory, each whole or not at all.

    Raises `StorageError` or `CannotCreateError` for what the file system refuses.
    """
    first = samples_of(result).images[:1]
    panels = [panel for sample in first for panel in (sample.image, *(each for pair in sample.maps for each in pair))]
    drawn = repair_charts(result)
    write_pictures(folder.pictures, panels, drawn, result.config["settings"].get("figure_formats", ()))
    write_text(folder.report, render_repair_page(result, drawn))
    write_text(folder.card, render_card(result))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records in `metrics.jsonl` or `evaluations.jsonl`; an empty list if the file does not exist."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


GUARD = "guard"  # begins the names of charts of what the guard saw


def repair_charts(result: RepairResult) -> list[Chart]:
    """Return all charts of a run; none of a run without steps."""
    metrics = read_lines(result.folder / "metrics.jsonl")
    if not metrics:
        return []
    looked = guard_charts(read_lines(result.folder / "evaluations.jsonl"), result)
    return [*step_charts(metrics, result.config["settings"]["stop_clean_fraction"]), *looked]


def step_charts(metrics: list[dict[str, Any]], goal: float) -> list[Chart]:
    """Return charts of the loss, of the steps that had one, and of the share of clean images; none without steps."""
    losses = [(line["step"], line["loss"]) for line in metrics if line["loss"] is not None]
    clean = [(line["step"], 100 * line["clean_fraction"]) for line in metrics]
    drawn = [
        line_chart(losses, "loss", "Loss", ("step", "distance to target ÷ mean token norm")),
        line_chart(
            clean, "clean", "Clean images", ("step", "share of the latest, %"), top=100, marks=Marks(goal=100 * goal)
        ),
    ]
    return [chart for chart in drawn if chart is not None]


def guard_charts(evaluations: list[dict[str, Any]], result: Recorded) -> list[Chart]:
    """Return charts of the evaluations on the guard, beginning with the original; none without evaluations."""
    if not evaluations:
        return []
    summary = result.summary
    start = {"step": 0, "outlying": summary["defects"]["before"]["tokens"]}
    lines = [start | summary["fidelity"]["to_inpainted"]["before"], *evaluations]
    marks = Marks(kept=summary["best_step"] or 0)
    outlying = [(line["step"], line["outlying"]) for line in lines]
    labels = ("step", "tokens outlying at some block")
    drawn = [line_chart(outlying, f"{GUARD}-outlying", "Outlying tokens, guard", labels, marks=marks)]
    for title, key in (("cls, guard", "cls"), ("Good tokens, guard", "good")):
        seen = [(line["step"], max(0.0, 1 - line[key])) for line in lines if line[key] is not None]
        labels = ("step", "1 − cosine to the inpainted original")
        drawn.append(line_chart(seen, f"{GUARD}-{key}", title, labels, marks=marks))
    return [chart for chart in drawn if chart is not None]


class Sample(NamedTuple):
    """One image: its numbers, the image itself, and its maps, each before and after, or of the original alone."""

    name: str
    numbers: list[Named]
    image: Panel
    maps: list[tuple[Panel, ...]]


class Samples(NamedTuple):
    """All images that are shown, and the scales of their maps; `blocks` are the blocks whose norms are shown."""

    images: list[Sample]
    blocks: list[int]
    ratios: ColourScale
    fidelity: ColourScale


def samples_of(result: RepairResult) -> Samples:
    """Return the images before and after the repair; if no weight was changed, of the original alone."""
    sides = {"before": result.before, "after": result.after}
    if not result.summary["changed_weights"]:
        sides = {"original": result.before}
    last = result.before.norms.shape[0] - 1
    blocks = sorted({result.summary["defects"]["before"]["worst_block"], last})
    ratios = _ratio_scale(list(sides.values()), blocks, len(result.pictures))
    pca = dict(zip(("before", "after"), pca_maps(result.before.samples, result.after.samples), strict=True))
    pca["original"] = pca["before"]
    images = []
    for index, path in enumerate(result.names):
        name = printable(Path(path).name)
        shown = picture(result.pictures[index], result.mean, result.std)
        rows = [_maps(name, side, of, index, blocks, ratios, pca[side][index]) for side, of in sides.items()]
        images.append(
            Sample(
                name,
                _numbers(list(sides.values()), index),
                Panel("Image", f"{name}, as the model saw it", image_file(shown, "jpeg")),
                list(zip(*rows, strict=True)),
            )
        )
    return Samples(images, blocks, ratios, FIDELITY)


def _ratio_scale(sides: list[Snapshot], blocks: list[int], shown: int) -> ColourScale:
    """Return one scale of norms ÷ median for every map on the page."""
    scale = norm_scale(NormSpread.of(side.ratios[block, :shown]) for side in sides for block in blocks)
    return replace(scale, label="L2 norm ÷ median of the image")


def _maps(
    name: str, side: str, of: Snapshot, index: int, blocks: list[int], ratios: ColourScale, pca: Picture
) -> list[Panel]:
    panels = []
    for block in blocks:
        values = of.ratios[block, index]
        count, largest = int(of.outlying[block, index].sum()), number(values.max().item(), 3)
        alt = f"Norms ÷ median of {name} after block {block}, {side}: largest {largest}, {count:,} outlying"
        panels.append(_panel(f"Norm, block {block}", side, alt, ratios.paint(values)))
    panels.append(_panel("PCA", side, f"Principal components of the tokens of {name}, {side}, as colours", pca))
    cosines = of.to_inpainted[index]
    lowest = number(cosines.min().item(), 3)
    alt = f"Cosine of each token of {name} to the inpainted original, {side}: lowest {lowest}"
    panels.append(_panel("Fidelity", side, alt, FIDELITY.paint(cosines)))
    return panels


def _panel(what: str, side: str, alt: str, colours: Picture) -> Panel:
    return Panel(f"{what}, {side}", alt, image_file(enlarged(colours)))


def _numbers(sides: list[Snapshot], index: int) -> list[Named]:
    """Return the numbers of one image, on each side."""
    tokens = [f"{int(side.outlying[:, index].any(dim=0).sum()):,}" for side in sides]
    largest = [number(side.ratios[:, index].max().item(), 3) for side in sides]
    rows = {"Outlying tokens": tokens, "Largest norm ÷ median": largest}
    heads = [side.cls_to_inpainted for side in sides]
    cosines = [f"{head[index].item():.4f}" for head in heads if head is not None]
    if cosines:
        rows["cls to the inpainted original"] = cosines
    return [Named(name, " → ".join(values)) for name, values in rows.items()]
