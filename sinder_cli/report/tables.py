"""Results as terminal tables, readable at 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sinder_cli.backbone.registry import InstalledBackbone
from sinder_cli.defects.rules import MIN_GAP
from sinder_cli.report import facts

if TYPE_CHECKING:
    from sinder_cli.api import Analysis
    from sinder_cli.defects.positions import PositionCheck
    from sinder_cli.defects.prediction import BlockSpectrum, Prediction
    from sinder_cli.repair.results import RepairResult


HEADINGS = {"attention": "attn", "mlp": "mlp", "block": "block", "cumulative": "cumul"}  # 80 columns hold no more


def prediction_table(prediction: Prediction) -> RenderableType:
    """σ₁, σ₁/σ₂ and the turn from the previous block, for each stage of each block."""
    table = _table(prediction.model)
    table.padding = (0, 1, 0, 0)  # one space between columns: two would not fit
    table.add_column("", justify="right")
    for stage in prediction.stages:
        table.add_column(f"{HEADINGS[stage]}\nσ₁", justify="right")
        table.add_column("\nσ₁/σ₂", justify="right")
        table.add_column("\nturn", justify="right")
    for rows in zip(*prediction.stages.values(), strict=True):
        cells = [cell for row in rows for cell in _spectrum_cells(row)]
        table.add_row(str(rows[0].block), *cells)
    return Group(table, *_prediction_words(prediction))


def _spectrum_cells(row: BlockSpectrum) -> list[Text]:
    dim = "" if row.pair.gap >= MIN_GAP else "dim"
    gap = f"{row.pair.gap:.2f}" if row.pair.gap < 100 else _short(row.pair.gap)
    cells = (_short(row.sigma), gap, _degrees(row.angle_to_previous))
    return [Text(cell, dim) for cell in cells]


def _prediction_words(prediction: Prediction) -> list[str]:
    words = []
    if "cumulative" in prediction.stages:
        settled = prediction.settled_from()
        words.append(
            f"The defect direction has settled from block {settled} on."
            if settled is not None
            else f"The defect direction does not settle: σ₁/σ₂ < {MIN_GAP}, or it keeps turning by over 5° a block."
        )
    words.append(f"turn: angle to the previous block's direction; dim: σ₁/σ₂ < {MIN_GAP}, direction not determined.")
    if prediction.position is not None:
        words.append(_position_words(prediction.position))
    return words


def _position_words(check: PositionCheck) -> str:
    if not check.outliers:
        return (
            f"Position embedding: no outlying patch among {check.patches}"
            f" (norm {check.median_norm:.3g}, at most {check.max_norm:.3g})."
        )
    worst = max(check.outliers, key=lambda outlier: outlier.norm)
    return (
        f"Position embedding: {len(check.outliers)} of {check.patches} patches stand out, patch {worst.patch} most:"
        f" norm {worst.norm:.3g} against {check.median_norm:.3g}, {worst.share:.0%} of its square in one dimension,"
        f" {worst.dimension}."
    )


def analysis_table(analysis: Analysis) -> RenderableType:
    """Norms of the residual stream, marked tokens, and observed against predicted direction, block by block."""
    title = f"{analysis.model}, {facts.counted(analysis.images, 'image')} of {analysis.image_size} px"
    table = _table(title)
    registers = any(block.register_norm is not None for block in analysis.blocks)
    names = [
        "block",
        "median\nnorm",
        "99 %\nnorm",
        "largest\nnorm",
        "masked\n(eq. 5)",
        "> 3 ×\nmedian",
        "σ₁/σ₂",
        "angle",
    ]
    names += ["cls\nnorm"] + (["register\nnorm"] if registers else [])
    for name in names:
        table.add_column(name, justify="right")
    for block in analysis.blocks:
        cells = [
            str(block.block),
            _short(block.median_norm),
            _short(block.p99_norm),
            _short(block.max_norm),
            str(block.masked_tokens),
            str(block.outlier_tokens),
            f"{block.gap:.2f}",
            _degrees(block.angle_to_predicted),
            _short(block.cls_norm),
        ]
        table.add_row(*cells, *([_short(block.register_norm)] if registers else []))
    words = "Patch tokens of the residual stream, before the final norm; angle: observed to predicted direction."
    skipped = [f"{facts.counted(len(analysis.skipped), 'image')} skipped."] if analysis.skipped else []
    return Group(table, words, *skipped)


def repair_table(result: RepairResult) -> RenderableType:
    """Before and after, and where the run directory is."""
    verdict = facts.verdict(result)
    table = _table("")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for row in facts.comparison(result):
        table.add_row(row.name, row.before, row.after)
    defects = result.summary["defects"]
    return Group(
        f"{verdict.word}: {verdict.sentence}",
        table,
        f"run directory: {result.folder}",
        f"defective tokens {defects['before']['tokens']} → {defects['after']['tokens']},"
        f" report: {result.folder / 'report.html'}",
    )


def backbones_table(rows: Sequence[InstalledBackbone]) -> RenderableType:
    """One line a model, and what it lacks to run; a plugin that cannot be loaded is named with the reason."""
    table = _table("")
    for name in ("name", "plugin", "distribution"):
        table.add_column(name)
    for name in ("parameters", "patch", "prefix"):
        table.add_column(name, justify="right")
    table.add_column("library", overflow="fold")  # a name cut short would help nobody
    for row in rows:
        listing = row.listing
        if listing is None:
            table.add_row("", row.plugin.name, row.plugin.distribution, "", "", "", Text(row.problem, "red"))
            continue
        sizes = (_millions(listing.parameters), _whole(listing.patch_size), _whole(listing.prefix_tokens))
        table.add_row(listing.name, row.plugin.name, row.plugin.distribution, *sizes, _library(row))
    return table


def _library(row: InstalledBackbone) -> Text:
    return Text(f"missing: {', '.join(row.missing)}", "red") if row.missing else Text("there")


def _table(title: str) -> Table:
    return Table(title=title or None, title_justify="left", box=None, padding=(0, 1), header_style="bold")


def _short(value: float | None) -> str:
    """Three significant digits in at most six characters."""
    if value is None:
        return ""
    if 100 <= abs(value) < 1e4:
        return f"{value:.0f}"
    return f"{value:.3g}" if 1e-2 <= abs(value) < 100 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def _degrees(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}°" if value >= 9.95 else f"{value:.1f}°"


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f} M"


def _whole(value: int | None) -> str:
    return "" if value is None else str(value)
