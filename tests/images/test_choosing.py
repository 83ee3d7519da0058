"""Which images are trained on, and which are looked at."""

from __future__ import annotations

import pytest

from sinder_cli import UsageError
from sinder_cli.images.choosing import divided


def test_without_holding_out_all_images_are_trained_on_and_looked_at() -> None:
    division = divided(6, 3, held_out=False)
    assert list(division.training) == [0, 1, 2, 3, 4, 5]
    assert list(division.evaluation) == [0, 2, 4]


@pytest.mark.parametrize(("count", "most", "held"), [(100, 10, 10), (100, 60, 25), (4, 32, 1), (30_000, 32, 32)])
def test_held_out_images_are_a_quarter_at_most_and_trained_on_never(count: int, most: int, held: int) -> None:
    division = divided(count, most, held_out=True)
    assert len(division.evaluation) == held
    assert sorted([*division.training, *division.evaluation]) == list(range(count))


def test_with_three_images_none_can_be_held_out() -> None:
    with pytest.raises(UsageError, match="too few images to hold one out: there are 3, and at most a quarter"):
        divided(3, 32, held_out=True)
