"""The greedy step: what it observes, which singular value it shrinks, and by how much, against slow twins."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tiny_runs import RED, Pictures, Run
from torch import Tensor

from sinder_cli.backbone.contract import WeightRef
from sinder_cli.defects.detection import leaning
from sinder_cli.repairing import step as step_module
from sinder_cli.repairing.deltas import Deltas, SingularBasis, Target
from sinder_cli.repairing.forward import FIRST_ALONE, Interest
from sinder_cli.repairing.greedy import (
    ALL,
    FLOOR,
    KEPT,
    LEAD,
    LEAST_EXCESS,
    NEARLY_SETTLED,
    PREFERRED,
    SURE,
    TO_GATHER,
    Observations,
    Shrinkage,
    _place,
    polyak_deltas,
    scale_of,
)
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.repairing.step import BlockGradient, Probes, step_gradient

EARLY = 1
MANY = 800  # probes


def target(values: list[float], delta: list[float] | None = None, name: str = "blocks.0.mlp.down") -> Target:
    """A diagonal target weight of these singular values."""
    r = len(values)
    basis = SingularBasis(torch.eye(r), torch.tensor(values, dtype=torch.float64), torch.eye(r))
    weight = torch.diag(torch.tensor(values))
    epsilon = torch.zeros(r) if delta is None else torch.tensor(delta)
    return Target(0, name, WeightRef(name=name), weight, weight.clone(), basis, epsilon, torch.zeros(r))


def part(
    targets: list[Target], slopes: Tensor, responses: Tensor, excess: float = 10.0, images: int = 1, probes: int = 1
) -> BlockGradient:
    """What a batch says, given the slopes ∂L/∂δ and the responses by δ, in one row over all targets."""
    scales = torch.cat([scale_of(each) for each in targets])
    names, lengths = [each.name for each in targets], [len(each.delta) for each in targets]
    gradients = dict(zip(names, (slopes / scales).split(lengths), strict=True))
    spread = (responses * images / probes).sqrt() / scales  # squared and summed over the probes, these again
    answers = {name: found.repeat(probes, 1) for name, found in zip(names, spread.split(lengths), strict=True)}
    return BlockGradient(0, (excess / images,) * images, images, excess, gradients, answers, probes, images)


def after(parts: list[BlockGradient], targets: list[Target], **settings: Any) -> tuple[Shrinkage | None, float]:
    """The move and the gain of the last of some steps, with many images to visit."""
    observations, chosen = Observations(), RepairSettings.model_validate(settings)
    for each in parts:
        observations.by_block[0], move, gain = observations.step(each, targets, 1000, chosen)
    return move, gain


def test_near_equal_singular_values_have_one_scale() -> None:
    values = [5.0, 3.0 + 1e-9, 3.0, 1.0, 1e-10]
    found = target(values)
    assert found.basis.groups == ((1, 3),)
    torch.testing.assert_close(scale_of(found), torch.tensor([5.0, 3.0, 3.0, 1.0, 0.0]))


def test_the_scale_leaves_the_basis_alone_in_float64_too() -> None:
    found = target([5.0, 3.0 + 1e-9, 3.0, 1.0, 1e-10])
    found.delta = found.delta.double()
    before = found.basis.S.clone()
    assert scale_of(found).dtype == torch.float64
    assert torch.equal(found.basis.S, before)


@examples(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), loss=st.floats(0.01, 100), trust=st.floats(0.01, 1))
def test_a_step_of_polyaks_length_is_that_of_a_loop(seed: int, loss: float, trust: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = [target([4.0, 2.0, 1.0], [-1.0, 0.0, 0.5], "a"), target([3.0, 0.5], name="b")]
    gradients = {each.name: torch.randn(len(each.delta), generator=generator) for each in targets}
    found = polyak_deltas(targets, gradients, loss, trust)
    by_delta = [
        (each, k, float(gradients[each.name][k]) * float(each.basis.S[k]))
        for each in targets
        for k in range(len(each.delta))
    ]
    length = math.sqrt(sum(g * g for _, _, g in by_delta))
    moved = 0.0
    for each, k, g in by_delta:
        sigma = float(each.basis.S[k])
        expected = float(each.delta[k]) - min(loss / length, trust) * g / length * sigma  # δ = ε/σ
        assert float(found[each.name][k]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        moved += ((float(found[each.name][k]) - float(each.delta[k])) / sigma) ** 2
    assert math.sqrt(moved) == pytest.approx(min(loss / length, trust), rel=1e-3)


def test_a_step_of_polyaks_length_without_a_gradient_moves_nothing() -> None:
    found = target([2.0, 1.0], [-0.5, 0.0])
    moved = polyak_deltas([found], {found.name: torch.zeros(2)}, 1.0, 0.5)
    assert torch.equal(moved[found.name], found.delta)


def test_probes_measure_the_mean_square_jacobian_of_ordinary_tokens(
    planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "PROBES", MANY)
    images = torch.stack([planted.image(0, red=RED), planted.image(1), planted.image(2, red=RED[:2])])
    deltas = Deltas(planted.backbone, planted.module)
    chosen = RepairSettings.model_validate(
        {"recipe": "paper", "min_gap": 1.1, "step": "greedy", "window": 1, "min_tokens": 2}
    )
    probes = Probes((1, 2, 3), {})
    found = step_gradient(deltas, planted.directions, images, chosen, None, probes).parts[0]
    assert (found.block, found.probes) == (EARLY, MANY)

    def tokens() -> Tensor:
        return planted.module(images)[EARLY]

    ordinary = torch.ones(3, 145, dtype=torch.bool)
    for image, spots in ((0, RED), (2, RED[:2])):
        for row, column in spots:
            ordinary[image, 1 + 12 * row + column] = False
    ordinary[1] = False  # it has no defect
    now, scale = tokens(), torch.ones(3, 1, 1, dtype=torch.float64)
    for image in (0, 2):
        marked = ~ordinary[image, 1:].unflatten(0, (12, 12))
        scale[image] = now[image, 1:][ordinary[image, 1:]].norm(dim=-1).mean()
        ordinary[image, 1:] &= ~leaning(now[image, 1:].unflatten(0, (12, 12)), marked).flatten()
    step = 1e-5
    ratios = []
    for each in deltas.of_block(EARLY):
        measured = found.responses[each.name].square().sum(dim=0) / MANY
        for k in range(0, each.basis.rank, 7):
            sides = []
            for sign in (1, -1):
                epsilon = torch.zeros_like(each.delta)
                epsilon[k] = sign * step
                each.write(epsilon)
                sides.append(tokens())
            each.write()
            change = (sides[0] - sides[1]) / (2 * step) / scale
            exact = sum(change[i][ordinary[i]].square().sum() / ordinary[i].sum() for i in (0, 2))
            ratios.append(float(measured[k] / exact))
    assert min(ratios) > 0.8
    assert max(ratios) < 1.2
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.05)


def test_a_block_measured_before_takes_fewer_probes(planted: Any) -> None:
    images = planted.image(0, red=RED)[None]
    chosen = RepairSettings.model_validate({"recipe": "paper", "min_gap": 1.1, "step": "greedy"})

    def seen(taken: dict[int, int], seed: int = 0) -> BlockGradient:
        probes = Probes((seed,), taken)
        deltas = Deltas(planted.backbone, planted.module)
        return step_gradient(deltas, planted.directions, images, chosen, None, probes).parts[0]

    assert seen({}).probes == seen({EARLY + 1: 9}).probes == step_module.PROBES
    assert seen({EARLY: step_module.ENOUGH_PROBES - 1}).probes == step_module.MORE_PROBES
    enough = seen({EARLY: step_module.ENOUGH_PROBES})
    assert (enough.probes, enough.responses) == (0, {})
    one, again, other = (seen({EARLY: 1}, seed).responses["blocks.1.mlp.down"] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_crowded_images_are_probed_only_where_nothing_is_known_yet(
    planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaks from very many marked tokens moves the ordinary ones too, several times as far as elsewhere."""
    monkeypatch.setattr(step_module, "CROWDED", (len(RED) - 0.5) / 144)
    crowded = planted.image(0, red=RED)
    chosen = RepairSettings.model_validate({"recipe": "paper", "min_gap": 1.1, "step": "greedy", "min_tokens": 2})

    def seen(taken: dict[int, int], *images: Tensor) -> BlockGradient:
        deltas, probes = Deltas(planted.backbone, planted.module), Probes((5, 6)[-len(images) :], taken)
        return step_gradient(deltas, planted.directions, torch.stack(images), chosen, None, probes).parts[0]

    few = planted.image(1, red=RED[1:])
    first, later = seen({}, crowded), seen({EARLY: 4}, crowded)
    assert (first.probes, first.probed) == (step_module.PROBES, 1)
    assert (later.probes, later.probed, later.responses) == (0, 0, {})
    both, alone = seen({EARLY: 4}, crowded, few), seen({EARLY: 4}, few)
    assert (both.probes, both.probed, len(both.losses)) == (step_module.MORE_PROBES, 1, 2)
    for name, response in alone.responses.items():
        torch.testing.assert_close(both.responses[name], response)


