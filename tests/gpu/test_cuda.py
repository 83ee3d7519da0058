"""What must hold on a CUDA device; skipped where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sinder_cli import ModelRequest, UnavailableError, api, attention_kernel
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.repair.loop import StepRecord
from sinder_cli.repair.settings import RepairSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def losses(out: Path, **settings: object) -> list[float | None]:
    """The losses of eight repair steps of the demo backbone."""
    records: list[StepRecord] = []
    chosen = RepairSettings.model_validate({"max_steps": 8, "eval_images": 4} | settings)
    listen = lambda event: records.append(event) if isinstance(event, StepRecord) else None  # noqa: E731
    api.repair(ModelRequest("demo_vit"), (), out, chosen, listen)
    return [record.loss for record in records]


def test_the_losses_on_the_gpu_are_those_on_the_cpu(tmp_path: Path) -> None:
    cpu, cuda = losses(tmp_path / "cpu", device="cpu"), losses(tmp_path / "cuda", device="cuda")
    assert cuda == pytest.approx(cpu, rel=1e-3)


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    wide, narrow = (
        losses(tmp_path / "wide", device="cuda"),
        losses(tmp_path / "narrow", device="cuda", dtype="bfloat16"),
    )
    assert narrow == pytest.approx(wide, rel=0.1)


def test_predictions_on_the_gpu_are_those_on_the_cpu() -> None:
    from sinder_cli.defects.prediction import predict

    backbone = api.open_model(ModelRequest("demo_vit"))
    cpu, cuda = predict(backbone), predict(backbone, device="cuda")
    assert cuda.gaps() == pytest.approx(cpu.gaps(), rel=1e-3)
    cosines = (cuda.directions().cpu()[5:] * cpu.directions()[5:]).sum(dim=1)
    assert cosines.min() > 1 - 1e-5


def test_an_analysis_on_the_gpu_is_that_on_the_cpu() -> None:
    cpu, cuda = (api.analyze(ModelRequest("demo_vit"), (), AnalyzeSettings(device=name)) for name in ("cpu", "cuda"))
    assert cuda.analysis.verdict.kind == cpu.analysis.verdict.kind == "defects"
    for a, b in zip(cuda.analysis.blocks, cpu.analysis.blocks, strict=True):
        assert a.marked == b.marked
        assert a.patch_norm is not None
        assert b.patch_norm is not None
        assert a.patch_norm.median == pytest.approx(b.patch_norm.median, rel=2e-3)
        if a.observed is None or b.observed is None:
            assert a.observed is b.observed
        else:
            angles = (side.angle_to_predicted_deg["cumulative"] for side in (a.observed, b.observed))
            assert next(angles) == pytest.approx(next(angles), abs=0.1)


@pytest.mark.slow
def test_the_demo_is_repaired_on_the_gpu(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sinder_cli",
        "repair",
        "demo_vit",
        "--device",
        "cuda",
        "--out",
        str(tmp_path / "run"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["defects"]["before"]["tokens"] > 0
    assert summary["defects"]["after"]["tokens"] == 0


def test_xformers_attention_equals_sdpa_where_it_runs() -> None:
    try:
        kernel = attention_kernel("xformers")
    except UnavailableError as error:
        pytest.skip(str(error))
    q, k, v = (torch.randn(2, 4, 65, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    torch.testing.assert_close(kernel(q, k, v), attention_kernel("sdpa")(q, k, v), atol=2e-3, rtol=2e-3)
