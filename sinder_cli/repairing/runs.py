"""The runs below a folder, as `sinder runs` lists them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sinder_cli.errors import NoInputError, SinderError
from sinder_cli.repairing.folder import RunFolder


@dataclass(frozen=True)
class ListedRun:
    """One run directory: a finished run with its figures, or an unfinished one."""

    path: str
    model: str
    verdict: str  # `unfinished` without a summary, `unreadable` for files that cannot be read
    outliers_before: int | None = None
    outliers_after: int | None = None
    cls_to_inpainted: float | None = None  # cosine, after
    steps: int | None = None
    changed: str = ""  # date and time, UTC, of the last change


def runs_below(folder: Path) -> list[ListedRun]:
    """Return all runs in a folder and below it, the newest last. Raises `NoInputError` if there is none."""
    if not folder.is_dir():
        raise NoInputError(f"cannot list {folder}", "there is no such folder", "name a folder of runs")
    found = [_listed(run) for run in _run_folders(folder)]
    if not found:
        raise NoInputError(
            f"no runs in {folder}", "no folder below it has a config.json of sinder", "name another folder"
        )
    return sorted(found, key=lambda run: (run.changed, run.path))


def _run_folders(folder: Path) -> Iterator[RunFolder]:
    for place, below, names in os.walk(folder):
        run = RunFolder(Path(place))
        if run.config.name in names and (run.metrics.name in names or run.summary.name in names):
            below.clear()  # a run holds no other
            yield run


def _listed(run: RunFolder) -> ListedRun:
    newest = max(path.stat().st_mtime for path in (run.config, run.metrics, run.summary) if path.exists())
    changed = f"{datetime.fromtimestamp(newest, timezone.utc):%Y-%m-%d %H:%M}"
    try:
        if not run.finished:
            return ListedRun(str(run.path), str(run.read_config()["call"]["model"]), "unfinished", changed=changed)
        return _finished(str(run.path), run.read_summary(), changed)
    except (SinderError, OSError, KeyError, TypeError):
        return ListedRun(str(run.path), "", "unreadable", changed=changed)


def _finished(path: str, summary: dict[str, Any], changed: str) -> ListedRun:
    counts = {when: summary["defects"][when] and summary["defects"][when]["tokens"] for when in ("before", "after")}
    after = summary["fidelity"]["to_inpainted"]["after"] if summary.get("fidelity") else None
    return ListedRun(
        path,
        summary["model"],
        summary["verdict"],
        counts["before"],
        counts["after"],
        after and after.get("cls"),
        summary["steps"],
        changed,
    )
