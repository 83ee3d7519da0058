"""The guard: which images it takes, what it says of a state, and when it ends a repair."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import RED
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from sinder_cli.defects.detection import DetectionRule, norm_ratios
from sinder_cli.defects.inpainting import inpainted
from sinder_cli.defects.settings import SLACK
from sinder_cli.defects.shift import Retrieval, found_again, shifted
from sinder_cli.defects.tokens import last_tokens
from sinder_cli.errors import BadInputError
from sinder_cli.repairing.choosing import guard_size, guard_sizes, guarded
from sinder_cli.repairing.guard import (
    SAME_WAY,
    SAMPLES,
    SHIFTED,
    WORST,
    DefectAxis,
    Evaluation,
    Fidelity,
    Guard,
    Snapshot,
)
from sinder_cli.repairing.loop import CLEAN_LOOKS, EQUAL_FIDELITY, IDLE_LOOKS, SPOILT_LOOKS, Best, Progress
from sinder_cli.repairing.scan import marked_batch

FLOOR = 0.95
PATCH = 2  # pixels


@pytest.mark.parametrize(
    ("count", "asked", "size"),
    [
        (0, None, 0),
        (1, None, 0),
        (2, None, 1),
        (7, None, 3),  # no more than half
        (8, None, 4),
        (40, None, 4),
        (46, None, 5),
        (100, None, 10),
        (640, None, 64),
        (100_000, None, 64),
        (100, 3, 3),
        (100, 200, 50),
        (1, 1, 0),
    ],
)
def test_the_guard_is_a_tenth_of_the_images(count: int, asked: int | None, size: int) -> None:
    assert guard_size(count, asked) == size


@pytest.mark.parametrize(
    ("given", "drawn", "asked", "sizes"),
    [
        (0, 0, None, (0, 0)),
        (1, 100, None, (0, 10)),  # none can be spared
        (2, 100, None, (1, 3)),
        (2, 4, None, (1, 2)),
        (7, 100, None, (3, 1)),
        (8, 100, None, (4, 0)),
        (100, 100, None, (10, 0)),
        (4, 100, 3, (2, 0)),
        (1, 100, 3, (0, 3)),
        (100, 100, 0, (0, 0)),
    ],
)
def test_drawn_images_make_up_for_too_few(given: int, drawn: int, asked: int | None, sizes: tuple[int, int]) -> None:
    assert guard_sizes(given, drawn, asked) == sizes


@pytest.mark.parametrize(
    ("clean", "with_a_defect", "size", "chosen"),
    [
        (10, 90, 10, (1, 9)),  # as many as there are among all
        (90, 10, 10, (5, 5)),  # at least half
        (50, 10, 5, (2, 3)),
        (3, 1, 2, (1, 0)),  # half of each kind stays for training
        (4, 0, 4, (4, 0)),
    ],
)
def test_the_guard_has_its_share_of_defects(clean: int, with_a_defect: int, size: int, chosen: tuple[int, int]) -> None:
    taken = guarded([()] * clean + [(2,)] * with_a_defect, size)
    assert (sum(index < clean for index in taken), sum(index >= clean for index in taken)) == chosen


@settings(max_examples=200, deadline=None)
@given(kinds=st.lists(st.sampled_from([(), (), (2,), (5,), (5, 7)]), max_size=60), asked=st.none() | st.integers(1, 40))
def test_the_guard_leaves_half_of_every_kind_for_training(kinds: list[tuple[int, ...]], asked: int | None) -> None:
    size = guard_size(len(kinds), asked)
    chosen = guarded(kinds, size)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(len(kinds)))
    assert len(chosen) <= size
    taken = {kind: sum(kinds[index] == kind for index in chosen) for kind in set(kinds)}
    offered = {kind: kinds.count(kind) // 2 for kind in set(kinds) - {()}}
    assert all(taken[kind] <= most for kind, most in offered.items())
    defective = sum(taken[kind] for kind in offered)
    assert defective >= min(sum(offered.values()), (size + 1) // 2)
    several = [kind for kind, most in offered.items() if most]
    if len(several) <= (size + 1) // 2:
        assert all(taken[kind] for kind in several)
    clean = kinds.count(())
    allowed = clean if not offered else min(clean, max(1, clean // 2))
    assert len(chosen) == min(size, sum(offered.values()) + allowed)


def test_a_kind_of_a_single_image_is_trained_on() -> None:
    assert 9 not in guarded([()] * 9 + [(3,)], 4)
    assert {9, 10} & set(guarded([()] * 9 + [(3,), (3,)], 4))


def test_the_rarest_kinds_are_on_the_guard_first() -> None:
    kinds = [(1,)] * 20 + [(4, 7)] * 2 + [(4,)] * 4
    taken = [sorted(kinds[index] for index in guarded(kinds, size)) for size in (1, 2, 3)]
    assert taken == [[(4, 7)], [(4,), (4, 7)], [(1,), (4,), (4, 7)]]


def test_a_large_kind_fills_up_the_guard() -> None:
    taken = [index for index in guarded([(1,)] * 20 + [(4, 7)] * 2, 8) if index < 20]
    assert len(taken) == 7


def test_consecutive_images_are_not_all_of_the_guard() -> None:
    for kinds in ([()] * 100, [(2,)] * 100):
        chosen = guarded(kinds, 8)
        assert max(chosen) - min(chosen) > 50
        assert chosen == guarded(kinds, 8)
        assert chosen != guarded(kinds, 8, seed=1)
    assert guarded([], 0) == []


def test_the_worst_hundredth_of_good_tokens_may_not_be_spoilt() -> None:
    original = Fidelity(0.99, 0.99, 0.99, 0.3, None)
    assert Fidelity(1.0, 1.0, 1.0, 0.3 - 0.9 * SLACK, None).holds(original, FLOOR)
    assert not Fidelity(1.0, 1.0, 1.0, 0.3 - 1.1 * SLACK, None).holds(original, FLOOR)
    healthy = Fidelity(1.0, 1.0, 1.0, 1.0, None)
    assert Fidelity(1.0, 1.0, 1.0, WORST, None).holds(healthy, FLOOR)
    assert not Fidelity(1.0, 1.0, 1.0, WORST - 2 * SLACK, None).holds(healthy, FLOOR)


def test_a_part_of_the_good_tokens_is_not_given_up() -> None:
    original = Fidelity(0.99, 0.9985, 0.99, 0.6, None)
    assert Fidelity(0.99, 0.9985, 0.98, 0.6, None).holds(original, FLOOR) is False
    assert Fidelity(0.99, 0.9985, 0.99, 0.6, None).holds(original, FLOOR)


@pytest.mark.parametrize(
    ("cls", "way", "holds"),
    [
        (0.9864, 0.83, True),  # of a real repair, whose cls is within 0.0001 of the twin's
        (0.9864, SAME_WAY - 0.01, False),  # as far, another way
        (0.9864, None, False),
        (0.9841, 0.99, False),  # the same way, but more than twice as far
        (0.9922, -1.0, True),  # no further: the way is no matter
    ],
)
def test_cls_may_go_further_the_way_that_inpainting_points(cls: float, way: float | None, holds: bool) -> None:
    original = Fidelity(0.9921, 1.0, 1.0, 1.0, 0.2)
    assert Fidelity(cls, 1.0, 1.0, 1.0, 0.5, way).holds(original, FLOOR) is holds


def test_the_floor_holds_whatever_the_way() -> None:
    original = Fidelity(0.97, 1.0, 1.0, 1.0, 0.2)
    assert Fidelity(0.951, 1.0, 1.0, 1.0, 0.5, 1.0).holds(original, FLOOR)
    assert not Fidelity(0.949, 1.0, 1.0, 1.0, 0.5, 1.0).holds(original, FLOOR)


def test_good_tokens_have_no_such_freedom() -> None:
    original = Fidelity(1.0, 0.99, 0.99, 0.99, 0.2)
    assert not Fidelity(1.0, 0.983, 0.983, 0.983, 0.5, 1.0).holds(original, FLOOR)


def test_the_way_of_cls_is_the_angle_between_two_moves(single_writer: Any) -> None:
    guard = guard_of(single_writer)
    guard.remember()
    original, meant = (torch.cat([pair[which][:, 0] for pair in guard._references]) for which in (1, 0))
    parts = [pair[1].shape[0] for pair in guard._references]
    start, end = (normalize(each.double(), dim=-1) for each in (original, meant))

    def way(heads: torch.Tensor) -> float | None:
        return guard._way([batch[:, None] for batch in heads.float().split(parts)])

    assert way(start) is None  # nothing has moved
    assert way(end) == pytest.approx(1, abs=1e-3)
    further, back = (normalize(start + by * (end - start), dim=-1) for by in (1.5, -0.5))
    assert way(further) == pytest.approx(1, abs=0.05)
    assert way(back) == pytest.approx(-1, abs=0.05)


def test_nearly_as_good_states_do_not_lead_downhill() -> None:
    progress = Progress(10)
    cls = 0.99
    for step in range(1, 40):
        seen = look(step, outlying=1, cls=cls)
        best = progress.best is None or progress.best.is_beaten_by(seen)
        progress.judge(replace(seen, best=best), {}, stops=False)
        cls -= 0.9 * EQUAL_FIDELITY
    assert progress.best is not None
    assert progress.best.step == 2
    assert progress.best.cls == 0.99
    assert progress.idle_looks == 38


def fidelity(good: float, cls: float | None = 1.0) -> Fidelity:
    return Fidelity(cls, good, good, good, None)


@pytest.mark.parametrize(
    ("was", "now", "holds"),
    [
        (0.99, 0.99, True),
        (0.99, 0.99 - 0.9 * SLACK, True),
        (0.99, 0.99 - 1.1 * SLACK, False),  # above the floor, and further off than the original
        (0.96, 0.94, False),
        (0.94, 0.94, False),  # under the floor, and no nearer than the original
        (0.80, 0.84, False),
        (0.80, 0.86, True),  # nearer by a quarter of the way
        (0.80, 0.96, True),
    ],
)
def test_a_state_holds_only_if_it_is_near_or_nearer(was: float, now: float, holds: bool) -> None:
    assert fidelity(now).holds(fidelity(was), FLOOR) is holds
    assert fidelity(1.0, now).holds(fidelity(1.0, was), FLOOR) is holds  # cls as well as good tokens
    assert fidelity(1.0, None).holds(fidelity(1.0, None), FLOOR)
    assert not fidelity(math.nan).holds(fidelity(was), FLOOR)


def snapshot(**changes: Any) -> Snapshot:
    """Two blocks, two images of 1 × 3 patches; the original marks the first patch of the first image."""
    norms = torch.tensor([[[[1.0, 2, 3]], [[4, 5, 6]]], [[[9.0, 2, 1]], [[2, 8, 2]]]])
    outlying = torch.zeros(2, 2, 1, 3, dtype=torch.bool)
    outlying[1, 0, 0, 0] = outlying[0, 0, 0, 0] = outlying[1, 1, 0, 1] = True
    ever = torch.zeros(2, 1, 3, dtype=torch.bool)
    ever[0, 0, 0] = True
    parts: dict[str, Any] = {
        "norms": norms,
        "ratios": torch.stack([norm_ratios(each) for each in norms]),
        "outlying": outlying,
        "standing": outlying.any(dim=0),
        "cls": torch.zeros(2, 4),
        "samples": torch.zeros(2, 1, 3, 4),
        "to_inpainted": torch.zeros(2, 1, 3),
        "judged": torch.tensor([[[0.1, 0.9, 0.8]], [[0.7, 0.6, 0.5]]]),
        "to_original": torch.tensor([[[1.0, 0.99, 0.98]], [[0.97, 0.96, 0.95]]]),
        "cls_to_inpainted": torch.tensor([0.5, 0.7]),
        "cls_to_original": torch.tensor([0.9, 0.7]),
        "ever": ever,
    }
    return Snapshot(**parts | changes)


def test_a_snapshot_counts_outlying_tokens_once_and_block_by_block() -> None:
    found = snapshot().defects()
    assert (found["tokens"], found["standing"], found["images"]) == (2, 2, 2)
    assert found["fraction"] == pytest.approx(2 / 6)
    assert (found["worst_block"], found["max_ratio"], found["max_norm"], found["median_norm"]) == (1, 4.5, 9.0, 2.0)
    assert found["blocks"] == [
        {
            "block": 0,
            "tokens": 1,
            "fraction": pytest.approx(1 / 6),
            "max_norm": 6.0,
            "median_norm": 3.0,
            "max_ratio": 1.5,
        },
        {
            "block": 1,
            "tokens": 2,
            "fraction": pytest.approx(2 / 6),
            "max_norm": 9.0,
            "median_norm": 2.0,
            "max_ratio": 4.5,
        },
    ]


def test_an_image_counts_once_however_many_tokens_are_outlying() -> None:
    outlying = torch.zeros(3, 2, 2, 3, dtype=torch.bool)
    outlying[0, 1, 0, 1] = outlying[1, 1, 0, 1] = outlying[1, 1, 1, 2] = outlying[2, 1, 1, 0] = True
    norms = torch.ones(3, 2, 2, 3)
    found = snapshot(norms=norms, ratios=norms, outlying=outlying, standing=outlying.any(dim=0)).defects()
    assert (found["tokens"], found["images"], found["fraction"]) == (3, 1, pytest.approx(3 / 12))
    assert [block["tokens"] for block in found["blocks"]] == [1, 2, 1]


def test_fidelity_is_of_cls_of_good_and_of_marked_tokens() -> None:
    found = snapshot().fidelity()
    assert found.as_dict() == {
        "cls": pytest.approx(0.6),
        "good": pytest.approx(0.7),  # of 0.5, 0.6, 0.7, 0.8, 0.9
        "good_mean": pytest.approx(0.7),
        "good_p01": pytest.approx(0.5),
        "marked": pytest.approx(0.1),
        "cls_way": None,
    }
    assert snapshot().fidelity("original").good == pytest.approx(0.97)
    headless = snapshot(cls_to_inpainted=None, ever=torch.zeros(2, 1, 3, dtype=torch.bool)).fidelity()
    assert (headless.cls, headless.marked) == (None, None)
    everywhere = snapshot(ever=torch.ones(2, 1, 3, dtype=torch.bool)).fidelity()
    assert everywhere.good == pytest.approx(0.6)  # the lower of the two in the middle
    assert everywhere.marked == pytest.approx(0.6)


def leaning_tokens() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patches `[1, 20, 20, 16]`: clean, the original, the yardstick; and what the original marks.

    Of 400 tokens, 8 carry ten times their norm of the defect, and are marked; 12 carry twice their norm, and are not.
    """
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(1, 20, 20, 16, generator=generator)
    d = normalize(torch.randn(16, generator=generator), dim=0)
    ever = torch.zeros(1, 20, 20, dtype=torch.bool)
    ever[0, 3, 2:10] = True
    amount = 40.0 * ever
    amount[0, 15, 4:16] = 8.0
    original = clean + amount[..., None] * d
    return clean, original, torch.where(ever[..., None], clean, original), ever


