"""What a repair decides around its steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sinder_cli.repairing.choosing import judging
from sinder_cli.repairing.run import _seen_already

BEFORE, LATEST = object(), object()


def judged_by(images: Any) -> tuple[list[int], list[int]]:
    """The places of the guard's images, and of those of them that are trained on; the user gave all of them."""
    for place, image in enumerate(images):
        image.place = place
    settings: Any = SimpleNamespace(eval_images=None, seed=0)
    return judging(SimpleNamespace(healthy=False, images=tuple(images)), len(images), settings)  # type: ignore[arg-type]


def repair(keep: str, best: int | None, last_look: int, last_move: int, *, changed: bool = True) -> Any:
    return SimpleNamespace(
        prepared=SimpleNamespace(
            deltas=SimpleNamespace(changed=[object()] if changed else []),
            start=SimpleNamespace(settings=SimpleNamespace(keep=keep)),
        ),
        guard=SimpleNamespace(before=BEFORE, latest=LATEST),
        progress=SimpleNamespace(
            best=None if best is None else SimpleNamespace(step=best), last_look=last_look, last_move=last_move
        ),
    )


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (repair("best", None, 0, 0, changed=False), BEFORE),
        (repair("best", 10, 10, 9), LATEST),
        (repair("best", 5, 10, 9), None),  # an earlier state is put back
        (repair("best", 10, 10, 12), None),  # moved since
        (repair("last", 5, 10, 9), LATEST),
        (repair("last", 5, 10, 12), None),
    ],
)
def test_the_guard_looks_again_only_at_an_unseen_state(state: Any, expected: object) -> None:
    assert _seen_already(state) is expected


@pytest.mark.parametrize(
    ("kinds", "trained"),
    [
        ([()] * 18 + [(8,)], True),  # the only one
        ([()] * 18 + [(6,), (8,)], True),  # the only one of its kind
        ([()] * 18 + [(6,), (8,), (8,)], False),
    ],
)
def test_the_only_image_of_its_kind_is_still_trained_on(kinds: list[tuple[int, ...]], trained: bool) -> None:
    images: Any = [SimpleNamespace(kind=kind, blocks=dict.fromkeys(kind, (0,)), flooded=False) for kind in kinds]
    guard, also = judged_by(images)
    judged = [at for at in guard if kinds[at]]
    assert judged
    assert also == (judged if trained else [])


@pytest.mark.parametrize(("flooded", "judged"), [({1, 2, 3}, True), (set(range(8)), False)])
def test_mostly_outlying_images_are_judged_on_only_without_others(flooded: set[int], judged: bool) -> None:
    images: Any = [
        SimpleNamespace(kind=(8,), blocks={8: (0,)}, flooded=at in flooded)
        if at
        else SimpleNamespace(kind=(), blocks={}, flooded=at in flooded)
        for at in range(8)
    ]
    guard, _ = judged_by(images)
    assert guard
    assert not flooded & set(guard) or not judged


def test_one_flooded_image_is_judged_on_where_all_are() -> None:
    images: Any = [SimpleNamespace(kind=(), blocks={}, flooded=False) for _ in range(6)]
    images.append(SimpleNamespace(kind=(8,), blocks={8: (0,)}, flooded=True))
    guard, also = judged_by(images)
    assert guard[-1] == 6
    assert also == [6]
