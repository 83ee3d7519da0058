"""Three steps of a repair of every family, and what comes out of it goes back into the library, and into sinder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import EAGER
from hf_samples import SAMPLES
from PIL import Image
from safetensors.torch import load_file
from sinder_plugins.hf.families import FAMILIES

from sinder_cli import Backbone, ModelRequest, NoInputError, api
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.backbone.opening import load_module
from sinder_cli.exporting.targets import ExportSettings
from sinder_cli.requests import AnalyzeRequest, ExportRequest, PredictRequest, RepairRequest

Saved = Callable[[str], Path]
Opened = Callable[..., Backbone]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(4):
        noise = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{seed}.png")
    return folder


def repaired(folder: Path, photos: Path, out: Path) -> dict[str, Any]:
    result = api.repair(RepairRequest(ModelRequest(f"hf/{folder}"), [str(photos)], EAGER), out)
    assert result is not None
    return result.summary


@pytest.mark.parametrize("name", SAMPLES)
def test_a_repaired_model_goes_back_into_the_library(
    name: str, saved: Saved, opened: Opened, photos: Path, tmp_path: Path
) -> None:
    summary = repaired(saved(name), photos, tmp_path / "run")
    assert summary["steps"] == 3
    assert summary["changed_weights"] > 0
    weights, after = opened(saved(name)).weights, load_file(tmp_path / "run" / "model.safetensors")
    before = {weights.output_name(key): tensor for key, tensor in weights.read(weights.names).items()}
    assert list(after) == list(before)
    changed = sum(not torch.equal(tensor, before[key]) for key, tensor in after.items())
    assert 0 < changed <= summary["changed_weights"]  # fewer where gate and up are one tensor

    (tmp_path / "library").mkdir()
    shutil.copy(tmp_path / "run" / "model.safetensors", tmp_path / "library")
    config = json.loads((saved(name) / "config.json").read_text())
    (tmp_path / "library" / "config.json").write_text(json.dumps(config.get("vision_config", config)))
    module = load_module(opened(tmp_path / "library"))
    model, told = in_library(type(module), tmp_path / "library", "MaskedImage" in SAMPLES[name].model)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    mine, other = module.state_dict(), model.state_dict()
    fused = {key for key in mine if "weights_in" in key or "weights_out" in key}
    assert all(torch.equal(mine[key], other[key]) for key in mine.keys() - fused)


def in_library(kind: Any, folder: Path, masked: bool) -> Any:
    """The library's encoder without heads, from a folder, and what loading it had to tell."""
    family = FAMILIES[kind.config_class.model_type]
    asked = {"use_mask_token": True} if masked else {}
    return kind.from_pretrained(folder, output_loading_info=True, **family.arguments, **family.settings, **asked)


def test_a_run_directory_stands_without_the_folder_it_came_from(saved: Saved, photos: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "folder", tmp_path / "run"
    shutil.copytree(saved("DINOv2"), folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "size": 48}')
    repaired(folder, photos, run)
    assert {path.name for path in (run / "sidecars").iterdir()} == {"config.json", "preprocessor_config.json"}
    shutil.rmtree(folder)

    backbone = api.open_model(ModelRequest(str(run)))
    assert (backbone.name, backbone.image_size, backbone.mean) == (f"hf/{folder}", 48, (0.1, 0.2, 0.3))
    assert len(api.predict_defects(PredictRequest(ModelRequest(str(run)), ("cumulative",))).gaps()) == 3
    out = tmp_path / "out.safetensors"
    api.export(ExportRequest(ModelRequest(str(run)), ExportSettings("native")), out)
    assert load_file(out).keys() == backbone.weights.output_infos().keys()
    settings = AnalyzeSettings(workers=0, figures=0)
    compared = api.analyze(
        AnalyzeRequest(ModelRequest(str(run)), [str(photos)], settings, compare=ModelRequest(str(run)))
    )
    assert compared is not None
    (run / "sidecars" / "config.json").unlink()
    with pytest.raises(NoInputError, match="its run directory keeps no config"):
        api.open_model(ModelRequest(str(run)))


def test_a_run_with_other_sidecars_replaces_those_of_the_last(saved: Saved, photos: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "folder", tmp_path / "run"
    shutil.copytree(saved("DINOv2"), folder)
    (folder / "preprocessor_config.json").write_text('{"size": 48}')
    repaired(folder, photos, run)
    (folder / "preprocessor_config.json").unlink()
    api.repair(RepairRequest(ModelRequest(f"hf/{folder}"), [str(photos)], EAGER, force=True), run)
    assert [path.name for path in (run / "sidecars").iterdir()] == ["config.json"]


def test_the_command_line_repairs_a_folder_in_its_own_process(
    saved: Saved, photos: Path, sinder: Callable[..., Any], tmp_path: Path
) -> None:
    eager = ("--max-steps", "2", "--min-gap", "0", "--mask-threshold", "0.3", "--min-tokens", "1", "--workers", "0")
    eager = ("--recipe", "paper", "--keep", "last", *eager)
    named = f"hf/{saved('DINOv2')}"
    run = sinder("repair", named, "--data", photos, *eager, "--out", tmp_path / "run")
    document = json.loads(run.stdout)
    assert document["steps"] == 2, run.stderr
    assert run.returncode == (document["verdict"] == "not improved")  # two steps on noise need not help
    exported = sinder("export", tmp_path / "run", "--to", "transformers", "--out", tmp_path / "out")
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["verified"]
    checked = sinder("check-backbone", named)
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["conforms"]
