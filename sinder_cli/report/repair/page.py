"""One offline HTML page on a repair: the verdict, before and after in numbers and pictures, and how it was run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sinder_cli.report import wording
from sinder_cli.report.drawing.pictures import data_uri, enlarged, pca_maps, picture
from sinder_cli.report.drawing.scales import NormSpread, norm_scale
from sinder_cli.report.pages.panels import Panel
from sinder_cli.report.pages.templates import html_template
from sinder_cli.report.repair import facts
from sinder_cli.report.repair.line_chart import LineChart, line_chart

if TYPE_CHECKING:
    from sinder_cli.repair.results import RepairResult
    from sinder_cli.report.drawing.scales import ColourScale

SIDES = ("before", "after")


class Sample(NamedTuple):
    """One image's row of panels, with its own numbers."""

    name: str
    outliers: list[str]  # before, after
    largest: list[str]
    panels: list[Panel]


def render_repair_page(result: RepairResult) -> str:
    """The whole page as one string of HTML that loads nothing: styles, drawings and pictures are inside."""
    norms = _norm_scale(result)
    return html_template("repair/page.html.jinja").render(
        model=result.model,
        verdict=facts.verdict(result),
        comparison=facts.comparison(result),
        run=facts.run_facts(result),
        samples=_samples(result, norms),
        norms=norms,
        norms_uri=data_uri(norms.bar()),
        charts=charts(read_lines(result.folder / "metrics.jsonl"), result.config["settings"]["stop_density"]),
        held_out=held_out_charts(read_lines(result.folder / "evaluations.jsonl")),
        settings=facts.setting_facts(result),
        origin=facts.origin_facts(result),
        patches=tuple(result.before.samples.shape[1:3]),
        evaluation_images=wording.counted(result.summary["evaluation_images"], "image"),
        paper=wording,
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` or `evaluations.jsonl`; none if the file is not there."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def charts(metrics: list[dict[str, Any]], goal: float) -> list[LineChart]:
    """The loss of the steps that had one, and the share of clean images; none for a run without steps."""
    losses = [(line["step"], line["loss"]) for line in metrics if line["loss"] is not None]
    clean = [(line["step"], 100 * line["density"]) for line in metrics]
    drawn = [
        line_chart(losses, "Loss", "step", "distance to target ÷ mean token norm"),
        line_chart(clean, "Clean images", "step", "share of recent images, %", top=100, goal=100 * goal),
    ]
    return [chart for chart in drawn if chart is not None]


def held_out_charts(evaluations: list[dict[str, Any]]) -> list[LineChart]:
    """What was seen on held-out images during the run; none where nobody looked."""
    masked = [(line["step"], 100 * line["masked_share"]) for line in evaluations]
    seen = [(line["step"], line["cls_cosine"]) for line in evaluations if line["cls_cosine"] is not None]
    turned = [(step, max(0.0, 1 - cosine)) for step, cosine in seen]
    drawn = [
        line_chart(masked, "Masked tokens, held-out images", "step", "share of patch tokens, %"),
        line_chart(turned, "cls, held-out images", "step", "1 − cosine to the original, mean"),
    ]
    return [chart for chart in drawn if chart is not None]


def _norm_scale(result: RepairResult) -> ColourScale:
    """One scale of norms for every map on the page."""
    shown = len(result.pictures)
    return norm_scale(NormSpread.of(side.norms[:shown]) for side in (result.before, result.after))


def _samples(result: RepairResult, scale: ColourScale) -> list[Sample]:
    from sinder_cli.defects.tokens import outlier_mask

    pca = pca_maps(result.before.samples, result.after.samples)  # two of [K, h, w, 3]
    samples = []
    for index, (pixels, path) in enumerate(zip(result.pictures, result.names, strict=True)):
        name = Path(path).name
        norms = [side.norms[index] for side in (result.before, result.after)]  # [h, w] each
        outliers = [f"{int(outlier_mask(side[None]).sum()):,}" for side in norms]
        largest = [wording.number(side.max().item()) for side in norms]
        image = data_uri(picture(pixels, result.mean, result.std), "jpeg")
        panels = [Panel("Image", f"{name}, as the model saw it", image)]
        for at, side in enumerate(SIDES):
            told = f"Token norms of {name}, {side}: largest {largest[at]}, outlying {outliers[at]}"
            panels.append(Panel(f"Norm, {side}", told, data_uri(enlarged(scale.paint(norms[at])))))
        for at, side in enumerate(SIDES):
            told = f"Principal components of the tokens of {name}, {side}, as colours"
            panels.append(Panel(f"PCA, {side}", told, data_uri(enlarged(pca[at][index]))))
        samples.append(Sample(name, outliers, largest, panels))
    return samples