def test_tokens_that_lean_towards_the_defect_are_judged_without_their_part_along_it() -> None:
    clean, original, yardstick, ever = leaning_tokens()
    axis = DefectAxis.of([(yardstick, original, ever)])
    assert axis is not None
    plain = cosine_similarity(clean, yardstick, dim=-1)
    fair = axis.fair(clean, yardstick, ever, plain)
    leaning = torch.zeros_like(ever)
    leaning[0, 15, 4:16] = True
    assert plain[leaning].mean() < 0.5
    assert fair[leaning].min() > 1 - 1e-5
    assert torch.equal(fair[~leaning], plain[~leaning])
    was = Fidelity.of(torch.ones_like(plain), None, ever)
    assert not Fidelity.of(plain, None, ever).holds(was, FLOOR)  # a perfect repair
    assert Fidelity.of(fair, None, ever).holds(was, FLOOR)


def test_other_changes_of_these_tokens_are_not_excused() -> None:
    clean, original, yardstick, ever = leaning_tokens()
    axis = DefectAxis.of([(yardstick, original, ever)])
    assert axis is not None
    along = (yardstick @ axis.d)[..., None] * axis.d
    leaning = (along.norm(dim=-1) > 5) & ~ever
    for state in (
        clean - 8 * leaning[..., None] * axis.d,  # beyond ordinary tokens
        yardstick + leaning[..., None] * along,  # further out
        yardstick - along - 3 * axis.d,  # all tokens
    ):
        plain = cosine_similarity(state, yardstick, dim=-1)
        assert torch.equal(axis.fair(state, yardstick, ever, plain), plain)
    turned = torch.where(leaning[..., None], clean.roll(1, dims=-1), clean)
    fair = axis.fair(turned, yardstick, ever, cosine_similarity(turned, yardstick, dim=-1))
    assert fair[leaning].mean() < 0.5
    assert not Fidelity.of(fair, None, ever).holds(Fidelity.of(torch.ones_like(fair), None, ever), FLOOR)


