"""The verdict on a repair: terminal, report, model card and exit code all say the one that is made here.

It is made once, from the guard's measurements, and kept in `summary.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sinder_cli.defects.settings import SLACK

if TYPE_CHECKING:
    from sinder_cli.repairing.guard import Snapshot
    from sinder_cli.repairing.loop import Progress
    from sinder_cli.repairing.scan import Scan
    from sinder_cli.repairing.settings import RepairSettings

VerdictWord = Literal["healthy", "repaired", "improved", "not improved"]
# reasons against calling a model improved, and against calling an improved one repaired
Against = Literal["nothing_marked", "unchanged", "spoilt", "no_fewer", "more_elsewhere"]
Remaining = Literal["left", "standing", "left_elsewhere", "farther"]


@dataclass(frozen=True)
class Elsewhere:
    """Defective tokens on training images whose kind of defect no image of the guard has."""

    images: int
    before: int
    after: int


class Verdict(NamedTuple):
    """The verdict, and the reason why it is no better; None for `healthy` and `repaired`, which nothing exceeds."""

    word: VerdictWord
    reason: Against | Remaining | None


def verdict_of(
    scan: Scan, before: Snapshot, after: Snapshot, changed: bool, floor: float, elsewhere: Elsewhere | None = None
) -> Verdict:
    """Return the verdict on a repair, judged by the outlying tokens of the guard's images at any block.

    It is "not improved" if nothing was changed, if cls or good tokens are spoilt (`Fidelity.holds`), if there are no
    fewer outlying tokens, or if there are more defective tokens of a kind that the guard does not show. Otherwise it is
    only "improved" if anything is left: outlying tokens, tokens that stand out by norm although the current rule does
    not mark them, or tokens of a kind that the guard does not show; or if marked tokens are further from the yardstick
    than before. A model in which that rule marks nothing is "healthy" only if no norm stands out.
    """
    if scan.healthy:
        return Verdict("not improved", "nothing_marked") if scan.standing else Verdict("healthy", None)
    if against := _against(before, after, changed, floor, elsewhere):
        return Verdict("not improved", against)
    remaining = _remaining(before, after, elsewhere)
    return Verdict("improved" if remaining else "repaired", remaining)


def _against(
    before: Snapshot, after: Snapshot, changed: bool, floor: float, elsewhere: Elsewhere | None
) -> Against | None:
    """Return the first reason against calling the model improved; None if there is none."""
    if not changed:
        return "unchanged"
    if not after.fidelity().holds(before.fidelity(), floor):
        return "spoilt"
    if after.left >= before.left:
        return "no_fewer"
    return "more_elsewhere" if elsewhere and elsewhere.after > elsewhere.before else None


def _remaining(before: Snapshot, after: Snapshot, elsewhere: Elsewhere | None) -> Remaining | None:
    """Return the first reason against calling an improved model repaired; None if there is none."""
    if after.left:
        return "left"
    if bool(after.standing.any()):
        return "standing"
    if elsewhere and elsewhere.after:
        return "left_elsewhere"
    was, now = before.fidelity().marked, after.fidelity().marked
    return "farther" if now is not None and was is not None and now < was - SLACK else None


def stop_reason(scan: Scan, after: Snapshot, progress: Progress, settings: RepairSettings) -> str:
    """Return why no further step was taken, as in `summary.json`."""
    if scan.healthy:
        return "nothing_marked" if scan.standing else "healthy"
    if progress.stopped:
        return progress.stopped
    if progress.clean_fraction < settings.stop_clean_fraction:
        return "max_steps"
    return "no_gain" if after.left else "clean"


def verdict_in(summary: Mapping[str, Any]) -> VerdictWord:
    """Return the verdict that a `summary.json` holds."""
    word: VerdictWord = summary["verdict"]
    return word


def is_no(summary: Mapping[str, Any]) -> bool:
    """Return True if the answer of a repair is no: the model is not better than it was, and not healthy either."""
    return verdict_in(summary) == "not improved"


def is_spoilt(summary: Mapping[str, Any]) -> bool:
    """Return True if a repair is no improvement since cls or good tokens are spoilt.

    A `summary.json` of an earlier version has no reason: False.
    """
    reason: str | None = summary.get("verdict_reason")
    return reason == "spoilt"
