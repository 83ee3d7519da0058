"""A small part of `make evidence`: the default repair on a real model, where its weights can be had."""

from __future__ import annotations

from pathlib import Path

import plants
import pytest
import timm
import torch
from evidence import judged, marked
from real_files import Photographs
from safetensors.torch import load_file, save_file
from torch import Tensor

from sinder_cli import ModelRequest, api
from sinder_cli.defects.tokens import last_tokens
from sinder_cli.images.decoding import decode
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.requests import RepairRequest

SIZE = 266  # pixels, as the plant has it
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_planted_defect_goes_and_the_features_come_back(
    real: tuple[Path, Photographs], twins: tuple[Path, Path], tmp_path: Path
) -> None:
    _, pictures = real
    backbone, module = plants.opened(twins[0])
    preprocess = api.preprocessing(backbone, SIZE)
    images = [preprocess(decode(path)) for path in pictures.held_out]
    yardstick, marks, without = marked(backbone, module, images)
    original = [last_tokens(backbone, module, image[None])[0] for image in images]
    references = (last_of(twins[1], images), without, original)
    before = judged("", "", (backbone, module), references, marks, images)
    filled = judged("", "", (yardstick, module), references, marks, images)
    assert (before.original, filled.inpainted) == (pytest.approx((1, 1)), pytest.approx((1, 1)))
    settings = RepairSettings(image_size=SIZE, workers=0)
    request = ModelRequest(plants.MODEL, weights=twins[0])
    result = api.repair(RepairRequest(request, [str(path) for path in pictures.training], settings), tmp_path / "run")
    assert result is not None
    after = judged("", "", plants.opened(tmp_path / "run" / "model.safetensors"), references, marks, images)
    assert result.summary["verdict"] == "repaired"
    assert before.outliers > 0.3
    assert after.outliers <= 0.02 * before.outliers
    assert after.cls >= max(0.99, before.cls, filled.cls)
    assert after.good >= max(0.99, before.good, filled.good)
    assert after.marked is not None
    assert after.marked >= 0.95


def test_the_real_model_is_healthy_and_left_as_it_is(real: tuple[Path, Photographs], tmp_path: Path) -> None:
    weights, pictures = real
    settings = RepairSettings(image_size=SIZE, workers=0)
    request = ModelRequest(plants.MODEL, weights=weights)
    result = api.repair(
        RepairRequest(request, [str(path) for path in pictures.training[::2]], settings), tmp_path / "run"
    )
    assert result is not None
    assert (result.summary["verdict"], result.summary["steps"]) == ("healthy", 0)
    written = load_file(tmp_path / "run" / "model.safetensors")
    original = torch.load(weights, weights_only=True)
    assert original.keys() == written.keys()
    assert all(torch.equal(original[name], written[name]) for name in original)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "eva02_tiny_patch14_224"])
def test_random_models_of_other_families_are_healthy_on_photographs(
    name: str, real: tuple[Path, Photographs], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=0)
    save_file(
        {key: tensor.contiguous() for key, tensor in module.state_dict().items()}, tmp_path / "random.safetensors"
    )
    request = ModelRequest(f"timm/{name}", weights=tmp_path / "random.safetensors")
    settings = RepairSettings(workers=0, scan_images=8, max_steps=1)
    result = api.repair(RepairRequest(request, [str(path) for path in real[1].training], settings), tmp_path / "run")
    assert result is not None
    assert max(block["max_ratio"] for block in result.summary["scan"]["blocks"]) > 2
    assert (result.summary["verdict"], result.summary["steps"]) == ("healthy", 0)


def last_of(checkpoint: Path, images: list[Tensor]) -> list[Tensor]:
    """The last tokens `[T, N]` of a checkpoint."""
    backbone, module = plants.opened(checkpoint)
    return [last_tokens(backbone, module, image[None])[0] for image in images]
