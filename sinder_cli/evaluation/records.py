"""The document of an evaluation: what `evaluation.json` holds, and what table and page are made from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sinder_cli.evaluation.contract import SideName

Standing = Literal["better", "worse", "within noise", "too few images", "higher", "lower"]


class Record(BaseModel):
    """A frozen record that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DifferenceRecord(Record):
    """A paired difference between two sides, in the unit of the figure."""

    value: float
    low: float | None = Field(
        default=None, description="2.5th percentile over resamples of the images; None for too few images."
    )
    high: float | None = Field(default=None, description="97.5th percentile.")
    images: int = Field(description="Images in which both sides have something to measure.")
    standing: Standing


class ValueRecord(Record):
    """One figure of one side."""

    side: SideName
    value: float | None = Field(description="None where there is nothing to measure.")
    images: int = Field(description="Images with something to measure.")
    to_original: DifferenceRecord | None = None
    to_smoothed: DifferenceRecord | None = None
    to_inpainted: DifferenceRecord | None = None


class FigureRecord(Record):
    """One figure of all sides."""

    name: str
    unit: Literal["%", ""]
    better: Literal["higher", "lower", "neither"]
    noise: float = Field(description="What repetitions of the protocol differ by, in the unit: less is noise.")
    caution: str = Field(default="", description="What the figure cannot see.")
    values: tuple[ValueRecord, ...]

    def of(self, side: SideName) -> ValueRecord | None:
        """Return the value of a side, or None if the figure has none of it."""
        return next((value for value in self.values if value.side == side), None)


class TaskRecord(Record):
    """One task: how it was run, on what, and what it found."""

    task: str
    protocol: str
    data: str = Field(description="How the data were read and split.")
    images: int = Field(description="Images that were scored.")
    trained_on: int
    classes: tuple[str, ...] = ()
    settings: dict[str, Any]
    figures: tuple[FigureRecord, ...]
    notes: dict[SideName, tuple[str, ...]]
    sentences: tuple[str, ...] = Field(description="What the figures say, in words.")
    skipped: dict[str, str] = Field(description="Images that could not be read, with the reason.")
    seconds: float


class SideRecord(Record):
    """One side: the model that it stands for, and how its features are made."""

    side: SideName
    label: str
    made: str
    model: str
    weights: str
    fingerprint: str


class Evaluation(Record):
    """The whole document."""

    schema_version: Literal[1] = Field(default=1, description="Version of this schema.")
    sinder: str
    finished: bool = Field(default=True, description="False while tasks that were asked for are missing.")
    sides: tuple[SideRecord, ...]
    tasks: tuple[TaskRecord, ...]
    settings: dict[str, Any]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the table of all values, as `evaluation.csv` has them."""
        for task in self.tasks:
            for figure in task.figures:
                for value in figure.values:
                    yield {
                        "task": task.task,
                        "figure": figure.name,
                        "unit": figure.unit,
                        "better": figure.better,
                        "side": value.side,
                        "value": value.value,
                        "images": value.images,
                        **_columns(value.to_original),
                        **_columns(value.to_smoothed, "_to_smoothed"),
                        **_columns(value.to_inpainted, "_to_inpainted"),
                    }


def _columns(difference: DifferenceRecord | None, ending: str = "") -> dict[str, Any]:
    """Return the columns of a difference in the table of all values; empty ones without it."""
    fields = {"difference": "value", "low": "low", "high": "high", "standing": "standing"}
    return {f"{name}{ending}": difference and getattr(difference, field) for name, field in fields.items()}
