"""Across libraries: the same features from the tensors of another library's model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import GATED, PLAIN, random_tensors
from safetensors.torch import save_file

from sinder_cli.export.exporting import ExportResult

CUSTOM = "dinov2_custom"
Export = Callable[..., ExportResult]

VARIANTS = {
    "plain": PLAIN,
    "gated, registers": GATED,
    "registers": replace(PLAIN, registers=4),
    "gated": replace(GATED, registers=0),
    "without mask": replace(PLAIN, mask_token=False),
    "without LayerScale": replace(PLAIN, layer_scale=False, mask_token=False),
    "without bias of q, k, v": replace(PLAIN, qkv_bias=False),
    "without any bias": replace(PLAIN, qkv_bias=False, proj_bias=False, mlp_bias=False),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(random_tensors(request.param), path)
    return path


def test_transformers_computes_the_same_hidden_states(export: Export, checkpoint: Path, tmp_path: Path) -> None:
    result = export(CUSTOM, "transformers", tmp_path / "out", checkpoint)
    assert result.check.verified
    assert result.check.difference is not None
    assert result.check.difference < 1e-5
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
