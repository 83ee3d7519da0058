"""Photographs, small models of every kind, and the residual stream as forward hooks see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photographs import copied_photographs
from PIL import Image
from planted_dinov2 import random_tensors
from safetensors.torch import save_file
from sinder_plugins.dinov2.config import OFFICIAL, Config
from torch import Tensor

from sinder_cli import Backbone, ModelRequest, api
from sinder_cli.analysis.tokens import Subject
from sinder_cli.backbone.opening import load_module
from sinder_cli.defects.prediction import predict

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
SMALL = Config(width=128, depth=3, hidden=256, grid=8, registers=2)
GATED = Config(width=128, depth=2, hidden=96, mlp="SwiGLU", grid=8)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are slower on several threads of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photographs of several shapes, as scikit-image brings them."""
    return copied_photographs(tmp_path_factory.mktemp("photographs"), PHOTOGRAPHS)


@dataclass(frozen=True)
class Drawn:
    """A checkpoint drawn from a seed, and its tensors."""

    path: Path
    tensors: dict[str, Tensor]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a random DINOv2 checkpoint: small with registers, gated, or the official ViT-S; changed on request."""
    configs = {"small": SMALL, "gated": GATED, "vits14_reg": OFFICIAL["dinov2_vits14_reg"]}

    def write(kind: str = "small", seed: int = 0, change: Callable[[dict[str, Tensor]], object] | None = None) -> Path:
        tensors = random_tensors(configs[kind], seed)
        if change is not None:
            change(tensors)
        path = tmp_path_factory.mktemp(kind) / f"{kind}.safetensors"
        save_file(tensors, path)
        return path

    return write


@pytest.fixture(scope="session")
def opened() -> Callable[..., Subject]:
    """A model by name, with its module and its predictions."""

    def subject(name: str, weights: Path | None = None, **options: Any) -> Subject:
        backbone = api.open_model(ModelRequest(name, weights, **options))
        return Subject(backbone, load_module(backbone), predict(backbone))

    return subject


@pytest.fixture(scope="session")
def demo(opened: Callable[..., Subject]) -> Subject:
    """The demo backbone with its planted defect."""
    return opened("demo_vit")


@pytest.fixture(scope="session")
def clean(opened: Callable[..., Subject]) -> Subject:
    """Its twin without."""
    return opened("demo_vit_clean")


@pytest.fixture(scope="session")
def small(opened: Callable[..., Subject], checkpoint: Callable[..., Path]) -> Subject:
    """Three blocks of width 128 with two registers and random weights."""
    return opened("dinov2_custom", checkpoint("small"))


def pixels(image: Image.Image, backbone: Backbone, side: int) -> Tensor:
    """`[3, H, W]`: the shorter side resized to `side`, the longer cut to whole patches at its centre, normalized."""
    scale = side / min(image.size)
    image = image.convert("RGB")
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    P = backbone.patch_size
    width, height = image.width // P * P, image.height // P * P
    left, top = (image.width - width) // 2, (image.height - height) // 2
    array = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float64) / 255
    return torch.from_numpy((array - backbone.mean) / backbone.std).float().permute(2, 0, 1)


@torch.no_grad()
def hooked(subject: Subject, image: Tensor) -> list[Tensor]:
    """The output of each block for one image `[3, H, W]`, `[tokens, N]` float64, as forward hooks see it."""
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0].double()))
        for block in subject.module.blocks
    ]
    tokens = subject.module.embed(image[None])
    for block in subject.module.blocks:
        tokens = block(tokens)
    for handle in handles:
        handle.remove()
    return seen


class Naive:
    """What a notebook would do, one image at a time, every token kept."""

    pixels = staticmethod(pixels)
    hooked = staticmethod(hooked)

    @staticmethod
    def grids(subject: Subject, images: Sequence[Tensor]) -> list[list[np.ndarray]]:
        """By block and image, the patch tokens `[h, w, N]`, the prefix left out."""
        backbone = subject.backbone
        P, prefix = backbone.patch_size, backbone.prefix_tokens
        by_image = []
        for image in images:
            h, w = image.shape[1] // P, image.shape[2] // P
            by_image.append([tokens[prefix:].reshape(h, w, -1).numpy() for tokens in hooked(subject, image)])
        return [list(blocks) for blocks in zip(*by_image, strict=True)]


@pytest.fixture(scope="session")
def naive() -> type[Naive]:
    """The slow and obvious way."""
    return Naive