def test_without_a_marked_token_there_is_no_axis() -> None:
    clean, original, yardstick, ever = leaning_tokens()
    assert DefectAxis.of([(yardstick, original, torch.zeros_like(ever))]) is None
    assert DefectAxis.of([(yardstick, original, torch.ones_like(ever))]) is None
    assert DefectAxis.of([(clean, clean, ever)]) is None


def test_a_snapshot_that_is_not_finite_is_refused() -> None:
    assert snapshot().finite
    snapshot().require_finite("broken", "mend it")
    norms = snapshot().norms.clone()
    norms[1, 1, 0, 2] = math.inf
    assert not snapshot(norms=norms).finite
    with pytest.raises(BadInputError, match="its tokens are not finite on 1 of 2 images"):
        snapshot(norms=norms).require_finite("broken", "mend it")
    several = torch.ones(4, 3, 2, 2)
    several[-1, 1:, 1, 0] = several[-1, 2, 0, 1] = math.nan
    with pytest.raises(BadInputError, match="its tokens are not finite on 2 of 3 images"):
        snapshot(norms=several).require_finite("broken", "mend it")


def look(step: int = 1, outlying: int = 5, cls: float | None = 0.9, good: float = 0.9, **changes: Any) -> Evaluation:
    parts: dict[str, Any] = {"marked": 0.9, "holds": True, "spoilt": False, "best": False}
    parts |= {"defective_share": 0.5, "good_p01": 0.5}
    return Evaluation(step=step, outlying=outlying, cls=cls, good=good, **parts | changes)


