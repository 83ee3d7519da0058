"""A tiny pre-norm ViT with fused projections, whose defects are planted by the colour of a patch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_vit import Planted, plant, with_writer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are many times slower on several threads of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[False, True], ids=["plain", "gated"])
def planted(request: pytest.FixtureRequest) -> Planted:
    """In float64, so that nothing but the float32 of the loss separates it from an oracle."""
    return plant(request.param)


@pytest.fixture
def single() -> Planted:
    """Gated, in float32, as the tool runs it."""
    return plant(True, torch.float32)


@pytest.fixture
def writer(planted: Planted) -> Planted:
    """In float64, with a singular value that writes outliers."""
    return with_writer(planted)


@pytest.fixture
def single_writer(single: Planted) -> Planted:
    """Gated, in float32, with a singular value that writes outliers."""
    return with_writer(single)
