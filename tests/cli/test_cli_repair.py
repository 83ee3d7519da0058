"""`sinder repair` and `sinder export` on checkpoints in the official format, with photographs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sinder_cli import ModelRequest, api
from sinder_cli.backbone.opening import load_module
from sinder_cli.repairing.loop import DivergedError
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.requests import RepairRequest

Sinder = Callable[..., subprocess.CompletedProcess[str]]
CUSTOM = "dinov2_custom"
FEW = ("--recipe", "paper", "--keep", "last", "--eval-images", "3", "--lr", "0.05")
NOT_IMPROVED = 1  # of the exit codes: so few steps move weights, and mend nothing


def names_in_order(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.offset_keys())


def settings_of(run: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((run / "config.json").read_text())["settings"]
    return settings


@pytest.fixture(scope="module")
def run_folder(sinder: Sinder, vits14: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short repair of the ViT-S/14 with the planted defect; the settings come from a file and the command line."""
    root = tmp_path_factory.mktemp("repair")
    (root / "settings.toml").write_text("lr = 0.05\nmax_steps = 9\nimage_size = 170\neval_images = 4\n")
    options = ("--config", root / "settings.toml", "--max-steps", "15", "--out", root / "run")
    run = sinder("repair", "dinov2_vits14", "--weights", vits14, "--data", photographs, *options)
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert Path(document["folder"]) == root / "run"
    assert Path(document["report"]).is_file()
    return root / "run"


