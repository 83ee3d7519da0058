"""The look at held-out images, against loops over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runs import RED

from sinder_cli.repair.evaluation import Evaluation, evaluate, take_snapshot
from sinder_cli.repair.settings import RepairSettings

GRID = 12  # patches along a side of the tiny model
BLUE = [(2, 2), (4, 6), (7, 7), (9, 9)]
SETTINGS = RepairSettings(batch_size=2)


def look(planted: Any, before_module: Any, images: list[torch.Tensor], **settings: Any) -> Evaluation:
    chosen = RepairSettings.model_validate({"batch_size": 2} | settings)
    before = take_snapshot(planted.backbone, before_module, images, 2, "cpu", lambda _: None, "looking")
    return evaluate(7, planted.backbone, planted.module, planted.directions, images, before, chosen, "cpu")


def by_loops(planted: Any, images: list[torch.Tensor], threshold: float) -> tuple[int, int]:
    """Marked tokens of the first defective block of each image, and defective images, token by token."""
    marked = defective = 0
    for image in images:
        for block, tokens in enumerate(planted.module(image[None])):
            if planted.directions.gaps[block] < 1.1:
                continue
            patches = tokens[0, 1:].float()
            nu = planted.directions.nu[block]
            logits = [-abs(float(patch @ nu)) / float(patch.norm()) for patch in patches]
            mean = sum(logits) / len(logits)
            std = (sum((x - mean) ** 2 for x in logits) / (len(logits) - 1)) ** 0.5
            inside = [0 < at // GRID < GRID - 1 and 0 < at % GRID < GRID - 1 for at in range(len(logits))]
            found = sum(x < mean - threshold * std and here for x, here in zip(logits, inside, strict=True))
            if found >= 3:
                marked += found
                defective += 1
                break
    return marked, defective


@torch.no_grad()
def test_shares_are_those_of_the_first_defective_block_of_each_image(single: Any) -> None:
    float32 = torch.float32
    images = [
        single.image(0, float32, red=RED),
        single.image(1, float32),
        single.image(2, float32, blue=BLUE),
        single.image(3, float32, red=RED, blue=BLUE),  # the early block is the first
        single.image(4, float32, red=RED[:2]),
    ]
    found = look(single, single.module, images)
    marked, defective = by_loops(single, images, 4.0)
    assert (marked, defective) == (len(RED) + len(BLUE) + len(RED), 3)
    assert found == Evaluation(7, marked / (5 * GRID**2), defective / 5, found.cls_cosine)
    assert found.cls_cosine == pytest.approx(1)


@torch.no_grad()
def test_the_cosine_is_to_the_original_image_by_image(single: Any) -> None:
    from copy import deepcopy

    images = [single.image(index, torch.float32) for index in range(3)]
    original = deepcopy(single.module)
    for block in single.module.blocks:
        block.down.weight.mul_(1.5)
    found = look(single, original, images)
    pairs = [(original(image[None])[-1][0, 0], single.module(image[None])[-1][0, 0]) for image in images]
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
    assert found.cls_cosine == pytest.approx(sum(cosines) / 3, abs=1e-6)
    assert found.cls_cosine < 0.9999


def test_a_block_without_a_determined_direction_marks_nothing(single: Any) -> None:
    images = [single.image(0, torch.float32, red=RED)]
    assert look(single, single.module, images, min_gap=3.0).masked_share == 0
    assert look(single, single.module, images, min_gap=2.0).masked_share == len(RED) / GRID**2