def test_fewer_outlying_tokens_beat_a_state() -> None:
    best = Best(1, 5, 0.9, 0.9, 0.9, {})
    assert best.is_beaten_by(look(outlying=4, cls=0.1, good=0.1, marked=0.1))
    assert not best.is_beaten_by(look(outlying=6, cls=1.0, good=1.0, marked=1.0))
    assert best.is_beaten_by(look())
    for name in ("cls", "good", "marked"):
        assert best.is_beaten_by(look(**{name: 0.9 - 0.9 * EQUAL_FIDELITY}))
        assert not best.is_beaten_by(look(**{name: 0.9 - 1.1 * EQUAL_FIDELITY}))
    assert best.is_beaten_by(look(cls=None, marked=None))
    assert Best(1, 5, None, 0.9, None, {}).is_beaten_by(look(cls=0.0, marked=0.0))


@pytest.mark.parametrize(
    ("looks", "why", "after"),
    [
        ([look(holds=False, spoilt=True)], "fidelity", SPOILT_LOOKS),
        ([look(outlying=0, best=True)], "clean", CLEAN_LOOKS),
        ([look()], "no_improvement", IDLE_LOOKS),
    ],
)
def test_looks_in_a_row_end_a_repair(looks: list[Evaluation], why: str, after: int) -> None:
    progress = Progress(10)
    for number in range(1, after + 1):
        assert progress.stopped == ""
        progress.judge(replace(looks[0], step=number), {})
    assert (progress.stopped, progress.last_look) == (why, after)