def test_a_singular_value_that_writes_the_defect_answers_for_it(writer: Any) -> None:
    images = torch.stack([writer.image(index, red=RED) for index in range(2)])
    deltas = Deltas(writer.backbone, writer.module)
    chosen = RepairSettings()
    probes = Probes((1, 2), {})
    (found,) = step_gradient(deltas, writer.directions, images, chosen, None, probes).parts
    assert found.block == EARLY  # by norm, though no direction is determined
    targets = deltas.of_window(EARLY, chosen.window)
    seen, _, _ = Observations().step(found, targets, 2, chosen)
    shares = dict(zip((each.name for each in targets), seen.shares.split([len(t.delta) for t in targets]), strict=True))
    assert float(shares["blocks.1.mlp.down"][0]) == pytest.approx(1, abs=0.05)
    assert shares["blocks.1.mlp.down"][1:].abs().max() < 0.05
    assert seen.shares.max() <= 1


def test_a_greedy_run_shrinks_the_writer_and_nothing_else(single_writer: Any) -> None:
    red = [single_writer.image(index, torch.float32, red=RED) for index in range(3)]
    run = Run(single_writer, Pictures(*red), recipe="sinder", max_steps=60)
    records = run.finish()
    assert [record.moved for record in records[:2]] == [None, None]  # before each image has been seen once
    assert {record.moved for record in records} == {"blocks.1.mlp.down", None}
    assert records[-1].clean_fraction == 1
    (changed,) = run.deltas.changed
    assert changed.delta.nonzero().flatten().tolist() == [0]
    assert -20 <= float(changed.delta[0]) <= -10
    for record in records:
        assert (record.moved is None) == (record.length is None)
        assert record.length is None or 0 < record.length <= run.settings.trust + 1e-6


