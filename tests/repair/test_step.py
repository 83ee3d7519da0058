"""The projected gradient against autograd through W₀ + U diag(ε) Vᵀ in a whole, differentiable forward pass."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from threaded_ranks import side_by_side
from torch import Tensor

from sinder_cli.backbone.contract import trained_references
from sinder_cli.defects.detection import DetectionRule, alignment_logits, unsettled
from sinder_cli.distributed import Ranks
from sinder_cli.repairing import forward, step
from sinder_cli.repairing.deltas import Deltas, Target
from sinder_cli.repairing.forward import FIRST_ALONE, BlockDefects, Directions, ForwardPass, Interest
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.repairing.shared import SharedStep, gathered
from sinder_cli.repairing.step import BlockGradient, Probes, StepGradient, step_gradient

RED = [(3, 3), (5, 8), (9, 4)]
BLUE = [(2, 6), (6, 2), (8, 8), (8, 9)]
EARLY, LATE, DEPTH = 1, 4, 6
PAPER: dict[str, Any] = {"recipe": "paper", "min_gap": 1.1}
RULE = DetectionRule(norm_factor=0, mark="weights")


def gradient_of(planted: Any, images: list[Tensor], decomposed: bool = True, **settings: Any) -> StepGradient:
    """One step; at the first that reaches a block, which decomposes it, nothing that was recorded is used."""
    deltas = Deltas(planted.backbone, planted.module)
    for block in range(DEPTH) if decomposed else ():
        deltas.of_block(block)
    chosen = RepairSettings.model_validate(PAPER | settings)
    return step_gradient(deltas, planted.directions, torch.stack(images), chosen)


def passing(planted: Any, images: Tensor) -> ForwardPass:
    """A pass with windows of two blocks."""
    return ForwardPass.entering(planted.backbone, planted.module, planted.directions, images, RULE, 2)


def first_defects(through: ForwardPass) -> Iterator[BlockDefects]:
    """The defects of a pass that each image leaves at its first."""
    while (found := through.next_defects()) is not None:
        asked = through.wanted(found, [FIRST_ALONE] * int(found.defective.sum()))
        assert asked is not None
        yield asked


def looped_loss(grid: Tensor, nu: Tensor, marked: list[tuple[int, int]], tau: float = 0.1) -> Tensor:
    """The loss of one image, kernel 3, written token by token; differentiable in the marked tokens."""
    gaussian = [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    fixed = grid.detach()
    height, width, _ = grid.shape
    distances = []
    for row, column in marked:
        weights, target = 0.0, torch.zeros_like(nu)
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                token = fixed[row + i, column + j]
                logit = -abs(float(token @ nu) / float(token.norm()))
                weight = math.exp(logit / tau) * gaussian[i + 1][j + 1]
                weights += weight
                target = target + weight * token
        distances.append((grid[row, column] - target / weights).norm())
    norms = [float(fixed[r, c].norm()) for r in range(1, height - 1) for c in range(1, width - 1)]
    return torch.stack(distances).mean() / (sum(norms) / len(norms))


def autograd_gradients(
    planted: Any, image: Tensor, block: int, marked: list[tuple[int, int]]
) -> tuple[float, dict[str, Tensor]]:
    """∂L/∂ε of every target of every block up to `block`, and the loss, through the parametrized model."""
    stored = dict(planted.module.state_dict())
    epsilons: dict[str, Tensor] = {}
    changes: dict[str, list[tuple[Any, Tensor]]] = {}
    for index in range(block + 1):
        for role, ref in trained_references(planted.backbone.layers.blocks[index]).items():
            start, stop = ref.rows or (0, len(stored[ref.name]))
            U, _, Vt = torch.linalg.svd(stored[ref.name][start:stop], full_matrices=False)
            epsilon = torch.zeros(len(Vt), dtype=U.dtype, requires_grad=True)
            epsilons[f"blocks.{index}.{role}"] = epsilon
            changes.setdefault(ref.name, []).append(((start, stop), U @ torch.diag(epsilon) @ Vt))
    for name, parts in changes.items():
        whole = torch.zeros_like(stored[name])
        for (start, stop), change in parts:
            padding = (0, 0, start, len(whole) - stop)
            whole = whole + torch.nn.functional.pad(change, padding)
        stored[name] = stored[name] + whole
    stream = torch.func.functional_call(planted.module, stored, (image[None],))
    grid = stream[block][0, 1:].unflatten(0, (12, 12))
    loss = looped_loss(grid, planted.directions.nu[block].double(), marked)
    return loss.item(), dict(zip(epsilons, torch.autograd.grad(loss, list(epsilons.values())), strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, name


@pytest.mark.parametrize(
    ("colour", "block", "spots"), [("red", EARLY, RED), ("blue", LATE, BLUE)], ids=["early", "late"]
)
def test_the_projected_gradient_is_autograds_through_the_parametrized_weights(
    planted: Any, colour: str, block: int, spots: list[tuple[int, int]]
) -> None:
    image = planted.image(0, **{colour: spots})
    loss, expected = autograd_gradients(planted, image, block, spots)
    found = gradient_of(planted, [image])
    assert (found.first_block, found.masked_tokens, len(found.losses)) == (block, len(spots), 1)
    assert found.losses[0] == pytest.approx(loss, rel=1e-5)
    assert_same(found.gradients, expected)


def test_only_the_blocks_of_the_window_get_gradients(planted: Any) -> None:
    image = planted.image(0, blue=BLUE)
    _, everywhere = autograd_gradients(planted, image, LATE, BLUE)
    window = {name: gradient for name, gradient in everywhere.items() if int(name.split(".")[1]) in (LATE - 1, LATE)}
    assert_same(gradient_of(planted, [image], window=2).gradients, window)


def test_images_with_defects_at_different_blocks_share_a_step(planted: Any) -> None:
    images = [
        planted.image(0, blue=BLUE),
        planted.image(1),  # clean
        planted.image(2, red=RED),
        planted.image(3, blue=BLUE[1:]),
    ]
    together = gradient_of(planted, images, window=4)  # blocks 0 and 1, and blocks 1 to 4
    alone = [gradient_of(planted, [image], window=4) for image in images]
    assert [single.first_block for single in alone] == [LATE, None, EARLY, LATE]
    assert together.first_block == EARLY
    assert together.masked_tokens == sum(single.masked_tokens for single in alone)
    assert sorted(together.losses) == pytest.approx(sorted(loss for single in alone for loss in single.losses))
    names = {name for single in alone for name in single.gradients}
    mean = {name: sum(single.gradients.get(name, torch.zeros(1)) for single in alone) / 3 for name in names}
    assert_same(together.gradients, mean)


def test_images_that_share_a_window_keep_their_own_gradients(planted: Any) -> None:
    images = [*(planted.image(seed, red=RED) for seed in (0, 2, 3)), planted.image(1, blue=BLUE)]
    together = gradient_of(planted, images)
    alone = [gradient_of(planted, [image]) for image in images]
    assert together.losses == pytest.approx([single.losses[0] for single in alone])
    assert together.masked_tokens == 3 * len(RED) + len(BLUE)
    names = {name for single in alone for name in single.gradients}
    mean = {name: sum(single.gradients.get(name, torch.zeros(1)) for single in alone) / 4 for name in names}
    assert_same(together.gradients, mean)


def test_a_marked_token_of_a_clean_image_does_not_count(planted: Any) -> None:
    images = [planted.image(0, red=RED), planted.image(2, red=RED), planted.image(3, red=RED[:1])]
    assert gradient_of(planted, images).masked_tokens == 2 * len(RED)


def watched(planted: Any, images: list[Tensor], window: int) -> tuple[list[tuple[int, int]], int]:
    """(block, images) of each call of a block in one step, and the most graphs that were alive after one."""
    calls: list[tuple[int, int]] = []
    left: list[weakref.ref[Tensor]] = []
    alive = []

    def run_block(module: Any, index: int, tokens: Tensor, context: Any) -> Tensor:
        leaving: Tensor = planted.backbone.run_block(module, index, tokens, context)
        calls.append((index, len(tokens)))
        if leaving.requires_grad:
            left.append(weakref.ref(leaving))
        alive.append(sum(each() is not None for each in left))
        return leaving

    gradient_of(replace(planted, backbone=replace(planted.backbone, run_block=run_block)), images, window=window)
    return calls, max(alive)


def test_images_share_the_forward_pass(planted: Any) -> None:
    red, blue, clean = planted.image(0, red=RED), planted.image(1, blue=BLUE), planted.image(2)
    assert watched(planted, [red, red], 2)[0] == [(0, 2), (1, 2)]
    assert watched(planted, [red, red, clean], 2)[0] == [(0, 3), (1, 3), (2, 1), (3, 1), (4, 1), (5, 1)]
    one_again = [(4, 1), (3, 1)]
    assert watched(planted, [blue, clean, clean], 2)[0] == [*((i, 3) for i in range(5)), *one_again, (5, 2)]


def test_passed_blocks_are_run_again_without_those_that_left(planted: Any) -> None:
    images = [planted.image(0, red=RED), *(planted.image(seed, blue=BLUE) for seed in (1, 2))]
    early, late = [(0, 3), (1, 3), (1, 1), (0, 1)], [(2, 2), (3, 2), (4, 2), (1, 2)]
    assert watched(planted, images, 4)[0] == early + late


@pytest.mark.parametrize("window", [1, 3])
def test_no_more_graphs_are_kept_than_the_window_has_blocks(planted: Any, window: int) -> None:
    assert watched(planted, [planted.image(1)], window)[1] == window
    assert watched(planted, [planted.image(0, blue=BLUE)], window)[1] == window


def test_a_step_that_decomposes_blocks_gives_the_same_gradients(planted: Any) -> None:
    images = [*(planted.image(seed, red=RED) for seed in (0, 2, 3)), planted.image(1, blue=BLUE)]
    later, first = (gradient_of(planted, images, decomposed=decomposed) for decomposed in (True, False))
    assert first.losses == later.losses
    assert_same(first.gradients, later.gradients)


def test_no_graph_is_kept_while_a_block_is_decomposed(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[weakref.ref[Tensor]] = []

    def run_block(module: Any, index: int, tokens: Tensor, context: Any) -> Tensor:
        leaving: Tensor = planted.backbone.run_block(module, index, tokens, context)
        left.append(weakref.ref(leaving))
        return leaving

    def of_block(self: Deltas, index: int) -> list[Target]:
        assert not any(each() is not None for each in left)
        return decompose(self, index)

    decompose = Deltas.of_block
    monkeypatch.setattr(Deltas, "of_block", of_block)
    watching = replace(planted, backbone=replace(planted.backbone, run_block=run_block))
    assert gradient_of(watching, [planted.image(0, blue=BLUE)], decomposed=False).gradients


def test_blocks_before_every_window_are_not_recorded(planted: Any) -> None:
    late = replace(planted, directions=Directions(planted.directions.nu, [1.0] * LATE + [2.0, 2.0]))
    assert gradient_of(late, [planted.image(0, blue=BLUE)]).first_block == LATE
    assert watched(late, [planted.image(1)], 2)[1] == 2
    recorded = []

    def run_block(module: Any, index: int, tokens: Tensor, context: Any) -> Tensor:
        recorded.append(torch.is_grad_enabled())
        return planted.backbone.run_block(module, index, tokens, context)

    gradient_of(replace(late, backbone=replace(planted.backbone, run_block=run_block)), [planted.image(1)], window=2)
    assert recorded == [False] * 3 + [True] * 3


def test_an_image_leaves_with_the_input_of_its_own_window(planted: Any) -> None:
    images = torch.stack([planted.image(2, red=RED), planted.image(0, blue=BLUE)])
    early, late = first_defects(passing(planted, images))
    stream = planted.module(images)
    assert [[passed.block for passed in found.window] for found in (early, late)] == [
        [EARLY - 1, EARLY],
        [LATE - 1, LATE],
    ]
    torch.testing.assert_close(early.window[0].entering, planted.module.embed(images)[:1])
    torch.testing.assert_close(late.window[0].entering, stream[LATE - 2][1:])
    assert late.masks[0].nonzero().tolist() == [list(spot) for spot in BLUE]


@pytest.mark.parametrize("gradient", [True, False])
def test_an_image_that_goes_on_shows_its_later_defects_too(planted: Any, gradient: bool) -> None:
    images = torch.stack([planted.image(0, red=RED, blue=BLUE), planted.image(1), planted.image(2, red=RED)])
    deltas = Deltas(planted.backbone, planted.module)
    for block in range(DEPTH):
        deltas.of_block(block)
    chosen = RepairSettings.model_validate(PAPER)
    asked: list[int] = []

    def interest(block: int, excess: float) -> Interest:
        asked.append(block)
        assert math.isfinite(excess)
        return Interest(gradient, True) if block < LATE else FIRST_ALONE

    def found(interest: Any, images: Tensor) -> StepGradient:
        return step_gradient(deltas, planted.directions, images, chosen, None, None, interest)

    both = found(interest, images)
    assert {EARLY, LATE} <= set(asked)
    assert both.defective == 2
    late = {part.block: part for part in both.parts}[LATE]
    alone = found(lambda block, _: FIRST_ALONE if block == LATE else Interest(False, True), images[:1])
    (expected,) = (part for part in alone.parts if part.block == LATE)
    if len(late.losses) == 1:  # the red tokens of the last image are no defect there any more
        assert_same(late.gradients, expected.gradients)
    if gradient:
        (early,) = (part for part in both.parts if part.block == EARLY)
        assert (len(early.losses), early.leaving) == (2, 0)
        first = {part.block: part for part in found(lambda *_: FIRST_ALONE, images).parts}[EARLY]
        assert first.leaving == 2
        assert_same(early.gradients, first.gradients)
    else:
        assert {part.block for part in both.parts} == {LATE}
        assert len(both.idle) >= 2
        assert both.first_block == EARLY
    assert late.leaving == len(late.losses)


def test_an_image_without_interest_adds_to_no_gradient(planted: Any) -> None:
    images = [planted.image(seed, red=RED[seed % 2 :]) for seed in range(4)]
    chosen = RepairSettings.model_validate(PAPER | {"min_tokens": 2})
    excesses: list[float] = []

    def found(limit: float) -> StepGradient:
        def interest(_block: int, excess: float) -> Interest:
            excesses.append(excess)
            return Interest(gradient=excess > limit, onward=False)

        deltas, probes = Deltas(planted.backbone, planted.module), Probes(range(4), {})
        return step_gradient(deltas, planted.directions, torch.stack(images), chosen, None, probes, interest)

    everything = found(-math.inf)
    limit = sorted(excesses)[1]  # two of four are above it
    above = [image for image, excess in zip(range(4), excesses[:4], strict=True) if excess > limit]
    (part,) = found(limit).parts
    (whole,) = everything.parts
    assert (len(part.losses), part.leaving, part.probed) == (2, 2, 2)
    assert part.losses == pytest.approx([whole.losses[image] for image in above])
    assert found(limit).idle == tuple((EARLY, pytest.approx(whole.losses[at])) for at in range(4) if at not in above)
    images = [images[image] for image in above]
    assert_same(part.gradients, found(-math.inf).parts[0].gradients)


@pytest.mark.parametrize(("factor", "block"), [(0.0, DEPTH - 1), (0.5, 0), (3.0, 0)])
def test_without_a_norm_factor_only_determined_directions_judge(factor: float, block: int, planted: Any) -> None:
    doubtful, broken = Directions(planted.directions.nu, [1.0] * DEPTH), planted.image(0, green=[(5, 5)])[None]
    rule = DetectionRule(norm_factor=factor)
    through = ForwardPass.entering(planted.backbone, planted.module, doubtful, broken, rule, 2)
    found = next(first_defects(through))
    assert found.block == block  # where NaN is first looked for


def test_a_block_whose_direction_is_not_determined_is_never_defective(planted: Any) -> None:
    image = planted.image(0, red=RED)
    assert gradient_of(planted, [image], min_gap=0).first_block == 0  # the paper's rule
    assert gradient_of(planted, [image]).first_block == EARLY
    doubtful = Directions(planted.directions.nu, [1.05] * DEPTH)
    assert passing(replace(planted, directions=doubtful), image[None]).next_defects() is None


def test_too_few_marked_tokens_make_no_defect(planted: Any) -> None:
    image = planted.image(0, red=RED[:2])
    assert gradient_of(planted, [image]).first_block is None
    assert gradient_of(planted, [image], min_tokens=2).first_block == EARLY


def test_a_clean_image_gives_no_gradient_and_decomposes_nothing(planted: Any) -> None:
    deltas = Deltas(planted.backbone, planted.module)
    images = planted.image(1)[None]
    settings = RepairSettings.model_validate(PAPER)
    found = step_gradient(deltas, planted.directions, images, settings)
    assert found == StepGradient()
    assert (found.losses, found.gradients, found.first_block, found.masked_tokens) == ((), {}, None, 0)
    assert found.finite
    assert deltas.touched == []


def test_a_step_leaves_weights_and_gradient_flags_as_they_were(planted: Any) -> None:
    before = {name: tensor.clone() for name, tensor in planted.module.state_dict().items()}
    gradient_of(planted, [planted.image(0, red=RED)])
    assert all(torch.equal(before[name], tensor) for name, tensor in planted.module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in planted.module.parameters())
    assert all(parameter.grad is None for parameter in planted.module.parameters())


def test_an_image_with_nan_tokens_is_not_clean(planted: Any) -> None:
    found = gradient_of(planted, [planted.image(0, green=[(5, 5)]), planted.image(1)])
    assert len(found.losses) == 1
    assert math.isnan(found.losses[0])
    assert not found.finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_noticed(bad: float) -> None:
    fine = {"blocks.0.mlp.up": torch.ones(3)}
    broken = fine | {"blocks.0.mlp.down": torch.tensor([1.0, bad])}

    def step_of(losses: tuple[float, ...], gradients: dict[str, Tensor], responses: dict[str, Tensor]) -> StepGradient:
        whole = BlockGradient(0, (1.0,), 1, 1.0, fine, fine, 1)
        return StepGradient((whole, BlockGradient(1, losses, 1, 1.0, gradients, responses, 1)), 3)

    assert step_of((1.0,), fine, fine).finite
    assert not step_of((1.0,), broken, fine).finite
    assert not step_of((1.0,), fine, broken).finite
    assert not step_of((1.0, bad), fine, fine).finite


def test_bfloat16_passes_give_nearly_the_same_gradient_in_float32(single: Any) -> None:
    images = [single.image(0, torch.float32, blue=BLUE), single.image(2, torch.float32, red=RED)]
    exact, mixed = gradient_of(single, images), gradient_of(single, images, dtype="bfloat16")
    assert mixed.first_block == exact.first_block == EARLY
    assert {gradient.dtype for gradient in mixed.gradients.values()} == {torch.float32}
    both = (torch.cat([found.gradients[name] for name in exact.gradients]) for found in (exact, mixed))
    assert torch.nn.functional.cosine_similarity(*both, dim=0) > 0.99


def test_an_image_with_nan_tokens_is_never_clean(planted: Any) -> None:
    untrusted = replace(planted, directions=Directions(planted.directions.nu, [1.0] * DEPTH))
    found = gradient_of(untrusted, [planted.image(0, green=[(5, 5)])])
    assert math.isnan(found.losses[0])
    assert found.first_block == DEPTH - 1  # NaN stays, and no earlier block is judged
    assert gradient_of(untrusted, [planted.image(0, red=RED)]).losses == ()


def test_nothing_but_the_forward_pass_runs_in_bfloat16(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(patches: Tensor, direction: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return alignment_logits(patches, direction)

    monkeypatch.setattr(forward, "alignment_logits", watched)
    gradient_of(single, [single.image(0, torch.float32, red=RED)], dtype="bfloat16")
    assert seen
    assert not any(seen)


def test_float16_gradients_are_lifted_and_put_back(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    image = single.image(0, torch.float32, blue=BLUE)
    exact = gradient_of(single, [image]).gradients

    def shares() -> list[float]:
        """How much of each target's exact gradient is found."""
        found = gradient_of(single, [image], dtype="float16").gradients
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        return [float(found[name] @ true / (true @ true)) for name, true in exact.items()]

    assert shares() == pytest.approx([1] * len(exact), abs=0.02)
    monkeypatch.setattr(step, "LOSS_SCALES", {"float16": 2.0**-18})
    assert min(shares()) < 0.9


