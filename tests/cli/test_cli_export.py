"""`sinder export` as a user calls it: results, exit codes, and nothing half written."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Sinder = Callable[..., subprocess.CompletedProcess[str]]
CUSTOM = "dinov2_custom"


def test_the_result_tells_of_the_writing_and_the_check(sinder: Sinder, small: Path, tmp_path: Path) -> None:
    done = sinder("export", CUSTOM, "--weights", small, "--to", "torchhub", "--out", tmp_path / "hub")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["verified"] is True
    assert document["check"]["tolerance"] == 1e-5
    assert document["bytes"] == sum(file["bytes"] for file in document["files"])
    assert {file["name"] for file in document["files"]} > {"hubconf.py", "README.md", "dinov2_custom.pth"}
    table = sinder(
        "export", CUSTOM, "--weights", small, "--to", "native", "-o", tmp_path / "a.pth", "--format", "table"
    )
    verified, loading = table.stdout.splitlines()[-2:]
    assert verified == "verified: read back bit for bit: no difference"
    line = f"import torch; state = torch.load({str(tmp_path / 'a.pth')!r}, map_location='cpu', weights_only=True)"
    assert loading == f"in Python: {line}"  # whole, however long
    found: dict[str, Any] = {}
    exec(line, found)
    assert list(found["state"]) == list(load_file(small))


def test_an_output_that_is_there_takes_force(sinder: Sinder, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    command = ("export", CUSTOM, "--weights", small, "--to", "native", "--out", out)
    assert sinder(*command).returncode == 0
    before = out.read_bytes()
    done = sinder(*command, "--dtype", "float16")
    assert done.returncode == 73
    assert done.stderr.splitlines()[-1] == f"sinder: error: cannot create {out}: it already exists; --force replaces it"
    assert out.read_bytes() == before
    assert sinder(*command, "--dtype", "float16", "--force").returncode == 0
    state = torch.load(out, weights_only=True)
    assert all(torch.equal(state[name], tensor.half()) for name, tensor in load_file(small).items())


def test_force_does_not_replace_a_folder_of_other_files(sinder: Sinder, small: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    done = sinder("export", CUSTOM, "--weights", small, "--to", "torchhub", "--out", tmp_path / "photos", "--force")
    assert done.returncode == 73
    assert "it is not empty, and is not an export" in done.stderr
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]


@pytest.mark.parametrize(("target", "name"), [("native", "out.pth"), ("torchhub", "out"), ("onnx", "out.onnx")])
def test_a_disk_that_fills_up_leaves_the_old_one(
    sinder: Sinder, environment: dict[str, str], small: Path, tmp_path: Path, target: str, name: str
) -> None:
    command = ["export", CUSTOM, "--weights", str(small), "--to", target, "--out", str(tmp_path / name)]
    assert sinder(*command, "--no-verify").returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    size = 1 << 20
    done = subprocess.run(
        [sys.executable, "-m", "sinder_cli", *command, "--force"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    assert done.returncode == 74, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"sinder: error: cannot write {tmp_path / name}: ")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