def test_a_look_of_another_kind_starts_the_count_anew() -> None:
    for one, other in (
        (look(holds=False, spoilt=True), look(best=True)),
        (look(outlying=0), look(best=True)),
        (look(), look(best=True)),
    ):
        progress = Progress(10)
        for step in range(IDLE_LOOKS):
            progress.judge(one, {})
            progress.judge(replace(other, outlying=100 - step), {})  # fewer than ever
        assert progress.stopped == ""


def test_looks_that_may_not_stop_still_keep_the_best_state() -> None:
    progress = Progress(10)
    values = {"blocks.0.mlp.down": torch.ones(3)}
    progress.judge(look(7, outlying=2, best=True), values, stops=False)
    for step in range(8, 8 + IDLE_LOOKS):
        progress.judge(look(step, holds=False, spoilt=True), {}, stops=False)
    assert progress.stopped == ""
    assert progress.best == Best(7, 2, 0.9, 0.9, 0.9, values)


def guard_of(planted: Any, count: int = 3, batch_size: int = 2, pixels: int = 24, **rule: Any) -> Guard:
    images = {
        f"picture {i}": planted.image(i, torch.float32, red=RED if i else [])[:, :pixels, :pixels] for i in range(count)
    }
    chosen = DetectionRule(**{"min_tokens": 1} | rule)
    return Guard(planted.backbone, planted.module, planted.directions, chosen, images, batch_size, "cpu")


