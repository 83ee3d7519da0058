"""The demo, end to end: the planted defect goes, and the features come back to those of the clean twin."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sinder_plugins.demo.drawing import draw_images
from sinder_plugins.demo.planting import demo_weights
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sinder_cli import ModelRequest, api
from sinder_cli.backbone.opening import load_module
from sinder_cli.defects.tokens import last_tokens

RUNS = Path(__file__).parents[3] / "docs" / "runs.md"
pytestmark = pytest.mark.slow


def final_tokens(request: ModelRequest, seed: int) -> Tensor:
    """`[8, 401, N]` before the final norm, on images that the repair has not seen."""
    backbone = api.open_model(request)
    preprocess = api.preprocessing(backbone, None)
    images = torch.stack([preprocess(image) for image in draw_images(8, seed)])
    return last_tokens(backbone, load_module(backbone), images)


def documented_files() -> list[str]:
    """The names in the table of the run directory, but for those that come with options or other models alone."""
    table = RUNS.read_text(encoding="utf-8").split("## What a repair leaves behind")[1].split("## ")[0]
    return re.findall(r"^\| `([^`/]+)/?` \| (?!with )", table, re.MULTILINE)


def test_no_outlying_token_is_left_and_no_other_is_spoilt(repaired: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((repaired / "summary.json").read_text())
    before, after = summary["defects"]["before"], summary["defects"]["after"]
    fidelity = summary["fidelity"]["to_inpainted"]
    with capsys.disabled():
        print(f"\ndemo: {summary['steps']} steps, {summary['seconds']} s, to the inpainted original {fidelity},")
        print(f"  before {before}\n  after  {after}")
    assert (summary["verdict"], summary["recipe"], summary["stopped_by"]) == ("repaired", "sinder", "clean")
    assert before["tokens"] >= 3 * summary["evaluation_images"]
    assert before["max_ratio"] > 10
    assert (after["tokens"], after["fraction"]) == (0, 0)
    assert after["max_ratio"] < 3
    assert fidelity["after"]["cls"] >= max(0.99, fidelity["before"]["cls"])
    assert fidelity["after"]["good_p01"] >= 0.99
    assert fidelity["after"]["marked"] > fidelity["before"]["marked"]
    assert summary["cls_cosine"] >= 0.98
    assert 0 < summary["best_step"] <= summary["steps"]
    assert summary["clean_fraction"] == 1
    assert summary["seconds"] > 0


def test_features_of_unseen_images_return_to_the_clean_twins(repaired: Path) -> None:
    original = final_tokens(ModelRequest("demo_vit"), seed=99)
    healed = final_tokens(ModelRequest("demo_vit", repaired / "model.safetensors"), seed=99)
    clean = final_tokens(ModelRequest("demo_vit_clean"), seed=99)
    before, after = (cosine_similarity(tokens, clean, dim=-1) for tokens in (original, healed))
    cls_before, cls_after = before[:, 0].mean(), after[:, 0].mean()
    patches_before, patches_after = before[:, 1:].mean(), after[:, 1:].mean()
    assert cls_after >= 0.99
    assert cls_after > cls_before
    assert patches_after > patches_before


def test_the_run_directory_holds_exactly_what_the_readme_names(repaired: Path) -> None:
    assert len(documented_files()) >= 7
    assert sorted(path.name for path in repaired.iterdir()) == sorted(documented_files())


def test_every_file_of_the_run_directory_is_valid(repaired: Path) -> None:
    config, summary = (json.loads((repaired / f"{name}.json").read_text()) for name in ("config", "summary"))
    assert config["settings"]["seed"] == 0
    assert config["model"] == summary["model"] == "demo_vit"
    lines = [json.loads(line) for line in (repaired / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, summary["steps"] + 1))
    assert (lines[0]["block"], lines[0]["images"]) == (5, 1)
    assert lines[-1]["clean_fraction"] == summary["clean_fraction"]
    looks = [json.loads(line) for line in (repaired / "evaluations.jsonl").read_text().splitlines()]
    kept = next(look for look in looks if look["step"] == summary["best_step"])
    assert (kept["outlying"], kept["holds"], kept["best"]) == (0, True, True)
    outliers = json.loads((repaired / "outliers.json").read_text())
    assert len(outliers["images"]) == summary["scan"]["images"] == summary["data"]["count"]
    assert [block["block"] for block in outliers["blocks"] if block["predicted"]] == list(range(5, 12))
    original, healed = demo_weights(True), load_file(repaired / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in healed.items()} == {
        name: (t.shape, t.dtype) for name, t in original.items()
    }
    deltas = load_file(repaired / "adapter.safetensors")
    assert len(deltas) == summary["changed_weights"] <= 3  # the planted weight, and hardly another
    assert sum(int(delta.count_nonzero()) for delta in deltas.values()) == summary["trained_values"] <= 6
    assert all(delta.any() for delta in deltas.values())
    page = (repaired / "report.html").read_text(encoding="utf-8")
    loads = re.findall(
        r"""(?:src|href|action)\s*=\s*["']?(?!data:|#)([^"'\s>]+)|url\((?!["']?data:|#)([^)]*)\)""", page
    )
    assert [found for found in loads if "arxiv.org" not in found[0]] == []
    assert not re.search(r"<(?:script|link|iframe)[^>]+(?:src|href)|@import", page)
    assert (repaired / "README.md").read_text(encoding="utf-8").lstrip().startswith(("#", "---"))


def test_the_clean_twin_comes_out_as_it_went_in(repaired_clean: Path) -> None:
    folder = repaired_clean
    original, written = demo_weights(False), load_file(folder / "model.safetensors")
    assert list(original) == [name for name in original if torch.equal(original[name], written[name])]
    assert len(written) == len(original)
    assert load_file(folder / "adapter.safetensors") == {}
    assert (folder / "metrics.jsonl").read_text() == ""
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["verdict"], summary["stopped_by"], summary["steps"]) == ("healthy", "healthy", 0)
    assert summary["scan"]["images"] == summary["data"]["count"]
    assert (summary["scan"]["defective_images"], summary["defects"]["after"]["tokens"]) == (0, 0)
    assert (summary["changed_weights"], summary["trained_values"]) == (0, 0)
    assert summary["cls_cosine"] == pytest.approx(1)
