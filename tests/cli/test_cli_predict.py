"""`sinder predict-defects`: the same bytes every time, from the weights alone."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load, load_file
from sinder_plugins.dinov2.config import OFFICIAL

from sinder_cli import Backbone, ModelRequest, UnavailableError, api
from sinder_cli.defects.settings import STAGES
from sinder_cli.report.tables import prediction_table
from sinder_cli.requests import PredictRequest

Sinder = Callable[..., subprocess.CompletedProcess[str]]
CUSTOM = "dinov2_custom"


def on_a_terminal(arguments: list[str], environment: dict[str, str], columns: int = 80) -> tuple[str, str]:
    """Standard output of `sinder` as a terminal of so many columns gets it, and standard error from a pipe."""
    leader, follower = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    command = [sys.executable, "-m", "sinder_cli", *arguments]
    with subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, env=environment) as process:
        os.close(follower)
        shown = bytearray()
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:  # how Linux says that the other side is closed
                break
            if not part:
                break
            shown += part
        assert process.stderr is not None
        said = process.stderr.read().decode()
    os.close(leader)
    assert process.returncode == 0, said
    return shown.decode().replace("\r\n", "\n"), said


@pytest.fixture(scope="module")
def twice(sinder: Sinder, small: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    """The document and the file of two runs of the same command."""
    root = tmp_path_factory.mktemp("predicted")
    files = [root / "first.safetensors", root / "second.safetensors"]
    runs = [sinder("predict-defects", CUSTOM, "--weights", small, "-o", file) for file in files]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    return [(run.stdout, file) for run, file in zip(runs, files, strict=True)]


def test_two_runs_give_the_same_bytes(twice: list[tuple[str, Path]]) -> None:
    (document, file), (other_document, other_file) = twice
    assert document == other_document
    assert document
    assert file.read_bytes() == other_file.read_bytes()


def test_the_file_holds_unit_directions_that_the_document_speaks_of(twice: list[tuple[str, Path]]) -> None:
    document, stored = json.loads(twice[0][0]), load_file(twice[0][1])
    assert set(stored) == set(STAGES)
    for stage in STAGES:
        nu = stored[stage]
        assert (nu.shape, nu.dtype) == (torch.Size([4, 128]), torch.float32)
        assert torch.allclose(nu.norm(dim=1), torch.ones(4), atol=1e-6)
        largest = nu.gather(1, nu.abs().argmax(dim=1, keepdim=True))
        assert (largest > 0).all()
        for block in range(1, 4):
            turn = torch.rad2deg(torch.acos((nu[block].double() @ nu[block - 1].double()).abs().clamp(max=1)))
            assert document["blocks"][block]["angle_to_previous_deg"][stage] == pytest.approx(turn.item(), abs=0.05)


def test_the_document_has_the_promised_fields(twice: list[tuple[str, Path]]) -> None:
    document = json.loads(twice[0][0])
    assert document["model"] == CUSTOM
    assert [block["block"] for block in document["blocks"]] == [0, 1, 2, 3]
    for block in document["blocks"]:
        assert list(block) == ["block", "sigma", "gap", "angle_to_previous_deg"]
        for stage in STAGES:
            assert block["sigma"][stage] > 0
            assert block["gap"][stage] >= 1
            assert (block["angle_to_previous_deg"][stage] is None) == (block["block"] == 0)
    assert document["blocks"][2]["gap"]["mlp"] > 5  # where the defect was planted
    assert document["blocks"][3]["gap"]["mlp"] < 1.5
    assert document["settled_from"]["mlp"] is None


def test_a_dash_writes_safetensors_to_standard_output_and_nothing_else(
    small: Path, environment: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "sinder_cli", "predict-defects", CUSTOM, "--weights", str(small)]
    chosen = ["--stage", "cumulative", "--stage", "mlp", "-o", "-", "--format", "json"]
    run = subprocess.run([*command, *chosen], capture_output=True, env=environment, timeout=300, check=True)
    stored = load(run.stdout)
    assert set(stored) == {"mlp", "cumulative"}
    header = int.from_bytes(run.stdout[:8], "little")
    assert len(run.stdout) == 8 + header + 2 * 4 * 128 * 4
    prediction = api.predict_defects(PredictRequest(ModelRequest(CUSTOM, small), ("mlp",)))
    assert torch.allclose(stored["mlp"], prediction.directions("mlp"), atol=1e-5)


def test_a_terminal_gets_a_plain_table_of_80_columns(small: Path, environment: dict[str, str]) -> None:
    arguments = ["predict-defects", CUSTOM, "--weights", str(small)]
    shown, said = on_a_terminal(arguments, environment | {"NO_COLOR": "1"})
    assert "\x1b" not in shown
    assert "\x1b" not in said
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in shown
    assert [line.split()[0] for line in lines[3:7]] == ["0", "1", "2", "3"]
    coloured, _ = on_a_terminal(arguments, environment)
    assert "\x1b[" in coloured


def test_the_table_of_the_largest_model_fits_80_columns(small: Path) -> None:
    from dataclasses import replace

    prediction = api.predict_defects(PredictRequest(ModelRequest(CUSTOM, small), STAGES))
    deep = {
        stage: tuple(
            replace(rows[-1], block=index, sigma=rows[-1].sigma * 1e7**index, angle_to_previous=89.96)
            for index in range(OFFICIAL["dinov2_vitg14"].depth)
        )
        for stage, rows in prediction.stages.items()
    }
    file = io.StringIO()
    Console(file=file, width=80, highlight=False).print(prediction_table(replace(prediction, stages=deep)))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in file.getvalue()
    assert [line.split()[0] for line in lines[3:43]] == [str(index) for index in range(40)]
    assert all(len(line.split()) == 13 for line in lines[3:43])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_module_is_never_built(suffix: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = small
    if suffix == ".pth":
        weights = tmp_path / "small.pth"
        torch.save(load_file(small), weights)

    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a module was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    prediction = api.predict_defects(PredictRequest(ModelRequest(CUSTOM, weights), STAGES))
    assert prediction.gaps("mlp")[2] > 5
    backbone: Backbone = api.open_model(ModelRequest(CUSTOM, weights))
    with pytest.raises(UnavailableError, match="a module was built"):
        backbone.build()
