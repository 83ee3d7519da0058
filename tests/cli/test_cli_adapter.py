"""`--adapter` wherever a model is named: the weights of the run, and one line for every file that does not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sinder_cli import ModelRequest, api

Sinder = Callable[..., subprocess.CompletedProcess[str]]
CUSTOM = "dinov2_custom"
NOT_IMPROVED = 1  # four steps move weights, which these tests are about, and are too few to mend anything
FEW = ("--recipe", "paper", "--keep", "last", "--max-steps", "4", "--eval-images", "2", "--lr", "0.05")


@pytest.fixture(scope="module")
def run(sinder: Sinder, small: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short repair, with its bases on the CPU."""
    folder = tmp_path_factory.mktemp("adapter") / "run"
    options = ("--data", photographs, "--out", folder, "--offload", *FEW)
    done = sinder("repair", CUSTOM, "--weights", small, *options)
    assert done.returncode == NOT_IMPROVED, done.stderr
    return folder


@pytest.fixture(scope="module")
def adapter(run: Path) -> Path:
    return run / "adapter.safetensors"


def test_export_writes_the_repaired_weights_of_the_run(
    sinder: Sinder, run: Path, adapter: Path, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "repaired.safetensors"
    done = sinder("export", CUSTOM, "--weights", small, "--adapter", adapter, "--to", "native", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "singular values of" in done.stderr
    exported, model = load_file(out), load_file(run / "model.safetensors")
    assert list(exported) == list(model)
    assert all((exported[name] == model[name]).all() for name in model)
    assert any((exported[name] != tensor).any() for name, tensor in load_file(small).items())


def test_predicted_directions_are_those_of_the_run(sinder: Sinder, run: Path, adapter: Path, small: Path) -> None:
    chosen = ("--stage", "cumulative", "--format", "json")
    of_run = sinder("predict-defects", run, *chosen)
    of_adapter = sinder("predict-defects", CUSTOM, "--weights", small, "--adapter", adapter, *chosen)
    original = sinder("predict-defects", CUSTOM, "--weights", small, *chosen)
    assert of_adapter.returncode == 0, of_adapter.stderr
    assert json.loads(of_adapter.stdout) == json.loads(of_run.stdout) != json.loads(original.stdout)


def test_analyze_compares_with_and_without(sinder: Sinder, adapter: Path, small: Path, photographs: Path) -> None:
    weights = ("--weights", small, "--compare-weights", small)
    options = ("--data", photographs, "--compare", CUSTOM, "--image-size", "168", "--limit", "2", "-o", "-")
    after = sinder("analyze", CUSTOM, *weights, "--compare-adapter", adapter, *options)
    before = sinder("analyze", CUSTOM, *weights, "--adapter", adapter, *options)
    assert after.returncode == before.returncode == 0, after.stderr + before.stderr
    first, second = (json.loads(done.stdout) for done in (after, before))
    assert first["other"]["blocks"] == second["blocks"] != first["blocks"] == second["other"]["blocks"]


def test_a_repair_goes_on_from_the_adapted_weights(
    sinder: Sinder, run: Path, adapter: Path, small: Path, photographs: Path, tmp_path: Path
) -> None:
    options = ("--data", photographs, "--out", tmp_path / "further", *FEW)
    done = sinder("repair", CUSTOM, "--weights", small, "--adapter", adapter, *options)
    assert done.returncode == NOT_IMPROVED, done.stderr
    weights = json.loads((tmp_path / "further" / "config.json").read_text())["weights"]
    repaired = api.open_model(ModelRequest(str(run))).weights
    assert weights["fingerprint"] == repaired.fingerprint()
    assert weights["source"] == f"{small}, adapted by {adapter}"
    lines = [(tmp_path / "further" / "metrics.jsonl").read_text(), (run / "metrics.jsonl").read_text()]
    assert len({json.loads(text.splitlines()[0])["loss"] for text in lines}) == 2


def test_offloading_changes_no_result(
    sinder: Sinder, run: Path, small: Path, photographs: Path, tmp_path: Path
) -> None:
    options = ("--data", photographs, "--out", tmp_path / "run", *FEW)
    done = sinder("repair", CUSTOM, "--weights", small, *options)
    assert done.returncode == NOT_IMPROVED, done.stderr
    for name in ("model.safetensors", "adapter.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize(
    ("given", "code", "line"),
    [
        ("missing.safetensors", 66, "cannot read adapter {path}: there is no such file; give the adapter.safetensors"),
        ("folder", 66, "cannot read adapter {path}: it is a folder; "),
        (
            "checkpoint.safetensors",
            65,
            "cannot read adapter {path}: its format is None, neither 'sinder-adapter-1' nor 'sinder-diff-1'; ",
        ),
        ("text.safetensors", 65, "cannot read adapter {path}: "),
        ("adapter.safetensors", 78, "adapter {path} does not fit {other}: it was made for weights of dinov2_custom "),
    ],
)
def test_an_adapter_that_cannot_be_used_is_one_line(
    sinder: Sinder, adapter: Path, small: Path, tmp_path: Path, given: str, code: int, line: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.safetensors").write_text("no adapter")
    shutil.copy(small, tmp_path / "checkpoint.safetensors")
    shutil.copy(adapter, tmp_path / "adapter.safetensors")
    other, path = tmp_path / "other.safetensors", tmp_path / given
    tensors = load_file(small)
    save_file(tensors | {"cls_token": tensors["cls_token"] + 1}, other)
    done = sinder("predict-defects", CUSTOM, "--weights", other, "--adapter", path)
    assert done.returncode == code
    errors = [text for text in done.stderr.splitlines() if text.startswith("sinder: error: ")]
    assert errors == done.stderr.splitlines()[-1:]
    assert errors[0].startswith("sinder: error: " + line.format(path=path, other=other))
    assert done.stdout == ""


def test_an_adapter_does_not_fit_the_run_it_came_from(sinder: Sinder, run: Path, adapter: Path) -> None:
    done = sinder("predict-defects", run, "--adapter", adapter)
    assert done.returncode == 78
    assert f"adapter {adapter} does not fit {run / 'model.safetensors'}" in done.stderr.splitlines()[-1]


def test_an_adapter_of_a_further_repair_fits_the_repaired_run(
    sinder: Sinder, run: Path, photographs: Path, tmp_path: Path
) -> None:
    further = tmp_path / "further"
    done = sinder("repair", run, "--data", photographs, "--out", further, *FEW)
    assert done.returncode == NOT_IMPROVED, done.stderr
    out = tmp_path / "twice.safetensors"
    done = sinder("export", run, "--adapter", further / "adapter.safetensors", "--to", "native", "--out", out)
    assert done.returncode == 0, done.stderr
    exported, model = load_file(out), load_file(further / "model.safetensors")
    assert all((exported[name] == model[name]).all() for name in model)


def test_an_adapter_of_the_second_model_needs_a_second_model(sinder: Sinder, adapter: Path) -> None:
    done = sinder("analyze", CUSTOM, "--compare-adapter", adapter)
    assert done.returncode == 2
    assert "name it with --compare" in done.stderr