@pytest.mark.slow
def test_fewer_tokens_stand_out_after_a_repair(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    before, after = summary["defects"]["before"], summary["defects"]["after"]
    assert before["tokens"] >= 3 * summary["evaluation_images"]
    assert after["tokens"] < before["tokens"]
    assert after["max_norm"] < 0.7 * before["max_norm"]
    assert after["median_norm"] == pytest.approx(before["median_norm"], rel=0.05)
    assert summary["cls_cosine"] > 0.98
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["block"] == 2
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    assert losses[-1] < losses[0]


def test_the_command_line_overrides_the_file_which_overrides_the_defaults(run_folder: Path) -> None:
    settings = settings_of(run_folder)
    assert settings["max_steps"] == 15
    assert settings["lr"] == 0.05
    assert settings["momentum"] == 0.9
    assert settings["image_size"] == 168  # whole patches
    assert len((run_folder / "metrics.jsonl").read_text().splitlines()) == 15


@pytest.mark.slow
def test_an_exported_run_loads_again_under_its_official_name(
    run_folder: Path, sinder: Sinder, vits14: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "repaired.pth"
    run = sinder("export", run_folder, "--to", "native", "--out", exported)
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert (document["verified"], document["bytes"]) == (True, exported.stat().st_size)
    state, original = torch.load(exported, weights_only=True), torch.load(vits14, weights_only=True)
    healed = load_file(run_folder / "model.safetensors")
    assert list(state) == list(original) == names_in_order(run_folder / "model.safetensors")
    assert all(torch.equal(state[name], healed[name]) for name in state)
    changed = {name for name in state if not torch.equal(state[name], original[name])}
    assert changed  # what triggers the defect, or writes it: one is as good as the other
    assert changed <= {"blocks.2.mlp.fc1.weight", "blocks.2.mlp.fc2.weight"}
    queries_and_keys = slice(0, 2 * 384)
    for block in range(3):
        name = f"blocks.{block}.attn.qkv.weight"
        assert torch.equal(state[name][queries_and_keys], original[name][queries_and_keys])
    again = load_module(api.open_model(ModelRequest("dinov2_vits14", exported))).state_dict()
    assert all(torch.equal(again[name], healed[name]) for name in again)


@pytest.mark.slow
def test_a_chunked_half_precision_checkpoint_keeps_names_order_and_dtypes(
    sinder: Sinder, chunked_half: Path, photographs: Path, tmp_path: Path
) -> None:
    options = ("--batch-size", "3", "--max-steps", "6", "--heads", "4", *FEW, "--out", tmp_path / "run")
    run = sinder("repair", CUSTOM, photographs, "--weights", chunked_half, *options)
    assert run.returncode == NOT_IMPROVED, run.stderr
    original: dict[str, Tensor] = torch.load(chunked_half, weights_only=True)["teacher"]["backbone"]
    written = load_file(tmp_path / "run" / "model.safetensors")
    assert names_in_order(tmp_path / "run" / "model.safetensors") == list(original)
    assert "blocks.1.3.mlp.fc1.weight" in written
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    changed = {name for name in original if not torch.equal(original[name], written[name])}
    assert "blocks.1.2.mlp.fc2.weight" in changed
    assert not any(name.startswith("blocks.1.3.") or not name.startswith("blocks") for name in changed)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [3, 6, 9, 12, 15, 18]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["heads"] == 4
    exported = sinder("export", tmp_path / "run", "--to", "native", "--out", tmp_path / "x.safetensors")
    assert exported.returncode == 0, exported.stderr
    assert names_in_order(tmp_path / "x.safetensors") == list(original)


def test_a_corrupt_image_among_good_ones_is_skipped_and_counted(
    sinder: Sinder, small: Path, photographs: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes((photographs / "rocket.jpg").read_bytes()[:20_000])
    options = ("--weights", small, "--max-steps", "2", *FEW, "--out", tmp_path / "run")
    run = sinder("repair", CUSTOM, broken, photographs / "coffee.png", photographs / "astronaut.png", *options)
    assert run.returncode == NOT_IMPROVED, run.stderr
    assert run.stderr.count(f"sinder: warning: skipped {broken}") == 1
    assert json.loads(run.stdout)["skipped_images"] == 1
    assert json.loads(run.stdout)["evaluation_images"] == 1


@pytest.mark.parametrize(
    ("line", "word"),
    [("learning_rate = 0.1", "learning_rate"), ('lr = "fast"', "lr"), ("window = 0", "window"), ("lr = ", "TOML")],
)
def test_a_bad_settings_file_is_refused_by_the_setting(line: str, word: str, sinder: Sinder, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(line)
    run = sinder("repair", "demo_vit", "--config", tmp_path / "settings.toml", "--out", tmp_path / "run")
    assert run.returncode == 2
    assert word in run.stderr
    assert "settings.toml" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_repair_that_diverges_says_so_and_writes_no_model(small: Path, photographs: Path, tmp_path: Path) -> None:
    few = {
        "recipe": "paper",
        "keep": "last",
        "max_steps": 2,
        "eval_images": 2,
        "stop_clean_fraction": 1.0,
        "workers": 0,
    }
    settings = RepairSettings.model_validate(few).model_copy(update={"lr": 1e15})  # more than a user may ask for
    request = ModelRequest(CUSTOM, small)
    with pytest.raises(DivergedError, match="start anew with a lower --trust, or --lr, and --force"):
        api.repair(RepairRequest(request, [str(photographs)], settings), tmp_path / "run")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    begun = {"config.json", "images.jsonl", "outliers.json", "metrics.jsonl"}
    assert begun <= left <= begun | {"evaluations.jsonl", "checkpoints"}


def test_the_seed_decides_the_weights_and_the_order(
    sinder: Sinder, small: Path, photographs: Path, tmp_path: Path
) -> None:
    options = ("--weights", small, "--max-steps", "4", "--image-size", "168", *FEW)
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(sinder, "repair", CUSTOM, photographs, *options, "--seed", seed, "--out", tmp_path / name)
            for name, seed in (("a", "5"), ("b", "5"), ("c", "6"))
        ]
    assert [run.result().returncode for run in runs] == [NOT_IMPROVED] * 3
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_healthy_model_is_left_as_it_is(sinder: Sinder, tmp_path: Path) -> None:
    """Exit code 0, no step, and every weight bit for bit that of the original."""
    out = tmp_path / "run"
    run = sinder("repair", "demo_vit_clean", "--image-size", "112", "--workers", "0", "--out", out)
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert (document["verdict"], document["stopped_by"]) == ("healthy", "healthy")
    assert (document["steps"], document["changed_weights"]) == (0, 0)
    original = load_module(api.open_model(ModelRequest("demo_vit_clean"))).state_dict()
    left = load_module(api.open_model(ModelRequest(str(out)))).state_dict()
    assert left.keys() == original.keys()
    assert all(torch.equal(left[name], tensor) for name, tensor in original.items())


def test_a_model_that_did_not_improve_keeps_its_weights(
    sinder: Sinder, small: Path, photographs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ("--weights", small, "--recipe", "paper", "--max-steps", "1", "--lr", "0.05", "--format", "table")
    run = sinder("repair", CUSTOM, photographs, *options, "--out", out)
    assert run.returncode == 1, run.stderr
    assert run.stdout.startswith("Not improved: ")
    assert json.loads((out / "summary.json").read_text())["verdict"] == "not improved"
    original, left = load_file(small), load_file(out / "model.safetensors")
    assert all(torch.equal(left[name], tensor) for name, tensor in original.items())


def test_the_default_recipe_repairs_a_planted_defect_without_any_image(
    sinder: Sinder, small: Path, tmp_path: Path
) -> None:
    """Drawn pictures do; the one singular value that carries the defect is all that changes."""
    run = sinder("repair", CUSTOM, "--weights", small, "--workers", "0", "--out", tmp_path / "run")
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert (document["recipe"], document["verdict"]) == ("sinder", "repaired")
    assert document["data"]["given"] == 0
    assert document["defects"]["before"]["tokens"] > 0 == document["defects"]["after"]["tokens"]
    original, left = load_file(small), load_file(tmp_path / "run" / "model.safetensors")
    assert [name for name, tensor in original.items() if not torch.equal(left[name], tensor)] == [
        "blocks.2.mlp.fc2.weight"
    ]
