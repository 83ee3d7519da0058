"""One offline HTML page on a repair: the verdict, before and after in numbers and pictures, and how it was run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sinder_cli.report import facts
from sinder_cli.report.charts import Chart, line_chart, log_ticks
from sinder_cli.report.panels import Panel
from sinder_cli.report.templates import html_template

if TYPE_CHECKING:
    from sinder_cli.repair.results import RepairResult

SIDES = ("before", "after")


class Sample(NamedTuple):
    """One image's row of panels, with its own numbers."""

    name: str
    outliers: list[str]  # before, after
    largest: list[str]
    panels: list[Panel]


def render_repair_page(result: RepairResult) -> str:
    """The whole page as one string of HTML that loads nothing: styles, drawings and pictures are inside."""
    low, high = _shown_range(result)
    return html_template("repair.html.jinja").render(
        model=result.model,
        verdict=facts.verdict(result),
        comparison=facts.comparison(result),
        run=facts.run_facts(result),
        samples=_samples(result, low, high),
        scale={
            "low": facts.number(low),
            "high": facts.number(high),
            "ticks": log_ticks(low, high),
            "uri": _colour_bar_uri(),
        },
        charts=charts(read_metrics(result.folder / "metrics.jsonl"), result.config["settings"]["stop_density"]),
        settings=facts.setting_facts(result),
        origin=facts.origin_facts(result),
        patches=tuple(result.before.samples.shape[1:3]),
        evaluation_images=facts.counted(result.summary["evaluation_images"], "image"),
        facts=facts,
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; none if the file is not there."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def charts(metrics: list[dict[str, Any]], goal: float) -> list[Chart]:
    """The loss of the steps that had one, and the share of clean images; none for a run without steps."""
    losses = [(line["step"], line["loss"]) for line in metrics if line["loss"] is not None]
    clean = [(line["step"], 100 * line["density"]) for line in metrics]
    drawn = [
        line_chart(losses, "Loss", "step", "distance to target ÷ mean token norm"),
        line_chart(clean, "Clean images", "step", "share of recent images, %", top=100, goal=100 * goal),
    ]
    return [chart for chart in drawn if chart is not None]


def _shown_range(result: RepairResult) -> tuple[float, float]:
    """One scale of norms for every map on the page; with 3 × the median on it, harmless variation stays dark."""
    from sinder_cli.defects.tokens import OUTLIER_FACTOR
    from sinder_cli.report.figures import norm_range

    shown = len(result.pictures)
    before, after = result.before.norms[:shown], result.after.norms[:shown]
    low, high = norm_range(before, after)
    return low, max(high, OUTLIER_FACTOR * before.median().item())


def _samples(result: RepairResult, low: float, high: float) -> list[Sample]:
    from sinder_cli.defects.tokens import outlier_mask
    from sinder_cli.report.figures import data_uri, enlarged, norm_map, pca_maps, picture

    pca = pca_maps(result.before.samples, result.after.samples)  # two of [K, h, w, 3]
    samples = []
    for index, (pixels, path) in enumerate(zip(result.pictures, result.names, strict=True)):
        name = Path(path).name
        norms = [side.norms[index] for side in (result.before, result.after)]  # [h, w] each
        outliers = [f"{int(outlier_mask(side[None]).sum()):,}" for side in norms]
        largest = [facts.number(side.max().item()) for side in norms]
        image = data_uri(picture(pixels, result.mean, result.std), "jpeg")
        panels = [Panel("Image", f"{name}, as the model saw it", image)]
        for at, side in enumerate(SIDES):
            told = f"Token norms of {name}, {side}: largest {largest[at]}, outlying {outliers[at]}"
            panels.append(Panel(f"Norm, {side}", told, data_uri(enlarged(norm_map(norms[at], low, high)))))
        for at, side in enumerate(SIDES):
            told = f"Principal components of the tokens of {name}, {side}, as colours"
            panels.append(Panel(f"PCA, {side}", told, data_uri(enlarged(pca[at][index]))))
        samples.append(Sample(name, outliers, largest, panels))
    return samples


def _colour_bar_uri() -> str:
    from sinder_cli.report.figures import colour_bar, data_uri

    return data_uri(colour_bar())
