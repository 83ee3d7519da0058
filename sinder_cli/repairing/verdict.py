"""The verdict on a repair: terminal, report, model card and exit code all say the one that is made here.

It is made once, from the guard's measurements, and kept in `summary.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sinder_cli.defects.settings import SLACK

if TYPE_CHECKING:
    from sinder_cli.repairing.guard import Snapshot
    from sinder_cli.repairing.loop import Progress
    from sinder_cli.repairing.scan import Scan
    from sinder_cli.repairing.settings import RepairSettings

VerdictWord = Literal["healthy", "repaired", "improved", "not improved"]


@dataclass(frozen=True)
class Elsewhere:
    """Defective tokens on training images whose kind of defect no image of the guard has."""

    images: int
    before: int
    after: int


def verdict_of(
    scan: Scan, before: Snapshot, after: Snapshot, changed: bool, floor: float, elsewhere: Elsewhere | None = None
) -> VerdictWord:
    """Return the verdict on a repair, judged by the outlying tokens of the guard's images at any block.

    It is "not improved" if nothing was changed, if there are no fewer outlying tokens, if cls or good tokens are spoilt
    (`Fidelity.holds`), or if there are more defective tokens of a kind that the guard does not show. Otherwise it is
    only "improved" if anything is left: outlying tokens, tokens that stand out by norm although the current rule does
    not mark them, or tokens of a kind that the guard does not show; or if marked tokens are further from the yardstick
    than before. A model in which that rule marks nothing is "healthy" only if no norm stands out.
    """
    if scan.healthy:
        return "not improved" if scan.standing else "healthy"
    was, now = before.fidelity(), after.fidelity()
    if not changed or after.left >= before.left or not now.holds(was, floor):
        return "not improved"
    if elsewhere and elsewhere.after > elsewhere.before:
        return "not improved"
    left = after.left or bool(after.standing.any()) or (elsewhere and elsewhere.after)
    farther = now.marked is not None and was.marked is not None and now.marked < was.marked - SLACK
    return "improved" if left or farther else "repaired"


def stop_reason(scan: Scan, after: Snapshot, progress: Progress, settings: RepairSettings) -> str:
    """Return why no further step was taken, as in `summary.json`."""
    if scan.healthy:
        return "nothing_marked" if scan.standing else "healthy"
    if progress.stopped:
        return progress.stopped
    if progress.clean_fraction < settings.stop_density:
        return "max_steps"
    return "no_gain" if after.left else "clean"


def verdict_in(summary: Mapping[str, Any]) -> VerdictWord:
    """Return the verdict that a `summary.json` holds."""
    word: VerdictWord = summary["verdict"]
    return word


def is_no(summary: Mapping[str, Any]) -> bool:
    """Return True if the answer of a repair is no: the model is not better than it was, and not healthy either."""
    return verdict_in(summary) == "not improved"
