"""One export: the draft, its check, and the record of what was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.events import Noted, Warned
from sinder_cli.exporting.origins import told_model
from sinder_cli.exporting.targets import ExportCheck, ExportTarget, Plan
from sinder_cli.files import json_text, sha256_of
from sinder_cli.folders import FORMAT, MANIFEST
from sinder_cli.notebooks import Shown

if TYPE_CHECKING:
    from sinder_cli.exporting.targets import TargetName


@dataclass(frozen=True)
class Written:
    """One file of an export."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ExportResult(Shown):
    """Record of an export: the files, and how they were checked."""

    path: Path
    target: TargetName
    model: str
    files: tuple[Written, ...]
    check: ExportCheck
    load: str = ""  # one line of Python that loads what was written

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)


def write_draft(plan: Plan, target: ExportTarget, draft: Path) -> ExportCheck:
    """Write what a target writes to a path that is not the final one, and check it.

    Raises `BadInputError` for a check that fails.
    """
    target.write(plan, draft)
    if not plan.settings.verify:
        check = ExportCheck("not checked: --no-verify", verified=False)
        plan.emit(Noted(check.line))
        return check
    check = target.verify(plan, draft)
    plan.emit(Noted(check.line) if check.verified else Warned(check.line))
    return check


def finished_export(plan: Plan, target: ExportTarget, check: ExportCheck, draft: Path, out: Path) -> ExportResult:
    """Return the record of a draft that is complete; a folder gets a list of its files."""
    files = _files(draft)
    if target.kind == "folder":
        (draft / MANIFEST).write_text(json_text(_manifest(plan, target, check, files)), encoding="utf-8")
    load = target.loading(plan, str(out)).line
    return ExportResult(out, plan.settings.to, plan.backbone.name, files, check, load)


def _files(draft: Path) -> tuple[Written, ...]:
    if draft.is_file():
        return (Written(draft.name, draft.stat().st_size, sha256_of(draft)),)
    found = sorted(path for path in draft.rglob("*") if path.is_file())
    return tuple(Written(path.relative_to(draft).as_posix(), path.stat().st_size, sha256_of(path)) for path in found)


def _manifest(plan: Plan, target: ExportTarget, check: ExportCheck, files: tuple[Written, ...]) -> dict[str, object]:
    """Return the list of files by which a folder is known as an export of sinder."""
    return {
        "format": FORMAT,
        "target": plan.settings.to,
        "model": told_model(plan, target.public),
        "verified": check.verified,
        "check": check.line,
        "versions": dict(check.versions),
        "files": {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files},
    }
