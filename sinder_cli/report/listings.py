"""Lists as terminal tables: models, runs, and what is installed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sinder_cli.escaping import printable

if TYPE_CHECKING:
    from sinder_cli.backbone.registry import InstalledBackbone
    from sinder_cli.diagnosis import Finding
    from sinder_cli.repairing.runs import ListedRun


def plain_table(title: str) -> Table:
    """Return a table without lines, with a heading above it unless `title` is empty."""
    return Table(title=title or None, title_justify="left", box=None, padding=(0, 1), header_style="bold")


def backbones_table(rows: Sequence[InstalledBackbone]) -> RenderableType:
    """Return one line per model; below, whose plugins are others', what they lack, and why some cannot be loaded.

    All that would make a line longer is below, so that names stay whole at 80 columns.
    """
    from sinder_cli.backbone.registry import is_built_in

    table = plain_table("")
    table.add_column("name", overflow="fold")  # a shortened name would be of no use
    for name in ("parameters", "patch", "prefix"):
        table.add_column(name, justify="right")
    for row in rows:
        if listing := row.listing:
            sizes = (_millions(listing.parameters), _whole(listing.patch_size), _whole(listing.prefix_tokens))
            table.add_row(Text(listing.name, "dim" if row.missing else ""), *sizes)
    others = {row.plugin.name: row.plugin.distribution for row in rows if not is_built_in(row.plugin)}
    missing = {row.plugin.name: ", ".join(row.missing) for row in rows if row.missing}
    return Group(
        table,
        *(Text(f"{name} comes from {distribution}") for name, distribution in others.items()),
        *(Text(f"{name} needs what is not installed: {modules}", "red") for name, modules in missing.items()),
        *(Text(row.problem, "red") for row in rows if row.listing is None),
    )


def runs_table(runs: Sequence[ListedRun]) -> RenderableType:
    """Return one line per run, the newest last."""
    table = plain_table("")
    table.add_column("run", overflow="fold")
    for name in ("model", "verdict"):
        table.add_column(name, overflow="fold")
    for name in ("outlying", "cls", "steps", "changed"):
        table.add_column(name, justify="right")
    for run in runs:
        counted_tokens = "" if run.outliers_after is None else f"{run.outliers_before} → {run.outliers_after}"
        cls = "" if run.cls_to_inpainted is None else f"{run.cls_to_inpainted:.4f}"
        steps = "" if run.steps is None else f"{run.steps:,}"
        table.add_row(printable(run.path), run.model, run.verdict, counted_tokens, cls, steps, run.changed[:10])
    return Group(table, "outlying: tokens on the guard, before → after; cls: cosine to the inpainted original.")


def diagnosis_table(findings: Sequence[Finding]) -> RenderableType:
    """Return one line per finding, by subject."""
    table = plain_table("")
    for name in ("", "", ""):
        table.add_column(name, overflow="fold")
    subject = ""
    for each in findings:
        found = Text(each.found, "red" if each.problem else "")
        table.add_row("" if each.subject == subject else each.subject, each.name, found)
        subject = each.subject
    return table


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f} M"


def _whole(value: int | None) -> str:
    return "" if value is None else str(value)
