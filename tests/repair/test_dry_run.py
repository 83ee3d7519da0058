"""`sinder repair --dry-run`: what a repair would train, and that nothing changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_runs import RED, SIZE, Pictures

from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.repairing import dry_run as module
from sinder_cli.repairing.dry_run import DryRun, DryStep, dry_run
from sinder_cli.repairing.forward import Directions
from sinder_cli.repairing.preparing import Start, prepare
from sinder_cli.repairing.settings import RepairSettings

N, HIDDEN, DEPTH = 32, 24, 6  # of the tiny model
VALUES = N + N + 3 * HIDDEN  # singular values of a gated block: value, output, gate, up, down


def tried(planted: Any, monkeypatch: pytest.MonkeyPatch, gaps: list[float], **settings: Any) -> DryRun:
    """A dry run in which the directions are the planted ones."""

    def with_directions(*arguments: Any, **named: Any) -> Any:
        repair = prepare(*arguments, **named)
        modules.append(repair.module)
        return replace(repair, directions=Directions(planted.directions.nu, gaps))

    modules: list[Any] = []
    monkeypatch.setattr(module, "prepare", with_directions)
    pictures = Pictures(*[planted.image(index, torch.float32, red=RED) for index in range(4)])
    preprocess = Preprocessing(SIZE, planted.backbone.mean, planted.backbone.std)
    chosen = RepairSettings.model_validate(
        {"recipe": "paper", "min_gap": 1.1, "eval_images": 2, "workers": 0, "max_steps": 50} | settings
    )
    start = Start(planted.backbone, preprocess, pictures, chosen, "cpu", {}, len(pictures))
    before = {name: tensor.clone() for name, tensor in planted.module.state_dict().items()}
    found = dry_run(start, lambda _: None)
    assert all(torch.equal(before[name], tensor) for name, tensor in modules[0].state_dict().items())
    return found


def test_it_counts_what_a_step_may_change(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(single, monkeypatch, [1.0, 2.0, 1.0, 1.0, 2.0, 1.0], window=2)
    assert found.blocks == (0, 1, 3, 4)
    assert (found.weights, found.values) == (4 * 5, 4 * VALUES)
    assert (found.training_images, found.evaluation_images, found.max_steps) == (2, 2, 50)


def test_the_first_step_and_the_longest_are_tried(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(single, monkeypatch, [1.0, 2.0, 2.0, 2.0, 2.0, 1.0], window=10, batch_size=2)
    assert (found.first.defective, found.first.block) == (2, 1)
    assert (found.longest.defective, found.longest.block) == (2, 4)
    assert found.blocks == (0, 1, 2, 3, 4)
    assert found.longest.seconds > 0


def test_memory_grows_by_the_blocks_the_dry_run_has_not_touched(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(single, monkeypatch, [2.0] * DEPTH, window=1)
    touched = 2  # the first block, where red is defective, and the last
    weight, narrow = N * N + 2 * N * N, HIDDEN * N + HIDDEN * (HIDDEN + N)
    assert found.all_bytes - found.step_bytes == (DEPTH - touched) * 4 * (2 * weight + 3 * narrow)


def test_where_no_direction_is_determined_nothing_would_be_trained(
    single: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tried(single, monkeypatch, [1.0] * DEPTH)
    assert (found.blocks, found.weights, found.values) == ((), 0, 0)
    assert found.first == DryStep(found.first.seconds, 0, None)


def test_held_out_images_are_not_trained_on(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(single, monkeypatch, [2.0] * DEPTH, eval_images=1)
    assert (found.training_images, found.evaluation_images) == (3, 1)
    found = tried(single, monkeypatch, [2.0] * DEPTH, eval_images=None)  # never more than half
    assert (found.training_images, found.evaluation_images) == (2, 2)
