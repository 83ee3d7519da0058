"""Results as `repair` returns them, made without a model: smooth tokens, and a few that stand out in one direction."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sinder_cli.repair.evaluation import SAMPLES, Snapshot, cls_cosine
from sinder_cli.repair.loop import StepRecord
from sinder_cli.repair.results import RepairResult
from sinder_cli.repair.settings import RepairSettings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MakeResult = Callable[..., RepairResult]


def smooth(generator: torch.Generator, *shape: int, side: int) -> Tensor:
    """Random fields `[*shape, side, side]` that vary slowly."""
    coarse = torch.randn(1, math.prod(shape), 5, 5, generator=generator)
    return interpolate(coarse, (side, side), mode="bicubic").view(*shape, side, side)


def tokens_of(images: int, side: int, width: int) -> Tensor:
    """Patch tokens `[images, side, side, width]` with a norm near 21."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.einsum(
        "kchw,cn->khwn", smooth(generator, images, 6, side=side), torch.randn(6, width, generator=generator)
    )
    mixed = mixed + 0.6 * torch.randn(mixed.shape, generator=generator)
    sizes = 21 * (1 + 0.25 * smooth(generator, images, side=side).clamp(-2, 2))  # [images, side, side]
    return sizes[..., None] * mixed / mixed.norm(dim=-1, keepdim=True)


def with_defects(tokens: Tensor, count: int) -> Tensor:
    """The same tokens, of which `count` of each image got a large and almost fixed one added."""
    generator = torch.Generator().manual_seed(2)
    images, side, _, width = tokens.shape
    direction = torch.randn(width, generator=generator)
    direction /= direction.norm()
    out = tokens.clone()
    for image in range(images):
        for at in torch.randperm((side - 2) ** 2, generator=generator)[:count].tolist():
            size = 150 + 280 * torch.rand((), generator=generator)
            out[image, 1 + at // (side - 2), 1 + at % (side - 2)] += size * direction
    return out


def snapshot_of(tokens: Tensor, has_cls: bool) -> Snapshot:
    return Snapshot(tokens.norm(dim=-1), tokens.mean((1, 2)) if has_cls else None, tokens[:SAMPLES])


def metrics_of(steps: int) -> list[StepRecord]:
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(max(steps, 1), generator=generator).tolist()
    records = []
    for step in range(1, steps + 1):
        density = 0.8 * (step / steps) ** 2
        clean = noise[step - 1] < density
        loss = None if clean else 3.2 * 0.05 ** (step / steps) * (0.7 + 0.6 * noise[step - 1])
        records.append(
            StepRecord(step, step, int(not clean), None if clean else 6, 0 if clean else 5, loss, density, 0.2 * step)
        )
    return records


@pytest.fixture
def make_result(tmp_path: Path) -> MakeResult:
    def make(
        images: int = 2,
        side: int = 8,
        width: int = 12,
        steps: int = 12,
        has_cls: bool = True,
        before: int = 4,
        after: int = 0,
        changed: int = 30,
        stopped_by: str = "density",
        names: list[str] | None = None,
        model: str = "demo_vit",
        patch: int = 14,
        data: Sequence[str] = (),
    ) -> RepairResult:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        lines = [json.dumps(asdict(record)) for record in metrics_of(steps)]
        (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        clean = tokens_of(images, side, width)
        first, last = (snapshot_of(with_defects(clean, count), has_cls) for count in (before, after))
        generator = torch.Generator().manual_seed(4)
        pixels = (0.5 + 0.2 * smooth(generator, images, 3, side=side * patch)).clamp(0, 1)
        normalized = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        summary = {
            "model": model,
            "defects": {"before": first.defects(), "after": last.defects()},
            "cls_cosine": cls_cosine(first, last),
            "tapped": "residual stream after the last block, before the final norm",
            "evaluation_images": images,
            "held_out": False,
            "steps": steps,
            "images": steps,
            "skipped_images": 0,
            "skipped_steps": 0,
            "changed_weights": changed,
            "trained_values": changed * 192,
            "clean_share": 0.8,
            "stopped_by": stopped_by,
            "seconds": 66.2,
        }
        config = {
            "model": model,
            "call": {"model": model, "weights": None, "adapter": None, "data": data},
            "weights": {"source": "dinov2_vitg14_pretrain.pth", "fingerprint": "5e" * 32},
            "images": {"count": 64, "fingerprint": "a7" * 32},
            "settings": RepairSettings(image_size=side * patch).model_dump(),
            "device": "cpu",
            "versions": {"sinder": "0.1.0", "torch": "2.10.0", "python": "3.11.2"},
        }
        shown = names or [f"image-{index}.jpg" for index in range(images)]
        return RepairResult(
            folder, model, summary, config, first, last, list(normalized[:SAMPLES]), shown[:SAMPLES], MEAN, STD
        )

    return make
