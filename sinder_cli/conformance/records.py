"""The answer to each question, and to all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["passed", "failed", "not given", "not run"]


class NonconformityError(Exception):
    """What a check found to be wrong, in one line."""


@dataclass(frozen=True)
class Check:
    """One question to a plugin: passed or failed, not given what it would take, or not run after a failure before it.

    `detail` is what was measured, or what is wrong.
    """

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Conformance:
    """All checks of one backbone, in their order."""

    model: str
    weights: str
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.outcome == "failed")
