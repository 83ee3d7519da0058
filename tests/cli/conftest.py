"""Photographs, and DINOv2 checkpoints in the official format with a defect planted in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from photographs import copied_photographs
from PIL import Image
from planted_dinov2 import PHOTOGRAPHS, SIDE, SMALL, SMALL_REGISTERS, chunked, planted, random_tensors
from safetensors.torch import save_file
from sinder_plugins.dinov2.config import OFFICIAL
from warm import Server


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photographs, as scikit-image brings them."""
    return copied_photographs(tmp_path_factory.mktemp("photographs"), PHOTOGRAPHS)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """A small planted model, as the safetensors that `dinov2_custom` takes."""
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    save_file(planted(SMALL, photographs), path)
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """The same at the size that the small model sees, which are decoded in no time."""
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted(photographs.iterdir()):
        with Image.open(path) as photograph:
            photograph.convert("RGB").resize((SIDE, SIDE)).save(folder / f"{path.stem}.png")
    return folder


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Server]:
    """Starts `sinder` in milliseconds, and has it killed where a test wants it."""
    server = Server("sinder_cli.cli.main:main", environment, tmp_path_factory.mktemp("printed"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def chunked_half(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    """The same model as a training checkpoint: half precision, in a wrapper, its blocks in two chunks."""
    from safetensors.torch import load_file

    path = tmp_path_factory.mktemp("chunked") / "training.pth"
    torch.save({"teacher": {"backbone": {chunked(n): t.half() for n, t in load_file(small).items()}}}, path)
    return path


@pytest.fixture(scope="session")
def with_registers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with registers and no defect."""
    path = tmp_path_factory.mktemp("registers") / "registers.pth"
    torch.save(random_tensors(SMALL_REGISTERS), path)
    return path


@pytest.fixture(scope="session")
def vits14(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """The sizes and names of the official ViT-S/14, with a planted defect."""
    path = tmp_path_factory.mktemp("vits14") / "vits14.pth"
    torch.save(planted(OFFICIAL["dinov2_vits14"], photographs), path)
    return path


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As the processes that the tests start."""
    torch.set_num_threads(1)
