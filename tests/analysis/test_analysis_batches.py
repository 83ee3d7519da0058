"""Batches of one shape each, with few images waiting."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sinder_cli.analysis.survey import WAITING_BATCHES, equal_shapes

SHAPES = [(4, 4), (4, 6), (6, 4), (5, 5), (8, 4), (4, 8)]


def image(index: int, shape: tuple[int, int]) -> tuple[int, Tensor]:
    return index, torch.full((3, *shape), float(index))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SHAPES), max_size=60), st.integers(1, 5))
def test_every_image_comes_once_in_a_batch_of_one_shape(shapes: list[tuple[int, int]], size: int) -> None:
    seen: list[int] = []
    for keys, batch in equal_shapes((image(i, shape) for i, shape in enumerate(shapes)), size):
        assert 1 <= len(keys) == len(batch) <= size
        for key, each in zip(keys, batch, strict=True):
            assert tuple(each.shape) == (3, *shapes[key])
            assert bool((each == key).all())
        seen += keys
    assert sorted(seen) == list(range(len(shapes)))


def test_images_of_one_shape_come_in_order_and_full_batches() -> None:
    batches = [keys for keys, _ in equal_shapes((image(i, (4, 4)) for i in range(7)), 3)]
    assert batches == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_full_batch_does_not_wait_for_the_next_image() -> None:
    taken: list[int] = []

    def images() -> Iterator[tuple[int, Tensor]]:
        for index in range(6):
            taken.append(index)
            yield image(index, (4, 4))

    batches = equal_shapes(images(), 2)
    assert next(batches)[0] == [0, 1]
    assert taken == [0, 1]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_no_more_images_wait_than_a_few_batches(size: int) -> None:
    taken, given_out, most = 0, 0, 0
    chosen = random.Random(0).choices([(4 + i, 4) for i in range(40)], k=400)

    def images() -> Iterator[tuple[int, Tensor]]:
        nonlocal taken, most
        for index, shape in enumerate(chosen):
            taken += 1
            most = max(most, taken - given_out)
            yield image(index, shape)

    for keys, _ in equal_shapes(images(), size):
        given_out += len(keys)
    assert given_out == 400
    assert most <= WAITING_BATCHES * size


def test_when_too_many_wait_the_shape_of_most_goes_first() -> None:
    shapes = [(4, 4), (5, 5), (6, 6), (5, 5), (7, 7), (8, 8), (9, 9), (4, 8)]
    first = next(equal_shapes((image(i, shape) for i, shape in enumerate(shapes)), 2))
    assert first[0] == [1, 3]
    crowded = [(4 + i, 4) for i in range(7)] + [(4, 20)]
    assert next(equal_shapes((image(i, shape) for i, shape in enumerate(crowded)), 2))[0] == [0]


def test_the_same_images_come_in_the_same_batches() -> None:
    chosen = random.Random(1).choices(SHAPES, k=50)
    runs = [[keys for keys, _ in equal_shapes((image(i, s) for i, s in enumerate(chosen)), 3)] for _ in range(2)]
    assert runs[0] == runs[1]


def test_no_images_make_no_batch() -> None:
    assert list(equal_shapes(iter(()), 4)) == []
