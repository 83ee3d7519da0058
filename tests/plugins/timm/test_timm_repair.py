"""A model of timm's from end to end: predicted, repaired for three steps, and loaded back by timm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm_samples import NAMES

from sinder_cli import ModelRequest, api
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.defects.prediction import predict
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.requests import AnalyzeRequest, RepairRequest

Stored = Callable[[str], Path]

EAGER_TO_MARK = {"mask_threshold": 0.3, "min_tokens": 1, "min_gap": 0.0, "device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index in range(3):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((128, 128)).save(folder / f"{index}.png")
    return folder


def test_directions_are_predicted_without_the_module(kind: str, stored: Stored) -> None:
    backbone = api.open_model(ModelRequest(f"timm/{NAMES[kind]}", stored(kind)))
    directions = predict(backbone, ("block", "cumulative")).directions("cumulative")
    assert directions.shape == (backbone.depth, backbone.width)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(backbone.depth))


@pytest.mark.parametrize(
    "kind", ["plain", "packed", "scaling", "things", "pooled", "beit3", "eva02_clip", "mixed_rope"]
)
def test_three_steps_leave_a_file_that_timm_loads_strictly(
    kind: str, stored: Stored, photos: Path, tmp_path: Path
) -> None:
    request = ModelRequest(f"timm/{NAMES[kind]}", stored(kind))
    settings = RepairSettings(
        recipe="paper", keep="last", max_steps=3, lr=0.05, eval_images=2, stop_clean_fraction=1.0, **EAGER_TO_MARK
    )
    result = api.repair(RepairRequest(request, [str(photos)], settings), tmp_path / "run")
    assert result is not None
    assert result.summary["steps"] == 3

    before, after = load_file(stored(kind)), load_file(tmp_path / "run" / "model.safetensors")
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = trained_names(request)
    assert changed
    assert changed <= trained
    module = timm.create_model(NAMES[kind], num_classes=0, checkpoint_path=tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in module.state_dict().items())


def trained_names(request: ModelRequest) -> set[str]:
    """The weights of value, output and MLP; of fused ones, the whole tensor."""
    layers = api.open_model(request).layers
    branches = [branch for block in layers.blocks for branch in block.branches]
    roles = [("attention", role) for role in ("value", "output")] + [("mlp", role) for role in ("gate", "up", "down")]
    refs = [getattr(getattr(branch, part), role, None) for branch in branches for part, role in roles]
    return {ref.name for ref in refs if ref is not None}


def test_a_repair_leaves_queries_and_keys_of_fused_projections_alone(
    stored: Stored, photos: Path, tmp_path: Path
) -> None:
    settings = RepairSettings(
        recipe="paper", keep="last", max_steps=3, lr=0.05, eval_images=1, stop_clean_fraction=1.0, **EAGER_TO_MARK
    )
    api.repair(
        RepairRequest(ModelRequest("timm/small_plain", stored("plain")), [str(photos)], settings), tmp_path / "run"
    )
    before, after = load_file(stored("plain")), load_file(tmp_path / "run" / "model.safetensors")
    fused = [name for name in before if name.endswith("qkv.weight")]
    assert all(torch.equal(before[name][:128], after[name][:128]) for name in fused)
    assert any(not torch.equal(before[name][128:], after[name][128:]) for name in fused)


def test_a_rotary_model_is_analyzed_at_each_image_shape(stored: Stored, photos: Path, tmp_path: Path) -> None:
    with Image.open(photos / "0.png") as photo:
        photo.resize((128, 96)).save(tmp_path / "wide.png")
        photo.resize((96, 128)).save(tmp_path / "tall.png")
    settings = AnalyzeSettings(resize="none", **EAGER_TO_MARK)
    result = api.analyze(AnalyzeRequest(ModelRequest("timm/small_dinov3", stored("dinov3")), [str(tmp_path)], settings))
    assert result is not None
    assert (result.analysis.images, len(result.analysis.blocks)) == (2, 3)
