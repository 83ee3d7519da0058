"""The subject of the checks, a backbone with its module, and the checks with their outcomes."""

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
    """A fault found by a check, in one line."""


@dataclass(frozen=True)
class CheckedPoint:
    """One check of a plugin: passed, failed, not given (by the plugin), or not run after an earlier failure.

    `detail` is the measurement, or the fault.
    """

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Conformance:
    """All checks of one backbone, in their order."""

    model: str
    weights: str
    checks: tuple[CheckedPoint, ...]

    @property
    def failed(self) -> tuple[CheckedPoint, ...]:
        return tuple(check for check in self.checks if check.outcome == "failed")


GRID = (5, 7)  # patches of a small image: the fewest that the engine accepts; not square, so that h and w differ
SEED = 0


@dataclass(frozen=True)
class Candidate:
    """A backbone, its module with frozen weights, and the function of its plugin that describes a file of weights."""

    backbone: Backbone
    module: nn.Module
    describe: Callable[[Path], Backbone]

    def images(self, count: int, height: int = GRID[0], width: int = GRID[1], seed: int = SEED) -> Tensor:
        """Draw noise as normalized images of `height` × `width` patches: `[count, 3, height · P, width · P]`."""
        P = self.backbone.patch_size
        return gaussian(count, 3, height * P, width * P, seed=seed)

    @torch.no_grad()
    def embedded(self, images: Tensor) -> tuple[Tensor, Any]:
        """Return the tokens of images, and the context of their blocks."""
        return self.backbone.embed(self.module, images)


def gaussian(*shape: int, seed: int = SEED) -> Tensor:
    """Draw independent standard normal numbers, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def altered(module: nn.Module, values: Iterable[tuple[WeightRef, float]]) -> Iterator[None]:
    """Fill each of these tensors, or rows of them, with one number inside the context; restore them afterwards."""
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
    """Return ‖found − expected‖ / ‖expected‖ over all elements; infinite if anything is not finite."""
    difference = (found.double() - expected.double()).norm()
    error = float(difference / expected.double().norm().clamp_min(1e-30))
    return error if error == error else float("inf")