def pixels_of(guard: Guard) -> Tensor:
    return torch.stack(list(guard.images.values()))


def test_the_guard_compares_with_the_original_plain_and_inpainted(single_writer: Any) -> None:
    guard = guard_of(single_writer)
    guard.remember()
    original = last_tokens(single_writer.backbone, single_writer.module, pixels_of(guard))
    reference = last_tokens(inpainted(single_writer.backbone), single_writer.module, pixels_of(guard))
    before = guard.before
    seen = marked_batch(
        single_writer.backbone, single_writer.module, single_writer.directions, pixels_of(guard), guard.rule
    )
    assert torch.equal(before.outlying, seen.defective)
    assert before.left == 2 * len(RED)
    assert before.ever.nonzero().tolist() == [[image, *spot] for image in (1, 2) for spot in RED]
    torch.testing.assert_close(before.to_original, torch.ones(3, 12, 12))
    expected = cosine_similarity(original, reference, dim=-1)
    torch.testing.assert_close(before.to_inpainted, expected[:, 1:].unflatten(1, (12, 12)))
    torch.testing.assert_close(before.cls_to_inpainted, expected[:, 0])
    torch.testing.assert_close(before.norms[-1], original[:, 1:].norm(dim=-1).unflatten(1, (12, 12)))
    torch.testing.assert_close(before.samples, original[:, 1:].unflatten(1, (12, 12)))
    torch.testing.assert_close(before.cls, original[:, 0])
    assert before.to_inpainted[~before.ever].min() > 0.9 > before.to_inpainted[before.ever].max()


def test_a_look_sees_what_has_become_of_the_module(single_writer: Any) -> None:
    guard = guard_of(single_writer)
    guard.remember()
    was = guard.evaluation(0, guard.look(), FLOOR, None)
    assert (was.outlying, was.best, was.defective_share) == (2 * len(RED), False, pytest.approx(2 / 3))
    single_writer.module.blocks[1].down.weight[:, 0] *= 0  # the writer
    now = guard.look()
    assert now.left == 0
    assert now.fidelity().marked > guard.before.fidelity().marked + 0.1
    assert torch.equal(now.ever, guard.before.ever)
    found = guard.evaluation(5, now, FLOOR, None)
    assert (found.step, found.outlying, found.holds, found.spoilt, found.best) == (5, 0, True, False, True)


