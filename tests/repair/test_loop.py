"""The loop: which images it sees in which order, what it skips, and when it stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_runs import RED, Pictures, Run, same
from torch import Tensor

from sinder_cli.defects.detection import DetectionRule, alignment_logits, defect_mask, learning_targets
from sinder_cli.errors import BadInputError, TryAgainError
from sinder_cli.images.loading import shuffled
from sinder_cli.repairing import loop
from sinder_cli.repairing.loop import Progress, clean_window
from sinder_cli.repairing.settings import RepairSettings


def weights_of(planted: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in planted.module.state_dict().items()}


def test_clean_images_change_nothing_and_end_the_run(single: Any) -> None:
    before = weights_of(single)
    run = Run(single, Pictures(*[single.image(i) for i in range(4)]), stop_clean_fraction=0.75)
    records = run.finish()
    assert len(records) == 6  # 75 % of a window of two passes, 8 images
    assert [record.clean_fraction for record in records] == [(i + 1) / 8 for i in range(6)]
    assert all(record.loss is None and record.block is None and not record.skipped for record in records)
    assert all(torch.equal(before[name], tensor) for name, tensor in single.module.state_dict().items())


def test_defective_images_hold_the_clean_fraction_down_until_max_steps(single: Any) -> None:
    pictures = Pictures(*[single.image(i, red=RED) for i in range(2)])
    records = Run(single, pictures, lr=1e-9, max_steps=7).finish()
    assert [record.step for record in records] == list(range(1, 8))
    assert {record.clean_fraction for record in records} == {0.0}
    assert all(record.block == 1 and record.masked_tokens == 3 and record.defective == 1 for record in records)


def test_steps_draw_defective_tokens_to_the_targets_they_had(single: Any) -> None:
    image = single.image(0, torch.float32, red=RED)

    def grid() -> Tensor:
        return single.module(image[None])[1][:, 1:].unflatten(1, (12, 12))  # after the first defective block

    logits = alignment_logits(grid(), single.directions.nu[1])
    mask = defect_mask(logits, DetectionRule(norm_factor=0, mark="weights"))[0]
    targets = learning_targets(grid()[0], logits[0], mask, 3, 0.1)
    before = (grid()[0][mask] - targets).norm(dim=1).sum()
    Run(single, Pictures(image), lr=0.01, max_steps=5).finish()
    after = (grid()[0][mask] - targets).norm(dim=1).sum()
    assert mask.sum() == 3
    assert after < before * (1 - 1e-4)


def test_two_runs_of_the_same_seed_are_bit_identical(single: Any) -> None:
    pictures = [single.image(i, red=RED if i % 2 else []) for i in range(5)]
    original = weights_of(single)

    def repaired(seed: int) -> tuple[list[float | None], dict[str, Tensor]]:
        single.module.load_state_dict(original)
        records = Run(single, Pictures(*pictures), seed=seed, max_steps=6, stop_clean_fraction=1.0).finish()
        return [record.loss for record in records], weights_of(single)

    (losses, weights), (again, same), (other, _) = repaired(0), repaired(0), repaired(1)
    assert losses == again
    assert losses != other
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_the_clean_fraction_counts_images_not_seen_yet_as_defective() -> None:
    progress = Progress(10)
    progress.recent.extend([True] * 4)
    assert progress.clean_fraction == 0.4
    progress.recent.extend([True] * 6 + [False] * 5)
    assert progress.clean_fraction == 0.5


@pytest.mark.parametrize(("images", "window"), [(1, 2), (4, 8), (499, 998), (500, 1000), (30_000, 1000)])
def test_the_clean_window_is_two_passes_at_most(images: int, window: int) -> None:
    assert clean_window(images, RepairSettings.model_validate({"recipe": "paper"})) == window


def test_a_step_that_is_not_finite_is_skipped_and_counted(single: Any) -> None:
    before = weights_of(single)
    pictures = Pictures(single.image(0, green=[(5, 5)]), single.image(1))
    run = Run(single, pictures, max_steps=4, stop_clean_fraction=1.0)
    records = run.finish()
    assert sorted(record.skipped for record in records) == [False, False, True, True]
    assert all(record.loss is None for record in records)
    assert (run.progress.nonfinite, sum(run.progress.recent)) == (2, 2)  # and the broken image is not clean
    assert run.warnings == [
        f"step {record.step} skipped: its loss or gradient is not finite" for record in records if record.skipped
    ]
    assert all(torch.equal(before[name], tensor) for name, tensor in single.module.state_dict().items())


def test_ten_steps_in_a_row_not_finite_end_the_run(single: Any) -> None:
    run = Run(single, Pictures(single.image(0, green=[(5, 5)])))
    seen = []
    with pytest.raises(BadInputError, match="the repair has diverged: 10 steps in a row") as caught:
        seen.extend(run.steps)
    assert caught.value.exit_code == 65
    assert run.progress.nonfinite == 10


def test_a_finite_step_in_between_starts_the_count_anew(single: Any) -> None:
    pictures = Pictures(single.image(0, green=[(5, 5)]), single.image(1, red=RED))
    run = Run(single, pictures, lr=1e-9, max_steps=24)
    assert len(run.finish()) == 24
    assert run.progress.nonfinite == 12


def test_the_window_of_defective_images_is_one_pass_at_most() -> None:
    assert [clean_window(images, RepairSettings()) for images in (0, 1, 40, 1000)] == [1, 1, 40, 64]


def test_an_image_that_is_not_finite_is_not_clean(single_writer: Any) -> None:
    red, broken = single_writer.image(0, red=RED), single_writer.image(1, green=[(5, 5)])
    run = Run(single_writer, Pictures(red, broken), recipe="sinder", trust=0.01, max_steps=12)
    records = run.finish()
    assert [record.skipped for record in records] == [False, True] * 6
    assert run.progress.nonfinite == 6
    assert run.progress.clean_fraction == 0.0
    assert all(record.loss is None for record in records if record.skipped)


def test_images_that_no_greedy_step_can_help_end_the_run(single_writer: Any) -> None:
    red = [single_writer.image(index, red=RED) for index in range(3)]
    before = weights_of(single_writer)
    run = Run(single_writer, Pictures(*red), recipe="sinder", min_gain=1e6, max_steps=40)
    records = run.finish()
    assert len(records) < 20  # each block at which they stand out is looked at, but no further
    assert all(record.defective == 1 and record.moved is None for record in records)
    assert all(0 < record.gain < 1e6 for record in records)
    assert same(run.weights, before)


@pytest.mark.parametrize("trust", [0.05, 0.3])
def test_a_run_by_polyaks_length_lowers_the_loss(single_writer: Any, trust: float) -> None:
    red = [single_writer.image(0, torch.float32, red=RED)]
    run = Run(single_writer, Pictures(*red), recipe="polyak", trust=trust, max_steps=4)
    records = run.finish()
    assert all(record.length is None or record.length <= trust * (1 + 1e-5) for record in records)
    assert records[0].length == pytest.approx(trust, rel=1e-3)
    losses = [record.loss for record in records if record.loss is not None]
    assert losses == sorted(losses, reverse=True)
    assert run.progress.last_move >= 1


def test_an_unreadable_image_is_named_once(single: Any) -> None:
    pictures = Pictures(single.image(0), None, single.image(2))
    run = Run(single, pictures, max_steps=6, stop_clean_fraction=1.0)
    records = run.finish()
    assert len(records) == 6
    assert records[-1].images == 4
    assert run.progress.unreadable == {"picture 1": "it is broken"}
    assert run.warnings == ["skipped picture 1: it is broken"]


def test_more_than_one_unreadable_in_a_hundred_ends_the_run(single: Any) -> None:
    run = Run(single, Pictures(single.image(0), None, single.image(2), None), max_steps=6)
    with pytest.raises(BadInputError, match=r"2 of 4 cannot be read, among them picture [13]") as caught:
        run.finish()
    assert caught.value.exit_code == 65
    assert run.progress.steps < 4


def test_strict_ends_the_run_at_the_first_unreadable_image(single: Any) -> None:
    run = Run(single, Pictures(*[single.image(i) for i in range(8)], None), strict=True)
    with pytest.raises(BadInputError, match="1 of 9 cannot be read, among them picture 8"):
        run.finish()


def test_images_none_of_which_can_be_decoded_are_bad_input(single: Any) -> None:
    with pytest.raises(BadInputError, match="no image could be decoded: all 1 failed") as caught:
        Run(single, Pictures(None)).finish()
    assert caught.value.exit_code == 65


def test_memory_that_runs_out_in_a_step_is_reported(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    run = Run(single, Pictures(single.image(0, red=RED)), batch_size=2, window=3)
    run.take(1)
    weights = run.weights
    monkeypatch.setattr(loop, "step_gradient", fails)
    with pytest.raises(TryAgainError) as caught:
        run.take(1)
    assert str(caught.value).startswith("out of memory: at 24 × 24 pixels, batch size 2 and a window of 3 blocks; ")
    assert all(option in str(caught.value) for option in ("--resume", "--image-size", "--batch-size", "--window"))
    assert caught.value.exit_code == 75
    assert run.progress.steps == 1
    assert same(run.weights, weights)


@pytest.mark.parametrize("part", ["gathered", "Deltas.descend"])
def test_memory_that_runs_out_leaves_the_step_before(part: str, single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    run = Run(single, Pictures(single.image(0, red=RED)))
    run.take(1)
    monkeypatch.setattr(f"sinder_cli.repairing.loop.{part}", fails)
    with pytest.raises(TryAgainError, match="out of memory: at 24 × 24 pixels"):
        run.take(1)
    assert run.progress.steps == 1


def test_a_batch_runs_over_the_end_of_a_pass(single: Any) -> None:
    pictures = Pictures(*[single.image(i) for i in range(3)])
    records = Run(single, pictures, batch_size=2, max_steps=3, stop_clean_fraction=1.0).finish()
    assert [record.images for record in records] == [2, 4, 6]
    assert pictures.loaded[:6] == [index for index, _ in zip(shuffled(3, 0), range(6), strict=False)]


def test_the_order_depends_on_the_seed_and_the_pass_alone() -> None:
    def passes(seed: int) -> list[list[int]]:
        order = shuffled(20, seed)
        return [[next(order) for _ in range(20)] for _ in range(3)]

    assert passes(0) == passes(0)
    assert passes(0) != passes(1)
    assert all(sorted(one) == list(range(20)) for one in passes(0))
    assert len({tuple(one) for one in passes(0)}) == 3