def test_the_loss_scale_of_float16_saves_a_vanishing_gradient(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = step.neighbour_loss
    monkeypatch.setattr(step, "neighbour_loss", lambda *given: 2.0**-15 * own(*given))
    image = single.image(0, torch.float32, blue=BLUE)
    exact, found = (gradient_of(single, [image], dtype=dtype).gradients for dtype in ("float32", "float16"))
    shares = [float(found[name] @ true / (true @ true)) for name, true in exact.items()]
    assert shares == pytest.approx([1] * len(exact), abs=0.05)


def test_a_float16_gradient_that_overflows_is_not_finite(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "LOSS_SCALES", {"float16": 2.0**30})
    found = gradient_of(single, [single.image(0, torch.float32, red=RED)], dtype="float16")
    assert math.isfinite(found.losses[0])
    assert not found.finite


@pytest.mark.parametrize(("tf32", "precision"), [(False, "ieee"), (True, "tf32")])
def test_products_are_in_tf32_only_where_asked(tf32: bool, precision: str, single: Any) -> None:
    from torch.backends import cuda, cudnn

    before = cuda.matmul.fp32_precision, cudnn.conv.fp32_precision
    seen = set()

    def run_block(module: Any, index: int, tokens: Tensor, context: Any) -> Tensor:
        seen.add((cuda.matmul.fp32_precision, cudnn.conv.fp32_precision))
        return single.backbone.run_block(module, index, tokens, context)

    watching = replace(single, backbone=replace(single.backbone, run_block=run_block))
    gradient_of(watching, [single.image(0, torch.float32, red=RED)], tf32=tf32)
    assert seen == {(precision, precision)}
    assert (cuda.matmul.fp32_precision, cudnn.conv.fp32_precision) == before


@pytest.mark.parametrize("leaves", [False, True])
def test_known_tokens_stay_defective_until_they_have_settled(planted: Any, leaves: bool) -> None:
    """Nothing else is marked here; the image before it has left the batch, or has no known token."""
    spots = [*RED, (2, 2), (6, 10)]  # of which two are ordinary
    images = torch.stack([planted.image(1, red=RED if leaves else []), planted.image(0, red=RED)])
    known = torch.zeros(2, DEPTH, 12, 12, dtype=torch.bool)
    if leaves:
        known[0, EARLY][tuple(zip(*RED, strict=True))] = True
    known[1, LATE][tuple(zip(*spots, strict=True))] = True
    rule = replace(RULE, threshold=100.0)
    through = ForwardPass.entering(planted.backbone, planted.module, planted.directions, images, rule, 2, known)
    found = list(first_defects(through))
    assert [each.block for each in found] == [EARLY, LATE][not leaves :]
    late = found[-1]
    grid = planted.module(images)[LATE][1, 1:].unflatten(0, (12, 12))
    expected = unsettled(grid, known[1, LATE])
    assert {*map(tuple, expected.nonzero().tolist())} >= {*RED}
    assert late.images[late.defective].tolist() == [1]
    assert torch.equal(late.masks[late.defective][0], expected)
    assert late.masks[~late.defective].sum() == 0


@pytest.mark.parametrize("case", ["as it comes", "some idle", "each block on one rank", "without probes", "clean"])
def test_two_ranks_share_a_step(planted: Any, case: str) -> None:
    idle, apart = case == "some idle", case == "each block on one rank"
    images = [
        planted.image(0, blue=BLUE),
        planted.image(1, red=RED),
        planted.image(2),
        planted.image(3, red=RED) if apart else planted.image(3, blue=BLUE[1:]),
        planted.image(4, blue=BLUE) if apart else planted.image(4, red=RED),
        planted.image(5, red=RED) if apart else planted.image(5, red=RED, blue=BLUE),
    ]
    images = [planted.image(seed) for seed in range(6)] if case == "clean" else images
    chosen = RepairSettings.model_validate(PAPER | {"step": "greedy"})

    def local(deltas: Deltas, places: range) -> StepGradient:
        arguments = (deltas, planted.directions)
        probes = None if case == "without probes" else Probes(list(places), {})
        batch = torch.stack([images[place] for place in places])
        if not idle:
            return step_gradient(*arguments, batch, chosen, None, probes)
        return step_gradient(
            *arguments, batch, chosen, None, probes, lambda block, _: Interest(block == LATE, block != LATE)
        )

    def work(ranks: Ranks) -> tuple[SharedStep, dict[str, str]]:
        deltas = Deltas(planted.backbone, deepcopy(planted.module))
        mine = range(ranks.rank, len(images), 2)
        unreadable = {f"picture {ranks.rank}": "it is broken"}
        step = gathered(local(deltas, mine), len(mine), unreadable, deltas, chosen.window, ranks, lambda _: None)
        return step, unreadable

    whole = local(Deltas(planted.backbone, deepcopy(planted.module)), range(len(images)))
    assert bool(whole.idle) is idle
    both = side_by_side(work)
    for shared, unreadable in both:
        found = shared.gradient
        assert shared.images == len(images)
        assert unreadable == {f"picture {rank}": "it is broken" for rank in range(2)}
        assert (found.masked_tokens, found.defective) == (whole.masked_tokens, whole.defective)
        assert sorted(found.idle) == [(block, pytest.approx(loss)) for block, loss in sorted(whole.idle)]
        assert [part.block for part in found.parts] == [part.block for part in whole.parts]
        for part, expected in zip(found.parts, whole.parts, strict=True):
            assert sorted(part.losses) == pytest.approx(sorted(expected.losses))
            assert (part.leaving, part.probes, part.probed) == (expected.leaving, expected.probes, expected.probed)
            assert part.excess == pytest.approx(expected.excess)
            assert_same(part.gradients, expected.gradients)
            assert_same(part.responses, expected.responses)


def test_a_pass_keeps_no_graph_of_images_that_were_left_out(planted: Any) -> None:
    """What few images of a batch are asked for is recorded again alone; the pass must not hold the whole batch's."""
    images = torch.stack([planted.image(0, red=RED), *(planted.image(index) for index in range(1, 6))])
    through = passing(planted, images)
    found = through.next_defects()
    assert found is not None
    graphs = [weakref.ref(passed.leaving) for passed in found.window if passed.leaving is not None]
    found = through.wanted(found, [FIRST_ALONE])
    assert found is not None
    assert all(passed.leaving is None for passed in found.window)
    assert graphs
    gc.collect()
    assert all(graph() is None for graph in graphs)
