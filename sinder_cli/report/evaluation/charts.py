"""The chart of a task: every figure's difference to the original, side by side, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from sinder_cli.report.drawing.canvas import ACCENT, GOOD, INK, LINE, SOFT, Chart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sinder_cli.evaluation.contract import SideName
    from sinder_cli.evaluation.records import TaskRecord

MARKS: dict[SideName, tuple[str, str]] = {  # marker and colour of a side
    "repaired": ("o", LINE),
    "inpainted": ("s", ACCENT),
    "smoothed": ("^", GOOD),
    "blurred": ("x", SOFT),
}
ROW, SLOT = 0.2, 0.14  # inches of a figure beside its sides, and of each side
FRAME = 1.25  # inches of title, axis and legend
NAME_LETTERS = 30


class Difference(NamedTuple):
    """How far a side is from the original, with its interval: positive is better."""

    side: SideName
    value: float
    low: float | None
    high: float | None

    @property
    def reach(self) -> float:
        """The largest distance from zero of the value and its interval."""
        return max(abs(each) for each in (self.value, self.low or 0.0, self.high or 0.0))


def differences(task: TaskRecord) -> dict[str, list[Difference]]:
    """Return, by figure, the differences of all sides to the original, turned so that positive is better.

    Figures of which neither direction is better have none.
    """
    found: dict[str, list[Difference]] = {}
    for figure in task.figures:
        if figure.better == "neither":
            continue
        for value in figure.values:
            of = value.to_original
            if of is not None:
                ends = (of.low, of.high) if figure.better == "higher" else (_minus(of.high), _minus(of.low))
                signed = of.value if figure.better == "higher" else -of.value
                found.setdefault(figure.name, []).append(Difference(value.side, signed, *ends))
    return {name: rows for name, rows in found.items() if any(row.reach for row in rows)}


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def differences_chart(task: TaskRecord, labels: Mapping[SideName, str]) -> Chart | None:
    """Return the chart of a task; None where nothing differs from the original."""
    found = differences(task)
    if not found:
        return None
    title = f"{task.task}: differences to the original"
    caption = (
        "Difference of each side to the original, figure by figure: right of the line is better. Each figure has a"
        " scale of its own, as wide as its largest difference. Lines: 95 % intervals over images; one that crosses the"
        " middle is within noise."
    )
    sides = [side for side in MARKS if any(row.side == side for rows in found.values() for row in rows)]
    height = FRAME + len(found) * (ROW + SLOT * len(sides))
    rows = [
        {"figure": name, "side": row.side, "better by": row.value, "low": row.low, "high": row.high}
        for name, each in found.items()
        for row in each
    ]
    draw = partial(draw_differences, title=title, found=found, sides=sides, labels=labels)
    return Chart(f"differences-{task.task}", title, caption, height, draw, rows)


def draw_differences(
    figure: Figure,
    title: str,
    found: Mapping[str, Sequence[Difference]],
    sides: Sequence[SideName],
    labels: Mapping[SideName, str],
) -> None:
    """Draw a row per figure, from top to bottom, with a mark and an interval per side."""
    axes = figure.add_subplot(title=title)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.grid(visible=False)
    step = 0.8 / len(sides)
    for at, rows in enumerate(found.values()):
        widest = max(row.reach for row in rows)
        for row in rows:
            marker, colour = MARKS[row.side]
            height = at - 0.4 + step * (sides.index(row.side) + 0.5)
            if row.low is not None and row.high is not None:
                axes.plot([row.low / widest, row.high / widest], [height, height], color=colour, linewidth=1.3)
            axes.plot(row.value / widest, height, marker, color=colour, markersize=4.5)
    for side in sides:
        marker, colour = MARKS[side]
        axes.plot([], [], marker, color=colour, markersize=4.5, label=labels.get(side, side))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_yticks(range(len(found)), [_shortened(name) for name in found])
    axes.set_xlim(-1.08, 1.08)
    axes.set_xticks([-0.54, 0.54], ["← worse", "better →"])
    axes.tick_params(axis="both", length=0)
    figure.legend(loc="outside lower right", ncols=2)


def _shortened(name: str) -> str:
    return name if len(name) <= NAME_LETTERS else name[: NAME_LETTERS - 1] + "…"
