"""Photographs."""

from __future__ import annotations

import pytest
import skimage.data
from PIL import Image


@pytest.fixture
def astronaut() -> Image.Image:
    return Image.fromarray(skimage.data.astronaut())


@pytest.fixture
def cat() -> Image.Image:
    """Wider than high: 451 × 300."""
    return Image.fromarray(skimage.data.chelsea())
