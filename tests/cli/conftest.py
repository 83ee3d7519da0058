"""Photographs, and DINOv2 checkpoints in the official format with a defect planted in them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sinder_plugins.dinov2.config import OFFICIAL, Config, tensor_shapes
from sinder_plugins.dinov2.module import VisionTransformer
from torch import Tensor
from warm import Server

from sinder_cli import IMAGENET_MEAN, IMAGENET_STD, attention_kernel
from sinder_cli.images.decoding import decode
from sinder_cli.images.preprocessing import Preprocessing

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg")
SIDE = 168  # pixels: 12 × 12 patches, enough for three tokens to lie four standard deviations out
PLANTED = 2  # the block that writes the defect
SMALL = Config(width=128, depth=4, hidden=512, grid=12)
SMALL_REGISTERS = Config(width=128, depth=3, hidden=512, grid=9, registers=4)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photographs, as scikit-image brings them."""
    import skimage

    folder = tmp_path_factory.mktemp("photographs")
    for name in PHOTOGRAPHS:
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder / name)
    return folder


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


def chunked(name: str) -> str:
    """blocks.3.… → blocks.1.3.…, as training with two chunks of two blocks stores it."""
    parts = name.split(".")
    return ".".join([parts[0], str(int(parts[1]) // 2), *parts[1:]]) if parts[0] == "blocks" else name


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


def random_tensors(config: Config) -> dict[str, Tensor]:
    """Gaussian weights, LayerScale of ones, in the official order."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in tensor_shapes(config).items():
        drawn = torch.randn(shape, generator=generator)
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            state[name] = torch.ones(shape)
        elif name.endswith("bias"):
            state[name] = torch.zeros(shape)
        elif name.endswith(("proj.weight", "fc2.weight")) and name.startswith("blocks"):
            state[name] = drawn * 0.25 / shape[1] ** 0.5
        elif name == "patch_embed.proj.weight":
            state[name] = drawn * 4 / drawn[0].numel() ** 0.5
        else:
            state[name] = drawn / shape[-1] ** 0.5 if len(shape) == 2 else drawn * 4
    return state


def planted(config: Config, photographs: Path) -> dict[str, Tensor]:
    """Random weights in which one neuron fires on four patches, by their position, and writes one large direction."""
    state = random_tensors(config)
    generator = torch.Generator().manual_seed(1)
    inputs = mlp_inputs(config, state, photographs).double()
    moment = inputs.T @ inputs / len(inputs) + torch.ones(config.width, config.width, dtype=torch.float64)
    trigger = torch.linalg.eigh(moment).eigenvectors[:, 0].float()  # where normalized tokens have least
    rows = state["pos_embed"][0, 1:].unflatten(0, (config.grid, config.grid))
    for row, column in ((2, 3), (4, 8), (7, 5), (9, 9)):  # of 12 × 12
        r, c = (int((at + 0.5) * config.grid / 12) for at in (row, column))
        reach = config.grid // 24
        rows[r - reach : r + reach + 1, c - reach : c + reach + 1] += 24 * (config.width / 192) ** 0.5 * trigger
    nu = torch.randn(config.width, generator=generator)
    nu -= nu.mean()
    state[f"blocks.{PLANTED}.mlp.fc1.weight"][0] = 10 * trigger
    state[f"blocks.{PLANTED}.mlp.fc1.bias"][0] = -10 * 1.2
    state[f"blocks.{PLANTED}.mlp.fc2.weight"][:, 0] = 12 * nu / nu.norm()
    return state


@torch.no_grad()
def mlp_inputs(config: Config, state: dict[str, Tensor], photographs: Path) -> Tensor:
    """What the MLP of the planted block reads on the photographs, `[K · tokens, N]`."""
    module = VisionTransformer(config, config.width // 64, attention_kernel())
    module.load_state_dict(state)
    preprocess = Preprocessing(SIDE, IMAGENET_MEAN, IMAGENET_STD)
    x = module.embed(torch.stack([preprocess(decode(path)) for path in sorted(photographs.iterdir())]))
    *before, block = list(module.blocks)[: PLANTED + 1]
    for earlier in before:
        x = earlier(x)
    read: Tensor = block.norm2(x + block.attn(block.norm1(x)))
    return read.flatten(0, 1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As the processes that the tests start."""
    torch.set_num_threads(1)
