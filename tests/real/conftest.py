"""The real model and photographs, where they can be had, and a small plant in it."""

from __future__ import annotations

from pathlib import Path

import plants
import pytest
import torch
from real_files import NotToBeHadError, Photographs, photographs, real_weights

SIZE = 266  # pixels: 19 × 19 patches
PLANT = plants.Plant("block 7", (plants.Defect(7, 0.004, 15.0, seed=3),))


@pytest.fixture(scope="session")
def real() -> tuple[Path, Photographs]:
    """Weights and photographs; tests are skipped where they cannot be had."""
    try:
        return real_weights(), photographs()
    except NotToBeHadError as error:
        pytest.skip(f"no real weights or photographs: {error}")


@pytest.fixture(scope="session")
def twins(real: tuple[Path, Photographs], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The planted checkpoint, and its twin's."""
    weights, pictures = real
    folder = tmp_path_factory.mktemp("real")
    states = plants.planted(weights, PLANT, [*pictures.training[::4], *pictures.held_out], SIZE)
    for name, state in zip(("planted", "twin"), states, strict=True):
        torch.save(state, folder / f"{name}.pth")
    return folder / "planted.pth", folder / "twin.pth"
