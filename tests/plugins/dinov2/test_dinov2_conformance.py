"""The DINOv2 plugin through the check that anyone's plugin can be run through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from sinder_plugins.dinov2.config import Config
from torch import Tensor

from sinder_cli import ModelRequest, api

Drawn = Callable[[Config], dict[str, Tensor]]


def test_every_kind_of_dinov2_conforms(config: Config, drawn: Drawn, tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_file(drawn(config), path)
    result = api.check_backbone(ModelRequest("dinov2_custom", path))
    assert {check.name: check.detail for check in result.checks if check.outcome != "passed"} == {}
    assert len(result.checks) == 13


def test_so_does_a_training_checkpoint_in_half_precision(tiny: Config, drawn: Drawn, tmp_path: Path) -> None:
    path = tmp_path / "training.pth"
    torch.save({"teacher": {"backbone": {name: tensor.half() for name, tensor in drawn(tiny).items()}}}, path)
    result = api.check_backbone(ModelRequest("dinov2_custom", path))
    assert {check.name: check.detail for check in result.checks if check.outcome != "passed"} == {}