def test_a_singular_value_never_falls_under_0() -> None:
    for delta, share, expected in ((0.0, 0.5, -2.0), (-3.0, 0.5, -4.0), (-4.0, 0.5, -4.0), (0.0, 1.0, -4.0)):
        found = Shrinkage(target([4.0, 2.0, 1.0], [delta, 0.0, -1.0]), 0, 1, share).delta()
        torch.testing.assert_close(found, torch.tensor([expected, 0.0, -1.0]))


def test_near_equal_singular_values_shrink_together() -> None:
    found = target([5.0, 3.0 + 1e-9, 3.0, 1.0])
    steps = [part([found], torch.tensor([0.0, 8.0, 8.0, 0.0]), torch.full((4,), 1e-4))] * TO_GATHER
    move, _ = after(steps, [found])
    assert move is not None
    assert (move.start, move.stop) == (1, 3)
    delta = move.delta()
    assert delta[1] == delta[2] < 0
    assert delta[[0, 3]].eq(0).all()


def test_a_singular_value_beside_near_equal_ones_shrinks_alone() -> None:
    for at, values in ((0, [5.0, 3.0 + 1e-9, 3.0, 1.0]), (3, [5.0, 3.0 + 1e-9, 3.0, 1.0, 0.5, 0.5 - 1e-9])):
        found = target(values)
        slopes = torch.zeros(len(values))
        slopes[at] = 8.0
        move, _ = after([part([found], slopes, torch.full((len(values),), 1e-4))] * TO_GATHER, [found])
        assert move is not None
        assert (move.start, move.stop) == (at, at + 1)


def test_a_response_of_0_gives_no_endless_gain() -> None:
    found = target([5.0, 3.0, 1.0])
    move, gain = after([part([found], torch.tensor([9.0, 1.0, 0.0]), torch.zeros(3))] * TO_GATHER, [found])
    assert math.isfinite(gain)
    assert move is not None
    assert (move.start, move.share) == (0, 0.5)


