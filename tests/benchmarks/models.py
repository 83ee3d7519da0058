"""Models for the benchmarks: random weights in the official format, and the real ViT-S with a planted defect."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from repair_step import random_tensor
from sinder_plugins.dinov2.config import OFFICIAL, Config, tensor_shapes

from sinder_cli import TensorInfo
from sinder_cli.backbone.storing import write_safetensors

REAL = Path(__file__).parents[1] / "real"
SUPPORT = REAL.with_name("support")
SIZES = {"S": "dinov2_vits14", "B": "dinov2_vitb14", "L": "dinov2_vitl14", "g": "dinov2_vitg14"}
SMALL = Config(width=64, depth=2, hidden=256, grid=16)


def write_checkpoint(path: Path, config: Config) -> Path:
    """Random weights in the official format."""
    infos = {name: TensorInfo(shape, torch.float32) for name, shape in tensor_shapes(config).items()}
    write_safetensors(path, infos, (random_tensor(name, info.shape) for name, info in infos.items()))
    return path


def model_of(size: str, folder: Path, tiny: bool) -> tuple[str, Path]:
    """The name of a model, and a file of random weights for it: a small one if `tiny`."""
    path = folder / f"{'tiny' if tiny else size}.safetensors"
    if not path.exists():
        write_checkpoint(path, SMALL if tiny else OFFICIAL[SIZES[size]])
    return "dinov2_custom" if tiny else SIZES[size], path


def planted_vitl(folder: Path) -> tuple[Path, list[Path]]:
    """A ViT-L of random weights with a defect in block 2, and photographs to train on. Raises `NotToBeHadError`."""
    sys.path[:0] = [str(REAL), str(SUPPORT)]
    from photographs import copied_photographs
    from planted_dinov2 import PHOTOGRAPHS, planted
    from real_files import photographs

    (folder / "calibration").mkdir()
    state = planted(OFFICIAL[SIZES["L"]], copied_photographs(folder / "calibration", PHOTOGRAPHS))
    path = folder / "planted-L.pth"
    torch.save(state, path)
    pictures = photographs()
    return path, [*pictures.training, *pictures.held_out][:40]


def planted_vits(folder: Path) -> tuple[Path, list[Path]]:
    """The real ViT-S with a defect in block 8, and photographs to train on. Raises `NotToBeHadError`."""
    sys.path[:0] = [str(REAL)]
    import plants
    from real_files import photographs, real_weights

    pictures = photographs()
    calibration = [*pictures.training[::3], *pictures.held_out]
    state, _ = plants.planted(real_weights(), plants.plant_named("block 8"), calibration, 518)
    path = folder / "planted.pth"
    torch.save(state, path)
    return path, list(pictures.training)
