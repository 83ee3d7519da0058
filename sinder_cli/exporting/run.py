"""One export from the checked description to the files under their final name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.backbone.opening import require_loadable
from sinder_cli.events import Noted, Warned
from sinder_cli.exporting.targets import Check, Plan, Target
from sinder_cli.files import json_text, public_model, sha256_of
from sinder_cli.folders import FORMAT, MANIFEST, placed

if TYPE_CHECKING:
    from sinder_cli.exporting.settings import TargetName


@dataclass(frozen=True)
class Written:
    """One file of an export."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote, and how it was checked."""

    path: Path
    target: TargetName
    model: str
    files: tuple[Written, ...]
    check: Check

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)


Card = Callable[[Plan, Target, Check, str], Mapping[str, bytes]]  # of a folder of that name: README.md and pictures


def write_export(plan: Plan, target: Target, out: Path, card: Card) -> ExportResult:
    """Write, check, and only then give the final name. A folder gets its card and a list of what is in it.

    Raises `BadInputError` for a check that fails, which leaves nothing, or what was there before.
    """
    target.require(plan)
    require_loadable(plan.backbone)
    settings = plan.settings
    with placed(out) as draft:
        plan.emit(Noted(f"writing {out}"))
        target.write(plan, draft)
        check = target.verify(plan, draft) if settings.verify else Check("not checked: --no-verify", verified=False)
        plan.emit(Noted(check.told) if check.verified or not settings.verify else Warned(check.told))
        if target.kind == "folder":
            for name, content in card(plan, target, check, out.resolve().name).items():
                (draft / name).parent.mkdir(exist_ok=True)
                (draft / name).write_bytes(content)
        files = _files(draft)
        if target.kind == "folder":
            (draft / MANIFEST).write_text(json_text(_manifest(plan, check, files)), encoding="utf-8")
    return ExportResult(out, settings.to, plan.backbone.name, files, check)


def _files(draft: Path) -> tuple[Written, ...]:
    if draft.is_file():
        return (Written(draft.name, draft.stat().st_size, sha256_of(draft)),)
    found = sorted(path for path in draft.rglob("*") if path.is_file())
    return tuple(Written(path.relative_to(draft).as_posix(), path.stat().st_size, sha256_of(path)) for path in found)


def _manifest(plan: Plan, check: Check, files: tuple[Written, ...]) -> dict[str, object]:
    """What tells that a folder is ours, and what of it."""
    return {
        "format": FORMAT,
        "target": plan.settings.to,
        "model": public_model(plan.backbone.name),
        "verified": check.verified,
        "check": check.told,
        "versions": dict(check.versions),
        "files": {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files},
    }
