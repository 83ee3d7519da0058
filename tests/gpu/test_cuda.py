"""What must hold on a CUDA device; skipped where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sinder_cli import ModelRequest, UnavailableError, api, attention_kernel
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.backbone.opening import load_module
from sinder_cli.defects.prediction import predict
from sinder_cli.repairing.deltas import Deltas, singular_basis
from sinder_cli.repairing.forward import Directions
from sinder_cli.repairing.loop import StepRecord
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.repairing.step import StepGradient, step_gradient
from sinder_cli.requests import AnalyzeRequest, Process, RepairRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def losses(out: Path, **settings: object) -> list[float | None]:
    """The losses of eight repair steps of the demo backbone."""
    records: list[StepRecord] = []
    chosen = RepairSettings.model_validate({"max_steps": 8, "eval_images": 4} | settings)
    listen = lambda event: records.append(event) if isinstance(event, StepRecord) else None  # noqa: E731
    api.repair(RepairRequest(ModelRequest("demo_vit"), (), chosen), out, process=Process(emit=listen))
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


def test_float16_follows_float32_and_skips_no_step(tmp_path: Path) -> None:
    wide = losses(tmp_path / "wide", device="cuda")
    narrow = losses(tmp_path / "narrow", device="cuda", dtype="float16")
    assert None not in narrow  # a skipped step has no loss
    assert narrow == pytest.approx(wide, rel=0.1)


def test_tf32_follows_float32(tmp_path: Path) -> None:
    exact = losses(tmp_path / "exact", device="cuda")
    assert losses(tmp_path / "tf32", device="cuda", tf32=True) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_batch_gives_the_mean_of_its_images_gradients(dtype: str) -> None:
    backbone = api.open_model(ModelRequest("demo_vit"))
    module = load_module(backbone, "cuda")
    prediction = predict(backbone, device="cuda")
    directions = Directions(prediction.directions().cuda(), prediction.gaps())
    preprocess = api.preprocessing(backbone, None)
    source = api.drawn_images(backbone, seed=0)
    images = torch.stack([preprocess(source.load(index)) for index in range(4)]).cuda()
    settings = RepairSettings.model_validate({"dtype": dtype})

    def gradient(chosen: Tensor) -> StepGradient:
        return step_gradient(Deltas(backbone, module), directions, chosen, settings)

    together, alone = gradient(images), [gradient(image[None]) for image in images]
    count = sum(len(each.losses) for each in alone)
    assert count > 1
    assert len(together.losses) == count
    for name, found in together.gradients.items():
        zero = torch.zeros_like(found)
        mean = sum((each.gradients.get(name, zero) for each in alone), zero) / count
        assert cosine_similarity(found, mean, dim=0) > (0.999 if dtype == "float32" else 0.95)


@pytest.mark.parametrize("shape", [(384, 384), (1536, 384), (384, 1536)])
@pytest.mark.parametrize("dead", [False, True], ids=["", "with a dead unit"])
def test_bases_on_the_gpu_make_the_same_weights_as_those_of_the_cpu(shape: tuple[int, int], dead: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * shape[1] ** -0.5
    if dead:
        weight[3], weight[:, 5] = 0, 0
    cpu, cuda = singular_basis(weight), singular_basis(weight.cuda())
    assert float((cuda.S - cpu.S).abs().max()) < 1e-13 * float(cpu.S[0])
    assert cuda.rank == cpu.rank
    delta = torch.linspace(1, -1, len(cpu.S))
    delta[cpu.rank :] = 0
    change = cpu.change(delta)
    assert float((cuda.change(delta.cuda()).cpu() - change).norm() / change.norm()) < 1e-5


def test_predictions_on_the_gpu_are_those_on_the_cpu() -> None:
    backbone = api.open_model(ModelRequest("demo_vit"))
    cpu, cuda = predict(backbone), predict(backbone, device="cuda")
    assert cuda.gaps() == pytest.approx(cpu.gaps(), rel=1e-3)
    cosines = (cuda.directions().cpu()[5:] * cpu.directions()[5:]).sum(dim=1)
    assert cosines.min() > 1 - 1e-5


def test_an_analysis_on_the_gpu_is_that_on_the_cpu() -> None:
    cpu, cuda = (
        api.analyze(AnalyzeRequest(ModelRequest("demo_vit"), (), AnalyzeSettings(device=name)))
        for name in ("cpu", "cuda")
    )
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
