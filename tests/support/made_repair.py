"""Results as `repair` returns them, made without a model: smooth tokens, and a few that stand out in one direction."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from sinder_cli.defects.detection import norm_ratios
from sinder_cli.repairing.guard import SAMPLES, Evaluation, Snapshot
from sinder_cli.repairing.loop import Best, Progress, StepRecord
from sinder_cli.repairing.scan import BlockOutliers, ImageOutliers, Scan
from sinder_cli.repairing.settings import RepairSettings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEPTH, FIRST, WORST = 4, 1, 2  # blocks; the first with an outlying token; the one with the largest norm


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
        places = torch.randperm((side - 2) ** 2, generator=generator)
        sizes = 150 + 280 * torch.rand(len(places), generator=generator)
        for at, size in zip(places[:count].tolist(), sizes, strict=False):  # fewer are the first of more
            out[image, 1 + at // (side - 2), 1 + at % (side - 2)] += size * direction
    return out


def snapshot_of(clean: Tensor, original: Tensor, count: int, has_cls: bool) -> Snapshot:
    """A model whose defects appear at block 1, are largest at block 2, and are seen after the last, which is block 3.

    `clean` are the tokens of the inpainted original, `original` those of the original.
    """
    last = with_defects(clean, count)
    extra = last - clean
    norms = torch.stack([(clean + share * extra).norm(dim=-1) for share in (0, 0.7, 2, 1)])
    ratios = torch.stack([norm_ratios(each) for each in norms])
    # a cls that outliers pull along a little
    cls, own = (clean + 0.02 * extra).mean((1, 2)), (clean + 0.02 * (original - clean)).mean((1, 2))
    return Snapshot(
        norms=norms,
        ratios=ratios,
        outlying=ratios > 3,
        standing=(ratios > 3).any(dim=0),
        cls=cls if has_cls else None,
        samples=last[:SAMPLES],
        to_inpainted=cosine_similarity(last, clean, dim=-1),
        judged=cosine_similarity(last, clean, dim=-1),
        to_original=cosine_similarity(last, original, dim=-1),
        cls_to_inpainted=cosine_similarity(cls, clean.mean((1, 2)), dim=-1) if has_cls else None,
        cls_to_original=cosine_similarity(cls, own, dim=-1) if has_cls else None,
        ever=(original - clean).abs().amax(dim=-1) > 0,
    )


def scan_of(before: Snapshot, names: Sequence[str]) -> Scan:
    """What the first look found: the guard's own images, defects along ν at block 1 and by norm alone later."""
    marks = before.outlying  # [blocks, K, h, w]
    images = tuple(
        ImageOutliers(
            name,
            index,
            (marks.shape[2], marks.shape[3]),
            True,
            {
                block: tuple(mask.flatten().nonzero()[:, 0].tolist())
                for block, mask in enumerate(marks[:, index])
                if mask.any()
            },
            int(marks[:, index].any(dim=0).sum()),
        )
        for index, name in enumerate(names)
    )
    blocks = []
    for block, mask in enumerate(marks):
        count, along = int(mask.sum()), block == FIRST
        angle = None if not count else 12.0 if along else 71.5
        blocks.append(
            BlockOutliers(
                block=block,
                tokens=count,
                images=int(mask.flatten(1).any(dim=1).sum()),
                marked_by_weights=count if along else 0,
                max_ratio=before.ratios[block].max().item(),
                gap=1.02 if block == 0 else 1e12 if block == DEPTH - 1 else 2.5,
                angle_deg=angle,
                predicted=bool(count) and along,
            )
        )
    return Scan(images, tuple(blocks), marks[0].numel())


def metrics_of(steps: int) -> list[StepRecord]:
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(max(steps, 1), generator=generator).tolist()
    records = []
    for step in range(1, steps + 1):
        clean_fraction = 0.8 * (step / steps) ** 2
        clean = noise[step - 1] < clean_fraction
        loss = None if clean else 3.2 * 0.05 ** (step / steps) * (0.7 + 0.6 * noise[step - 1])
        records.append(
            StepRecord(
                step=step,
                images=step,
                defective=int(not clean),
                block=None if clean else FIRST,
                masked_tokens=0 if clean else 5,
                loss=loss,
                moved=None if clean else "blocks.1.mlp.fc2.weight",
                length=None if clean else 0.3,
                gain=None if clean else 9.5,
                clean_fraction=clean_fraction,
                seconds=0.2 * step,
            )
        )
    return records


def evaluations_of(before: Snapshot, after: Snapshot, steps: int) -> list[Evaluation]:
    """A look every fourth step, on the way from one fidelity to the other."""
    one, two = before.fidelity(), after.fidelity()

    def between(was: float | None, now: float | None, share: float) -> float | None:
        return None if was is None or now is None else was + (now - was) * share

    return [
        Evaluation(
            step=step,
            outlying=round(before.left + (after.left - before.left) * step / steps),
            defective_share=0.5,
            cls=between(one.cls, two.cls, step / steps),
            good=between(one.good, two.good, step / steps) or 0.0,
            good_p01=two.good_p01,
            marked=between(one.marked, two.marked, step / steps),
            holds=True,
            spoilt=False,
            best=True,
        )
        for step in range(4, steps + 1, 4)
    ]


def progress_of(steps: int, stopped_by: str, after: Snapshot, kept: bool, settings: RepairSettings) -> Progress:
    """A loop that has ended as `stopped_by` says."""
    progress = Progress(window=10)
    ends_clean = stopped_by in ("no_gain", "clean")
    progress.recent.extend([True] * 10 if ends_clean else [True] * 7 + [False] * 3)
    progress.steps = progress.images = steps
    progress.stopped = stopped_by if stopped_by in ("fidelity", "no_improvement") else ""
    if kept:
        fidelity = after.fidelity()
        progress.best = Best(steps, after.left, fidelity.cls, fidelity.good, fidelity.marked, {})
    assert ends_clean or progress.clean_fraction < settings.stop_clean_fraction
    return progress


def write_lines(path: Path, records: Sequence[StepRecord | Evaluation]) -> None:
    path.write_text("".join(f"{json.dumps(asdict(record))}\n" for record in records), encoding="utf-8")


OUTCOMES: dict[str, dict[str, Any]] = {
    "healthy": {"before": 0, "changed": 0, "steps": 0, "stopped_by": "healthy"},
    "repaired": {"before": 4, "after": 0},
    "improved": {"before": 4, "after": 2, "stopped_by": "max_steps"},
    "not improved": {"before": 4, "changed": 0, "stopped_by": "fidelity"},
}
