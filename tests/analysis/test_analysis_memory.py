"""Memory does not grow with the number of images."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sinder_cli.analysis import survey as module
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.analysis.survey import WAITING_BATCHES, equal_shapes, survey
from sinder_cli.analysis.tokens import Subject

SIDE = 70


def drawn(count: int, seen: list[weakref.ref[Tensor]]) -> Iterator[tuple[list[str], Tensor]]:
    """Named batches `[2, 3, H, W]` of changing shapes, made as they are asked for."""
    generator = torch.Generator().manual_seed(0)
    for at in range(count):
        batch = torch.randn(2, 3, SIDE, SIDE + 14 * (at % 3), generator=generator)
        seen.append(weakref.ref(batch))
        yield [f"{at} a", f"{at} b"], batch


def held(root: Any, known: set[int] | None = None) -> tuple[int, int]:
    """How many numbers all tensors hold that can be reached from an object, and how many entries all its containers."""
    known = set() if known is None else known
    if id(root) in known:
        return 0, 0
    known.add(id(root))
    if isinstance(root, Tensor):
        return root.untyped_storage().nbytes(), 0
    parts = list(root.values()) if isinstance(root, dict) else list(root) if isinstance(root, list | tuple) else []
    entries = len(parts)
    if hasattr(root, "__dict__") and not isinstance(root, type):
        parts += list(vars(root).values())
    sizes = [held(part, known) for part in parts]
    return sum(size for size, _ in sizes), entries + sum(count for _, count in sizes)


def collectors(
    monkeypatch: pytest.MonkeyPatch, subject: Subject, batches: Iterator[tuple[list[str], Tensor]]
) -> list[Any]:
    """Everything that a survey of two sides collects in."""
    made: list[Any] = []
    for name in ("BlockCollector", "PairCollector", "Moments"):
        original = getattr(module, name)

        def remembered(*arguments: Any, original: Any = original) -> Any:
            made.append(original(*arguments))
            return made[-1]

        monkeypatch.setattr(module, name, remembered)
    settings = AnalyzeSettings(device="cpu", norm_threshold=1.0, min_gap=0)  # every token counts as outlying
    survey([subject, subject], batches, (5, 5), settings, "cpu", components=True)
    monkeypatch.undo()
    return made


def test_what_is_collected_does_not_grow_with_the_batches(monkeypatch: pytest.MonkeyPatch, small: Subject) -> None:
    few, many = (collectors(monkeypatch, small, drawn(count, [])) for count in (5, 50))
    assert len(few) == len(many) == 3 + 3 + 3 + 1
    assert many[0].observed.images == 10 * few[0].observed.images == 100
    assert many[0].observed.tokens > 2500
    assert held(few) == held(many)
    assert held(few)[0] > 0


def test_no_batch_is_kept_and_none_is_made_ahead(small: Subject) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def counted() -> Iterator[tuple[list[str], Tensor]]:
        for batch in drawn(12, seen):
            alive = sum(each() is not None for each in seen)
            assert alive <= 2  # this one, and the one that the survey lets go of when it takes this one
            yield batch
            del batch

    found = survey([small], counted(), (5, 5), AnalyzeSettings(device="cpu"), "cpu")
    assert found.images == 24
    assert len(seen) == 12


def test_images_of_many_shapes_wait_in_bounded_number() -> None:
    seen: list[weakref.ref[Tensor]] = []
    most = 0

    def images() -> Iterator[tuple[int, Tensor]]:
        nonlocal most
        for at in range(200):
            image = torch.zeros(3, 5 + at % 23, 5)
            seen.append(weakref.ref(image))
            most = max(most, sum(each() is not None for each in seen))
            yield at, image

    assert sum(len(keys) for keys, _ in equal_shapes(images(), 3)) == 200
    assert most <= WAITING_BATCHES * 3 + 3  # and those being stacked
