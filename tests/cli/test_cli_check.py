"""`sinder check-backbone`: a table of passes and failures, exit 0 or 65."""

from __future__ import annotations

import json
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from installed import install
from safetensors.torch import save_file

Sinder = Callable[..., subprocess.CompletedProcess[str]]
NANO = Path(__file__).parents[1] / "third_party" / "sinder_nano.py"


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the example plugin."""
    path = tmp_path_factory.mktemp("nano") / "nano.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(runpy.run_path(str(NANO))["build"]().state_dict(), path)
    return path


def install_nano(folder: Path, replaced: str, by: str) -> None:
    """The example plugin with one thing in it changed."""
    text = NANO.read_text(encoding="utf-8")
    assert text.count(replaced) == 1
    install(folder, "sinder-nano", "nano", "")
    (folder / "sinder_nano_module.py").write_text(text.replace(replaced, by), encoding="utf-8")


def test_a_plugin_that_conforms_exits_0_with_a_document(sinder: Sinder, small: Path) -> None:
    run = sinder("check-backbone", "dinov2_custom", "--weights", small)
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert (document["model"], document["weights"], document["conforms"]) == ("dinov2_custom", str(small), True)
    assert {check["outcome"] for check in document["checks"]} == {"passed"}
    assert all(check["name"] and check["detail"] for check in document["checks"])


def test_one_that_does_not_exits_65_and_names_what_failed(sinder: Sinder, nano: Path, tmp_path: Path) -> None:
    install_nano(tmp_path, 'activation="softplus"', 'activation="relu"')
    run = sinder("check-backbone", "nano_vit", "--weights", nano, PYTHONPATH=str(tmp_path))
    assert run.returncode == 65
    document = json.loads(run.stdout)
    assert not document["conforms"]
    failed = {check["name"]: check["detail"] for check in document["checks"] if check["outcome"] == "failed"}
    assert "block 0, mlp: the map's formula is off by" in failed["blocks: formula"]
    told = f"sinder: error: nano_vit does not conform: failed: {', '.join(failed)}; fix its plugin"
    assert run.stderr.splitlines()[-1] == told


def test_the_table_has_a_line_a_check_within_80_columns(sinder: Sinder, nano: Path, tmp_path: Path) -> None:
    install_nano(tmp_path, "        forward=lambda vit, images: vit(embed(vit, images)),\n", "")
    run = sinder("check-backbone", "nano_vit", "--weights", nano, "--format", "table", PYTHONPATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert max(map(len, lines[1:])) <= 80
    (row,) = [line.split() for line in lines if "passes: forward" in line]
    assert row[2:4] == ["not", "given"]
    assert lines[-1] == "nano_vit conforms: 12 checks passed, 1 not given."


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("demo_vitt",), 2), (("dinov2_custom", "--weights", "no/such.pth"), 66), (("dinov2_custom",), 2)],
)
def test_what_is_no_backbone_is_no_verdict(arguments: tuple[str, ...], code: int, sinder: Sinder) -> None:
    run = sinder("check-backbone", *arguments)
    assert (run.returncode, run.stdout, len(run.stderr.splitlines())) == (code, "", 1)
