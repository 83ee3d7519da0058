"""Events of a long computation: small records, passed to a callback of its caller while it runs.

The stages emit events; whoever listens shows them, and a stage goes on the same whether or not somebody does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Started:
    """A phase with a known or unknown amount of work begins."""

    phase: str
    total: int | None = None
    unit: str = ""
    done: int = 0  # by an earlier process whose work this one continues


@dataclass(frozen=True)
class Advanced:
    """The running phase did `amount` more units of its work."""

    phase: str
    amount: int = 1


@dataclass(frozen=True)
class Finished:
    """The phase is over."""

    phase: str


@dataclass(frozen=True)
class Noted:
    """A fact worth one line, such as the matched weights or a decision."""

    text: str


@dataclass(frozen=True)
class Warned:
    """Something was skipped or is doubtful; the work continues."""

    text: str


class Measured:
    """Base class of the records that a run keeps, such as a step; listeners follow the run by them."""


Event = Started | Advanced | Finished | Noted | Warned | Measured
Emit = Callable[[Event], None]


def silent(event: Event) -> None:
    """Drop the event: the default for callers without a listener."""


def tracked(items: Iterable[T], emit: Emit, phase: str, total: int | None, unit: str = "") -> Iterator[T]:
    """Pass `items` through and report each as one unit of `phase`."""
    emit(Started(phase, total, unit))
    try:
        for item in items:
            yield item
            emit(Advanced(phase))
    finally:
        emit(Finished(phase))
