"""One offline HTML page on a repair: the verdict, before and after in numbers and pictures, and how it was run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinder_cli.files import public_model
from sinder_cli.report import wording
from sinder_cli.report.drawing.pictures import data_uri
from sinder_cli.report.pages.templates import html_template
from sinder_cli.report.repair import facts
from sinder_cli.report.repair.line_chart import LineChart, line_chart
from sinder_cli.report.repair.samples import samples_of

if TYPE_CHECKING:
    from sinder_cli.repair.results import RepairResult
    from sinder_cli.report.repair.facts import Recorded


def render_repair_page(result: RepairResult) -> str:
    """The whole page as one string of HTML that loads nothing: styles, drawings and pictures are inside."""
    samples = samples_of(result)
    return html_template("repair/page.html.jinja").render(
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
        ratios_uri=data_uri(samples.ratios.bar()),
        fidelity_uri=data_uri(samples.fidelity.bar()),
        charts=charts(read_lines(result.folder / "metrics.jsonl"), result.config["settings"]["stop_density"]),
        guard=guard_charts(read_lines(result.folder / "evaluations.jsonl"), result),
        kept=result.summary["best_step"],
        caution=wording.CAUTION,
        settings=facts.setting_facts(result),
        origin=facts.origin_facts(result),
        patches=tuple(result.before.samples.shape[1:3]),
        guard_images=wording.counted(result.summary["evaluation_images"], "image"),
        judged_on=facts.guard_images(result.summary),
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
        line_chart(clean, "Clean images", "step", "share of the latest images, %", top=100, goal=100 * goal),
    ]
    return [chart for chart in drawn if chart is not None]


def guard_charts(evaluations: list[dict[str, Any]], result: Recorded) -> list[LineChart]:
    """What was seen on the guard's images during the run, from the original on; none where nobody looked."""
    if not evaluations:
        return []
    summary = result.summary
    start = {"step": 0, "outlying": summary["defects"]["before"]["tokens"]}
    lines = [start | summary["fidelity"]["to_inpainted"]["before"], *evaluations]
    kept = summary["best_step"] or 0
    outlying = [(line["step"], line["outlying"]) for line in lines]
    drawn = [line_chart(outlying, "Outlying tokens, guard", "step", "tokens outlying at some block", kept=kept)]
    for name, key in (("cls, guard", "cls"), ("Good tokens, guard", "good")):
        seen = [(line["step"], max(0.0, 1 - line[key])) for line in lines if line[key] is not None]
        drawn.append(line_chart(seen, name, "step", "1 − cosine to the inpainted original", kept=kept))
    return [chart for chart in drawn if chart is not None]
