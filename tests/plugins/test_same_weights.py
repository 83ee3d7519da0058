"""The same DINOv2 ViT-S, at its full size, as dinov2_vits14, hf/… and timm/…: one prediction and one repair."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from photographs import copied_photographs
from safetensors.torch import load_file
from sinder_plugins.dinov2.config import OFFICIAL, tensor_shapes
from torch import Tensor

from sinder_cli import ModelRequest, api
from sinder_cli.exporting.targets import ExportSettings
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.requests import ExportRequest, PredictRequest, RepairRequest

STEPS, SIZE = 4, 518
MARKING = {
    "mask_threshold": 2.5,
    "min_tokens": 3,
    "min_gap": 1.12,
    "stop_clean_fraction": 1,
}  # block 7 alone has such a gap
Requests = dict[str, ModelRequest]


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Requests:
    """How each plugin is asked for these weights: the folder is our export, and timm converts the official file."""
    folder = tmp_path_factory.mktemp("same")
    official = folder / "vits14.pth"
    torch.save(random_tensors(), official)
    named = ModelRequest("dinov2_vits14", official)
    api.export(ExportRequest(named, ExportSettings("transformers", verify=False)), folder / "hf")
    timm = ModelRequest("timm/vit_small_patch14_dinov2", official)
    return {"dinov2": named, "hf": ModelRequest(f"hf/{folder / 'hf'}"), "timm": timm}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
    return copied_photographs(tmp_path_factory.mktemp("photographs"), names)


def random_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, shape in tensor_shapes(OFFICIAL["dinov2_vits14"]).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            values = 1 + 0.1 * values
        elif name.endswith("weight"):
            values = values * values[0].numel() ** -0.5
        drawn[name] = values * (0.1 if name.endswith("bias") else 1)
    return drawn


@pytest.mark.slow
def test_directions_agree_to_a_hundredth_of_a_degree(requests: Requests) -> None:
    found = {name: api.predict_defects(PredictRequest(request, ("cumulative",))) for name, request in requests.items()}
    for name, prediction in found.items():
        chords = (prediction.directions() - found["dinov2"].directions()).double().norm(dim=-1)
        assert math.degrees(2 * math.asin(float(chords.max()) / 2)) <= 0.01, name


@pytest.mark.slow
def test_deltas_after_four_steps_agree(requests: Requests, photographs: Path, tmp_path: Path) -> None:
    settings = RepairSettings.model_validate(
        {
            "recipe": "paper",
            "keep": "last",
            "max_steps": STEPS,
            "image_size": SIZE,
            "eval_images": 1,
            "workers": 0,
            "lr": 0.05,
            **MARKING,
        }
    )
    deltas = {}
    for name, request in requests.items():
        result = api.repair(RepairRequest(request, [str(photographs)], settings), tmp_path / name)
        assert result is not None
        deltas[name] = load_file(tmp_path / name / "adapter.safetensors")
    expected = deltas["dinov2"]
    assert len(expected) == 4 * 8  # of the blocks up to it
    largest = max(float(delta.abs().max()) for delta in expected.values())
    for name, found in deltas.items():
        assert found.keys() == expected.keys(), name
        assert max(float((found[key] - expected[key]).abs().max()) for key in expected) <= 1e-5 * max(largest, 1), name
