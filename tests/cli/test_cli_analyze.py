"""`sinder analyze`: what a notebook with forward hooks would find, and pipes that behave."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sinder_plugins.dinov2.module import VisionTransformer
from torch import Tensor

from sinder_cli import attention_kernel

Sinder = Callable[..., subprocess.CompletedProcess[str]]
CUSTOM = "dinov2_custom"
SIDE = 126  # 9 × 9 patches


def hooked_tokens(weights: Path, photographs: Path) -> list[Tensor]:
    """The output of each block, `[images, 1 + 4 + 81, N]`, as forward hooks on the module see it."""
    from sinder_plugins.dinov2.config import Config

    module = VisionTransformer(Config(128, 3, 512, grid=9, registers=4), 2, attention_kernel("eager"))
    module.load_state_dict(torch.load(weights, weights_only=True))
    seen: list[Tensor] = []
    for block in module.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    arrays = []
    for path in sorted(photographs.iterdir()):
        image = Image.open(path).convert("RGB")
        scale = SIDE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        arrays.append(np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float64) / 255)
    pixels = (np.stack(arrays) - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    with torch.no_grad():
        module(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))
    return seen


def test_the_numbers_are_those_of_forward_hooks_on_the_module(
    sinder: Sinder, with_registers: Path, photographs: Path
) -> None:
    run = sinder("analyze", CUSTOM, "--weights", with_registers, photographs, "--batch-size", "4")
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert (document["images"], document["image_size"], document["skipped"]) == (6, SIDE, {})
    assert "before the final norm" in document["tapped"]
    expected = hooked_tokens(with_registers, photographs)
    assert len(document["blocks"]) == len(expected) == 3
    for row, tokens in zip(document["blocks"], expected, strict=True):
        norms = tokens.norm(dim=-1)
        patches = norms[:, 5:]
        assert row["median_norm"] == pytest.approx(patches.flatten().median().item(), rel=1e-4)
        assert row["p99_norm"] == pytest.approx(np.quantile(patches.numpy(), 0.99), rel=1e-4)
        assert row["max_norm"] == pytest.approx(patches.max().item(), rel=1e-4)
        assert row["cls_norm"] == pytest.approx(norms[:, 0].median().item(), rel=1e-4)
        assert row["register_norm"] == pytest.approx(norms[:, 1:5].flatten().median().item(), rel=1e-4)
        outliers = patches > 3 * patches.median(dim=1, keepdim=True).values
        assert row["outlier_tokens"] == int(outliers.sum())


def test_registers_have_a_column_of_their_own(sinder: Sinder, with_registers: Path, photographs: Path) -> None:
    arguments = ("analyze", CUSTOM, "--weights", with_registers, "--data", photographs / "coffee.png")
    run = sinder(*arguments, "--format", "table")
    assert run.returncode == 0, run.stderr
    assert "register" in run.stdout
    assert "1 image of 126 px" in run.stdout
    assert max(map(len, run.stdout.splitlines()[:6])) <= 80
    assert "\x1b" not in run.stdout + run.stderr
    assert "…" not in run.stdout


def test_find_pipes_paths_in_and_json_comes_out(
    with_registers: Path, photographs: Path, environment: dict[str, str]
) -> None:
    python = shlex.quote(sys.executable)
    line = (
        f"set -o pipefail; find {shlex.quote(str(photographs))} -name '*.png'"
        f" | {python} -m sinder_cli analyze {CUSTOM} --weights {shlex.quote(str(with_registers))}"
        f" --data - --format json"
        f" | {python} -m json.tool"
    )
    run = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, timeout=300, check=True)
    assert json.loads(run.stdout)["images"] == len(list(photographs.glob("*.png"))) == 4


@pytest.mark.parametrize(
    "arguments",
    [["backbones"], ["predict-defects", CUSTOM, "-o", "-"], ["--help"]],
    ids=["a document", "binary", "help"],
)
def test_a_reader_who_has_left_ends_it_quietly(arguments: list[str], small: Path, environment: dict[str, str]) -> None:
    weights = ["--weights", str(small)] if CUSTOM in arguments else []
    command = [sys.executable, "-m", "sinder_cli", *arguments, *weights]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == -13  # of SIGPIPE: 141 in a shell
    assert "Traceback" not in said
    assert "error" not in said
    assert "Exception ignored" not in said


def test_a_shell_sees_141_where_the_reader_has_left(environment: dict[str, str]) -> None:
    sinder = f"{shlex.quote(sys.executable)} -m sinder_cli"
    line = f'{sinder} backbones --format table | (exec <&-; sleep 2); echo "${{PIPESTATUS[0]}}"'
    run = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, timeout=300, check=True)
    assert (run.stdout, run.stderr) == ("141\n", "")


def analysed(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run.stdout)
    return document


def test_a_corrupt_image_is_skipped_named_and_counted(
    sinder: Sinder, with_registers: Path, photographs: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((photographs / "coffee.png").read_bytes()[:40_000])
    run = sinder("analyze", CUSTOM, "--weights", with_registers, photographs / "rocket.jpg", broken)
    assert run.returncode == 0, run.stderr
    document = analysed(run)
    assert document["images"] == 1
    assert list(document["skipped"]) == [str(broken)]
    assert f"sinder: warning: skipped {broken}" in run.stderr
