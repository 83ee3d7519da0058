"""What is looked at, and what is said of it: a backbone with its module, checks and their outcomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sinder_cli.backbone.contract import Backbone, WeightRef
from sinder_cli.backbone.weights import rows_of

if TYPE_CHECKING:
    from torch import Tensor, nn


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


GRID = (5, 7)  # patches of a small image: the fewest that the engine takes, and no square, so that h and w show
SEED = 0


@dataclass(frozen=True)
class Subject:
    """A backbone, its module filled and frozen, and how its plugin describes a file of weights anew."""

    backbone: Backbone
    module: nn.Module
    describe: Callable[[Path], Backbone]

    def images(self, count: int, height: int = GRID[0], width: int = GRID[1], seed: int = SEED) -> Tensor:
        """Noise, as normalized images of so many patches: `[count, 3, height · P, width · P]`."""
        P = self.backbone.patch_size
        return gaussian(count, 3, height * P, width * P, seed=seed)

    @torch.no_grad()
    def embedded(self, images: Tensor) -> tuple[Tensor, Any]:
        """The tokens of images, and the context of their blocks."""
        return self.backbone.embed(self.module, images)


def gaussian(*shape: int, seed: int = SEED) -> Tensor:
    """Independent standard normal numbers, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def altered(module: nn.Module, values: Iterable[tuple[WeightRef, float]]) -> Iterator[None]:
    """The module with one number in place of each of these tensors, or rows of them; as it was afterwards."""
    state = module.state_dict()
    places = [(rows_of(state[ref.name], ref), value) for ref, value in values]
    kept = [place.clone() for place, _ in places]
    try:
        for place, value in places:
            place.fill_(value)
        yield
    finally:
        for (place, _), before in reversed(list(zip(places, kept, strict=True))):
            place.copy_(before)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ over all elements; infinite where anything is not finite."""
    difference = (found.double() - expected.double()).norm()
    error = float(difference / expected.double().norm().clamp_min(1e-30))
    return error if error == error else float("inf")