def test_tokens_nearer_than_ordinary_ones_promise_no_gain() -> None:
    found = target([5.0, 3.0, 1.0])
    steps = [part([found], torch.tensor([9.0, 2.0, 1.0]), torch.full((3,), 1e-4), excess) for excess in (10.0, -1.0)]
    assert after(steps, [found], min_gain=0.0)[1] == 0
    observations = Observations()
    for _ in range(2):
        observations.by_block[0], _, _ = observations.step(steps[0], [found], 1000, RepairSettings())
    assert observations.interest(0, -1.0, [found], RepairSettings(min_gain=0.0)) == FIRST_ALONE
    assert observations.interest(0, -1.0, [found], RepairSettings(min_gain=1e-6)) == Interest(False, True)


def test_a_place_beyond_the_row_is_refused() -> None:
    targets = [target([4.0, 2.0, 1.0], name="a"), target([3.0, 0.5], name="b")]
    places = [(found.name, index) for found, index in (_place(targets, at) for at in range(5))]
    assert places == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    with pytest.raises(IndexError):
        _place(targets, 5)


def test_what_is_shrunk_to_0_already_is_not_chosen_again() -> None:
    found = target([5.0, 3.0, 1.0], [-5.0, 0.0, 0.0])
    steps = [part([found], torch.tensor([9.0, 4.0, 1.0]), torch.full((3,), 1e-4))] * TO_GATHER
    move, _ = after(steps, [found])
    assert move is not None
    assert move.start == 1


@pytest.mark.parametrize(
    ("images", "next_best", "least"),
    [
        (1, 0.1, 1),
        (3, 0.1, 3),
        (SURE, 0.1, SURE),
        (1000, 0.1, SURE),  # a clear lead
        (1000, 0.9 / LEAD + 0.01, TO_GATHER),
        (TO_GATHER, 0.8, TO_GATHER),
        (6, 0.8, 6),
    ],
)
def test_no_move_is_made_before_enough_steps(images: int, next_best: float, least: int) -> None:
    found = target([5.0, 3.0, 1.0])
    one = part([found], torch.tensor([9.0, 10 * next_best, 1.0]), torch.full((3,), 1e-4))
    observations, chosen = Observations(), RepairSettings()
    moves = []
    for _ in range(TO_GATHER + 2):
        observations.by_block[0], move, _ = observations.step(one, [found], images, chosen)
        moves.append(move is not None)
    assert moves == [step >= least for step in range(1, TO_GATHER + 3)]


@pytest.mark.parametrize(
    ("share", "next_best", "least"),
    [(ALL + 0.01, 0.8, SURE), (ALL - 0.01, 0.8, TO_GATHER), (ALL + 0.01, ALL + 0.005, SURE)],  # also beside its equal
)
def test_what_answers_for_all_of_the_loss_moves_sooner(share: float, next_best: float, least: int) -> None:
    found = target([5.0, 3.0, 1.0])
    one = part([found], torch.tensor([10 * share, 10 * next_best, 1.0]), torch.full((3,), 1e-4), 10.0)
    moves = [after([one] * steps, [found])[0] is not None for steps in range(1, TO_GATHER + 1)]
    assert moves == [step >= least for step in range(1, TO_GATHER + 1)]


@pytest.mark.parametrize(("excess", "moves"), [(1.0, False), (10.0, True)])
def test_no_move_is_made_below_the_least_gain(excess: float, moves: bool) -> None:
    found = target([5.0, 3.0, 1.0])
    slopes = torch.tensor([1.0, 0.0, 0.0]) * excess
    steps = [part([found], slopes, torch.ones(3), excess)] * TO_GATHER
    move, gain = after(steps, [found])
    assert gain == pytest.approx(excess / math.sqrt(1 + FLOOR), rel=1e-3)
    assert (move is not None) is moves
    assert after(steps, [found], min_gain=gain * 1.001)[0] is None
    assert after(steps, [found], min_gain=gain * 0.999)[0] is not None


