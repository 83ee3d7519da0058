"""Results as `repair` returns them, by keyword, and one of each verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_repair import (
    MEAN,
    OUTCOMES,
    STD,
    evaluations_of,
    metrics_of,
    progress_of,
    scan_of,
    smooth,
    snapshot_of,
    tokens_of,
    with_defects,
    write_lines,
)

from sinder_cli.defects.shift import Retrieval
from sinder_cli.repairing.choosing import Chosen
from sinder_cli.repairing.guard import SAMPLES
from sinder_cli.repairing.results import Outcome, RepairResult, run_summary
from sinder_cli.repairing.settings import RepairSettings

MakeResult = Callable[..., RepairResult]


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
        stopped_by: str = "clean",
        names: list[str] | None = None,
        model: str = "demo_vit",
        patch: int = 14,
        data: Sequence[str] = (),
        given: int = 0,
        also_trained: int = 0,
        elsewhere: int = 0,  # defects of the images that are looked at first, where the guard has none
        **settings: Any,
    ) -> RepairResult:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        chosen = RepairSettings(image_size=side * patch, **settings)
        clean = tokens_of(images, side, width)
        original = with_defects(clean, before)
        first, last = (snapshot_of(clean, original, count, has_cls) for count in (before, after if changed else before))
        write_lines(folder / "metrics.jsonl", metrics_of(steps))
        (folder / "evaluations.jsonl").unlink(missing_ok=True)
        if steps >= 4:
            write_lines(folder / "evaluations.jsonl", evaluations_of(first, last, steps))
        generator = torch.Generator().manual_seed(4)
        pixels = (0.5 + 0.2 * smooth(generator, images, 3, side=side * patch)).clamp(0, 1)
        normalized = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        shown = names or [f"image-{index}.jpg" for index in range(images)]
        config = {
            "model": model,
            "call": {"model": model, "weights": None, "adapter": None, "data": list(data)},
            "weights": {"source": "dinov2_vitg14_pretrain.pth", "fingerprint": "5e" * 32},
            "images": {"count": 64, "given": given, "fingerprint": "a7" * 32},
            "settings": chosen.model_dump(),
            "device": "cpu",
            "versions": {"sinder": "0.1.0", "torch": "2.10.0", "python": "3.11.2"},
        }
        start = SimpleNamespace(backbone=SimpleNamespace(name=model), settings=chosen)
        deltas = SimpleNamespace(changed=[SimpleNamespace(delta=torch.ones(192))] * changed)
        progress = progress_of(steps, stopped_by, last, bool(changed), chosen)
        found = scan_of(first if before else snapshot_of(clean, original, elsewhere, has_cls), shown)
        again = (Retrieval(0.125, 0.5), Retrieval(0.5 if changed else 0.125, 0.5))
        prepared: Any = SimpleNamespace(start=start, deltas=deltas)
        judged = Chosen((), (), also_trained, 0, ())
        summary = run_summary(prepared, found, judged, progress, Outcome(first, last, None, again), config)
        summary["seconds"] = 66.2
        return RepairResult(
            folder, model, summary, config, first, last, list(normalized[:SAMPLES]), shown[:SAMPLES], MEAN, STD
        )

    return make


@pytest.fixture(params=OUTCOMES)
def outcome(request: pytest.FixtureRequest, make_result: MakeResult) -> RepairResult:
    """A result of each verdict."""
    result = make_result(**OUTCOMES[request.param])
    assert result.summary["verdict"] == request.param
    return result