def test_marked_tokens_are_found_again_in_a_shifted_view(single_writer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    views: list[Tensor] = []
    monkeypatch.setattr("sinder_cli.repairing.guard.shifted", lambda *of: views.append(shifted(*of)) or views[-1])
    guard = guard_of(single_writer, count=SHIFTED + 3)
    guard.remember()
    assert len(views) == SHIFTED
    was = guard.found_before
    assert was == guard.found_again(guard.before)
    assert was is not None
    images = [image for image, ever in zip(guard.images.values(), guard.before.ever, strict=True) if ever.any()]
    assert len(images) > SHIFTED
    images = images[:SHIFTED]
    expected = []
    for image in images:
        whole, view = (
            last_tokens(guard.backbone, guard.module, image[None, :, cut:, cut:])[0, 1:] for cut in (0, 2 * PATCH)
        )
        expected.append(found_again(whole.unflatten(0, (12, 12)), view.unflatten(0, (10, 10))))
    marks = guard.before.ever[guard.before.ever.flatten(1).any(dim=1)][:SHIFTED, 2:, 2:]
    assert was == Retrieval.of(torch.stack(expected), marks)
    single_writer.module.blocks[1].down.weight[:, 0] *= 0  # the writer
    now = guard.found_again(guard.look())
    assert now is not None
    assert now.marked >= was.marked


@pytest.mark.parametrize(("patches", "shifts"), [(6, False), (7, True)])
def test_a_small_grid_is_not_looked_at_in_a_shifted_view(patches: int, shifts: bool, single_writer: Any) -> None:
    guard = guard_of(single_writer, pixels=PATCH * patches)
    guard.remember()
    assert guard.before.ever.shape == (3, patches, patches)
    assert bool(guard.before.ever.any())
    assert (guard.found_before is not None) is shifts


def test_what_stands_out_by_norm_is_marked_whatever_the_rule_marks(single_writer: Any) -> None:
    guard = guard_of(single_writer, mark="weights")  # no direction is determined
    guard.remember()
    assert guard.before.left == 0
    assert guard.before.standing.sum() == 2 * len(RED)
    assert guard.before.ever.nonzero().tolist() == [[image, *spot] for image in (1, 2) for spot in RED]


def test_a_model_without_cls_has_no_cosine_of_it(single_writer: Any) -> None:
    guard = guard_of(replace(single_writer, backbone=replace(single_writer.backbone, has_cls=False)))
    guard.remember()
    found = guard.before
    assert (found.cls, found.cls_to_inpainted, found.cls_to_original, found.fidelity().cls) == (None,) * 4


def test_a_ruined_model_is_never_the_best(single_writer: Any) -> None:
    guard = guard_of(single_writer)
    guard.remember()
    for block in single_writer.module.blocks:
        for weight in (block.down.weight, block.proj.weight):
            weight *= 0
    found = guard.evaluation(5, guard.look(), FLOOR, None)
    assert (found.outlying, found.holds, found.spoilt, found.best) == (0, False, True, False)
    single_writer.module.blocks[-1].down.bias.fill_(math.nan)
    broken = guard.evaluation(6, guard.look(), 0.0, None)
    assert (broken.holds, broken.spoilt) == (False, True)


def test_a_state_whose_outliers_disturb_more_is_not_spoilt(single_writer: Any) -> None:
    down = single_writer.module.blocks[1].down.weight
    down[:, 0] *= 0.5
    guard = guard_of(single_writer)
    guard.remember()
    down[:, 0] *= 40  # outliers of ten times the norm, but nothing else has changed
    now = guard.look()
    cls = now.fidelity().cls
    assert cls < guard.before.fidelity().cls
    floor = (1 + cls) / 2
    louder = guard.evaluation(5, now, floor, None)
    assert louder.outlying > 0
    assert (louder.holds, louder.spoilt, louder.best) == (False, False, False)
    for block in single_writer.module.blocks:
        block.proj.weight *= 0
    ruined = guard.evaluation(10, guard.look(), floor, None)
    assert ruined.outlying > 0
    assert (ruined.holds, ruined.spoilt) == (False, True)


def test_patches_of_a_few_images_are_kept_for_pictures(single_writer: Any) -> None:
    guard = guard_of(single_writer, count=SAMPLES + 2, batch_size=3)
    guard.remember()
    tokens = last_tokens(single_writer.backbone, single_writer.module, pixels_of(guard)[:SAMPLES])
    torch.testing.assert_close(guard.before.samples, tokens[:, 1:].unflatten(1, (12, 12)))


def test_the_size_of_the_batches_does_not_matter(single_writer: Any) -> None:
    one, three = (guard_of(single_writer, batch_size=size) for size in (1, 3))
    one.remember()
    three.remember()
    torch.testing.assert_close(one.before.to_inpainted, three.before.to_inpainted)
    assert torch.equal(one.before.outlying, three.before.outlying)