@examples(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), steps=st.integers(1, 14), images=st.integers(1, 3))
def test_the_gain_and_the_move_are_those_of_a_loop(seed: int, steps: int, images: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = [target([4.0, 2.0, 1.0], [-1.0, 0.0, 0.0], "a"), target([3.0, 0.5], [0.0, -0.2], name="b")]
    rows = [
        (
            torch.randn(5, generator=generator) * 8 + torch.tensor([4.0, 0, 0, 2, 0]),
            torch.rand(5, generator=generator) * 0.1,
            float(torch.rand((), generator=generator)) * 20 + 0.01,
        )
        for _ in range(steps)
    ]
    parts = [part(targets, slopes, responses, excess, images) for slopes, responses, excess in rows]
    weights = [KEPT ** (steps - 1 - age) for age in range(steps)]
    gains, means, moved = [], [], []
    all_responses = [sum(float(responses[k]) for _, responses, _ in rows) / steps for k in range(5)]
    left = [0.75, 1, 1, 1, 0.6]
    weighted = []
    for k in range(5):
        shares = []
        for slopes, _, excess in rows:
            share = float(slopes[k]) * left[k] / max(excess, LEAST_EXCESS * images)
            shares.append(1 / share if share > 1 else max(share, -1.0))
        total = sum(weights)
        mean = sum(w * s for w, s in zip(weights, shares, strict=True)) / total
        square = sum(w * s * s for w, s in zip(weights, shares, strict=True)) / total
        error = math.sqrt(max(square - mean**2, 0) / max(total - 1, 0.5)) if total > 1.5 else 0.0
        answer = math.sqrt(all_responses[k] + FLOOR * sum(all_responses) / 5)
        gains.append(max(mean - error, 0) * (rows[-1][2] / images) / (answer * left[k]))
        means.append(mean)
        moved.append(answer)
        weighted.append(gains[-1] * (PREFERRED if total > 1.5 and mean - error >= ALL else 1))
    move, gain = after(parts, targets)
    at = weighted.index(max(weighted))
    assert gain == pytest.approx(gains[at], rel=1e-3, abs=1e-3)
    first, second = sorted(weighted, reverse=True)[:2]
    enough = SURE if first >= LEAD * second else TO_GATHER
    if move is None:
        assert steps < min(enough, 1000) or gains[at] < 3.0 + 1e-3 or first < LEAD * second * 1.01
        return
    assert steps >= enough or first < LEAD * second * 1.01
    assert (move.target.name, move.start) == (("a", at) if at < 3 else ("b", at - 3))
    assert move.share == pytest.approx(min(left[at] / max(means[at], 1e-6), 0.05 / moved[at], 0.5), rel=1e-3)


def test_what_causes_the_defect_goes_before_what_prevents_it_in_these_images() -> None:
    """A trigger that is blunted helps where it is seen; without the writer no image has the defect."""
    found = target([5.0, 3.0, 1.0])
    steps = [
        part([found], torch.tensor([10.0, prevents, 0.0]), torch.tensor([4e-4, 1e-4, 1e-4]))
        for prevents in (6.0, 9.0, 7.0, 8.0)
    ]
    move, gain = after(steps, [found])
    assert move is not None
    assert move.start == 0
    assert gain == pytest.approx(10 / math.sqrt(4e-4 + FLOOR * 2e-4), rel=1e-3)
    wide = target([float(50 - at) for at in range(40)])
    slopes, answers = torch.zeros(40), torch.full((40,), 1e-6)
    slopes[:2], answers[0] = torch.tensor([10.0, 8.0]), 1.0  # it moves ordinary tokens far too much
    move, _ = after([part([wide], slopes, answers)] * TO_GATHER, [wide])
    assert move is not None
    assert move.start == 1


@pytest.mark.parametrize(("steps", "chosen"), [(1, 1), (2, 0)])
def test_one_image_alone_proves_no_cause(steps: int, chosen: int) -> None:
    found = target([5.0, 3.0, 1.0])
    one = part([found], torch.tensor([10.0, 7.0, 0.0]), torch.tensor([4e-4, 1e-4, 1e-4]))
    observations = Observations()
    for _ in range(steps):
        observations.by_block[0], move, _ = observations.step(one, [found], 1, RepairSettings())
    assert move is not None
    assert move.start == chosen


@pytest.mark.parametrize("gone", [0.0, 0.5, 0.9, 0.99])
def test_what_is_left_of_the_writer_still_answers(gone: float) -> None:
    """However little it is: it moves the others little too, so it is chosen before one that helps by chance."""
    left = 1 - gone
    found = target([5.0, 3.0, 1.0], [-5.0 * gone, 0.0, 0.0])
    slopes = torch.tensor([10.0 / left, 6.0, 0.0])  # ∂L/∂δ of a loss that is proportional to what is left
    steps = [part([found], slopes, torch.full((3,), 1e-4))] * TO_GATHER
    seen, move, gain = Observations().step(steps[0], [found], 1, RepairSettings())
    assert gone >= 0.5 or torch.allclose(seen.shares, torch.tensor([1.0, 0.6, 0.0]))  # once it is gone, anew
    assert gain == pytest.approx(10 / (left * math.sqrt(1e-4 * (1 + FLOOR))), rel=1e-3)
    assert move is not None
    assert (move.start, move.share) == (0, pytest.approx(min(left, 0.5), rel=1e-3))
    assert move.is_the_last == (gone >= 0.5)


def test_shares_are_seen_anew_once_the_writer_is_gone() -> None:
    found = target([5.0, 3.0, 1.0])
    one = part([found], torch.tensor([10.0, 2.0, 0.0]), torch.full((3,), 1e-4))
    observations, chosen = Observations(), RepairSettings(trust=0.6, max_drift=1.0)
    for _ in range(SURE):
        seen, move, _ = observations.step(one, [found], 1000, chosen)
        observations.by_block[0] = seen
    assert move is not None
    assert not move.is_the_last
    assert seen.weight > 3
    found = replace(found, delta=move.delta())
    seen, move, _ = observations.step(one, [found], 1000, chosen)
    assert move is not None
    assert move.is_the_last
    assert (seen.weight, seen.probes, seen.shares.tolist()) == (0, SURE + 1, [0, 0, 0])
    torch.testing.assert_close(seen.responses, torch.full((3,), (SURE + 1) * 1e-4))
    observations.by_block[0] = seen
    found = replace(found, delta=move.delta())
    without = part([found], torch.zeros(3), torch.full((3,), 1e-4))
    for _ in range(SURE + 1):
        observations.by_block[0], move, gain = observations.step(without, [found], 1000, chosen)
        assert (move, gain) == (None, 0)  # what it moved went by way of the writer


def test_steps_without_a_probe_keep_what_was_measured() -> None:
    found = target([5.0, 3.0, 1.0])
    measured = part([found], torch.ones(3), torch.tensor([1.0, 2.0, 3.0]), probes=4)
    observations = Observations()
    observations.by_block[0], _, _ = observations.step(measured, [found], 1000, RepairSettings())
    later = replace(measured, responses={}, probes=0, probed=0)
    seen, _, _ = observations.step(later, [found], 1000, RepairSettings())
    assert seen.probes == 4
    torch.testing.assert_close(seen.responses, torch.tensor([1.0, 2.0, 3.0]))


def test_images_go_on_where_nothing_is_to_be_gained() -> None:
    found = target([5.0, 3.0, 1.0])
    chosen = RepairSettings()
    little = part([found], torch.tensor([0.1, 0.0, 0.0]), torch.ones(3), 1.0)
    observations = Observations()
    near = NEARLY_SETTLED / 2
    assert observations.interest(0, near, [found], chosen) == FIRST_ALONE  # nothing is known yet
    for expected in (FIRST_ALONE, Interest(False, True), Interest(False, True)):  # one step is not enough to know
        observations.by_block[0], _, _ = observations.step(little, [found], 1000, chosen)
        assert observations.interest(0, near, [found], chosen) == expected
    assert observations.interest(0, 2 * NEARLY_SETTLED, [found], chosen) == Interest(True, True)
    assert observations.interest(0, near, None, chosen) == FIRST_ALONE
    assert observations.interest(1, near, [found], chosen) == FIRST_ALONE
    assert observations.interest(0, near, [found], chosen.model_copy(update={"min_gain": 0.0})) == FIRST_ALONE


@pytest.mark.parametrize("excess", [math.nan, math.inf])
def test_what_is_not_finite_goes_no_further(excess: float) -> None:
    found = target([5.0, 3.0, 1.0])
    little = part([found], torch.tensor([0.1, 0.0, 0.0]), torch.ones(3), 1.0)
    observations, chosen = Observations(), RepairSettings()
    for _ in range(3):
        observations.by_block[0], _, _ = observations.step(little, [found], 1000, chosen)
    assert observations.interest(0, excess, [found], chosen) == FIRST_ALONE


def test_a_step_observes_nothing_until_it_is_taken() -> None:
    found = target([5.0, 3.0, 1.0])
    observations = Observations()
    observations.step(part([found], torch.ones(3), torch.ones(3)), [found], 1, RepairSettings())
    assert observations.by_block == {}
    assert found.delta.eq(0).all()


def test_a_greedy_step_in_bfloat16_still_chooses_the_writer(single_writer: Any) -> None:
    red = [single_writer.image(index, torch.float32, red=RED) for index in range(2)]
    run = Run(replace(single_writer), Pictures(*red), recipe="sinder", dtype="bfloat16", max_steps=3)
    assert [record.moved for record in run.finish()][1] == "blocks.1.mlp.down"
