"""Every stage of a hand-made backbone against explicit products and a full SVD in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from scipy.stats import norm as gaussian
from torch import Tensor

from sinder_cli import (
    AttentionMap,
    Backbone,
    BlockMap,
    LayerMap,
    MemoryTensors,
    NormMap,
    PlainMlpMap,
    PositionMap,
    WeightRef,
    Weights,
)
from sinder_cli.defects import prediction
from sinder_cli.defects.prediction import BlockSpectrum, Prediction, check_positions, predict, stage_matrices
from sinder_cli.defects.settings import STAGES, Stage
from sinder_cli.defects.spectrum import LeadingPair
from sinder_cli.errors import BadInputError
from sinder_cli.events import Advanced, Finished, Started, silent

N, INNER, HIDDEN, DEPTH = 24, 16, 40, 5
ROLES = {
    "norm1": (N,), "value": (INNER, N), "output": (N, INNER), "scale1": (N,),
    "norm2": (N,), "up": (HIDDEN, N), "up_bias": (HIDDEN,), "down": (N, HIDDEN), "scale2": (N,),
}  # fmt: skip


def unused(*_: Any) -> Any:
    raise AssertionError("the weights alone are asked")


def block_map(index: int, parallel: bool) -> BlockMap:
    refs = {role: WeightRef(name=f"{index}.{role}") for role in ROLES}
    return BlockMap(
        attention=AttentionMap(
            norm=NormMap(weight=refs["norm1"]), value=refs["value"], output=refs["output"], scale=refs["scale1"]
        ),
        mlp=PlainMlpMap(
            norm=NormMap(kind="rmsnorm", weight=refs["norm2"]),
            activation="gelu",
            up=refs["up"],
            up_bias=refs["up_bias"],
            down=refs["down"],
            scale=refs["scale2"],
        ),
        parallel=parallel,
    )


def drawn_tensors(depth: int = DEPTH, gain: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index in range(depth):
        for role, shape in ROLES.items():
            width = shape[-1] if len(shape) == 2 else 1.0
            tensors[f"{index}.{role}"] = gain * torch.randn(shape, generator=generator) * width**-0.5
    return tensors


def made_backbone(
    tensors: dict[str, Tensor], depth: int = DEPTH, parallel: bool = False, position: PositionMap | None = None
) -> Backbone:
    return Backbone(
        name="by hand",
        layers=LayerMap(width=N, blocks=tuple(block_map(i, parallel) for i in range(depth)), position=position),
        weights=Weights.of(MemoryTensors("memory", tensors)),
        patch_size=2,
        prefix_tokens=1,
        has_cls=True,
        image_size=8,
        build=unused,
        embed=unused,
        run_block=unused,
        finish=unused,
    )


def explicit_stages(tensors: dict[str, Tensor], parallel: bool, depth: int = DEPTH) -> dict[str, list[np.ndarray]]:
    """Every matrix of every block, written out in float64."""
    eye, centring = np.eye(N), np.eye(N) - np.ones((N, N)) / N
    G = eye
    stages: dict[str, list[np.ndarray]] = {stage: [] for stage in STAGES}
    for index in range(depth):
        t = {role: tensors[f"{index}.{role}"].double().numpy() for role in ROLES}
        A = np.diag(t["scale1"]) @ t["output"] @ t["value"] @ np.diag(t["norm1"]) @ centring
        s2 = (t["up"] ** 2).sum(axis=1)
        b = t["up_bias"]
        d = ndtr(b / np.sqrt(1 + s2)) + b / (1 + s2) * gaussian.pdf(b, scale=np.sqrt(1 + s2))
        C = np.diag(t["scale2"]) @ t["down"] @ np.diag(d) @ t["up"] @ np.diag(t["norm2"])
        E = eye + A + C if parallel else (eye + C) @ (eye + A)
        G = E @ G
        for stage, matrix in zip(STAGES, (eye + A, eye + C, E, G), strict=True):
            stages[stage].append(matrix)
    return stages


def sine(found: Tensor, expected: np.ndarray) -> float:
    a = found.double().numpy()
    return float(np.linalg.norm(a - (a @ expected) * expected))


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_every_stage_is_that_of_the_explicit_product(parallel: bool) -> None:
    tensors = drawn_tensors()
    prediction = predict(made_backbone(tensors, parallel=parallel))
    expected = explicit_stages(tensors, parallel)
    assert tuple(prediction.stages) == STAGES
    for stage in STAGES:
        assert [row.block for row in prediction.stages[stage]] == list(range(DEPTH))
        previous: np.ndarray | None = None
        for row, matrix in zip(prediction.stages[stage], expected[stage], strict=True):
            U, S, _ = np.linalg.svd(matrix)
            assert sine(row.pair.direction, U[:, 0]) < 1e-3
            assert row.sigma == pytest.approx(S[0], rel=1e-4)
            assert row.pair.gap == pytest.approx(S[0] / S[1], rel=3e-3)
            if previous is None:
                assert row.angle_to_previous is None
            else:
                degrees = math.degrees(math.acos(min(1.0, abs(float(previous @ U[:, 0])))))
                assert row.angle_to_previous == pytest.approx(degrees, abs=0.1)
            previous = U[:, 0]


def test_directions_are_unit_rows_in_float32() -> None:
    prediction = predict(made_backbone(drawn_tensors()))
    for stage in STAGES:
        nu = prediction.directions(stage)
        assert (nu.shape, nu.dtype) == ((DEPTH, N), torch.float32)
        torch.testing.assert_close(nu.norm(dim=1), torch.ones(DEPTH))
        assert prediction.gaps(stage) == [row.pair.gap for row in prediction.stages[stage]]


@pytest.mark.parametrize(
    "stages", [("attention",), ("mlp",), ("block",), ("cumulative",), ("attention", "cumulative"), ("mlp", "block")]
)
def test_selecting_stages_changes_none_of_their_values(stages: tuple[Stage, ...]) -> None:
    backbone = made_backbone(drawn_tensors())
    everything, some = predict(backbone), predict(backbone, stages)
    assert set(some.stages) == set(stages)
    for stage in stages:
        assert torch.equal(some.directions(stage), everything.directions(stage))
        assert some.gaps(stage) == everything.gaps(stage)
        assert [row.sigma for row in some.stages[stage]] == [row.sigma for row in everything.stages[stage]]


@pytest.mark.parametrize(
    ("stage", "unneeded"), [("attention", ["mlp_part", "block_part"]), ("mlp", ["block_part"]), ("block", [])]
)
def test_nothing_is_computed_that_no_stage_needs(
    stage: Stage, unneeded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in unneeded:
        monkeypatch.setattr(prediction, name, unused)
    (found,) = {tuple(matrices) for _, matrices in stage_matrices(made_backbone(drawn_tensors()), [stage], silent)}
    assert found == (stage,)


def test_the_cumulative_value_is_that_of_the_product_beyond_float32() -> None:
    depth = 60
    tensors = drawn_tensors(depth, gain=2.0)
    expected = np.linalg.svd(explicit_stages(tensors, False, depth)["cumulative"][-1])[1][0]
    assert expected > torch.finfo(torch.float32).max
    found = predict(made_backbone(tensors, depth), ["cumulative"]).stages["cumulative"][-1].sigma
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("factor", [0.0, 0.01, 10.0, 1e3, 1e7])
def test_a_product_of_many_gains_neither_vanishes_nor_overflows(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = 60
    gains = torch.diag(torch.tensor([2.0, *[1.0] * (N - 1)]))
    monkeypatch.setattr(prediction, "block_part", lambda *_: factor * gains)
    last = predict(made_backbone(drawn_tensors(depth), depth), ["cumulative"]).stages["cumulative"][-1]
    if factor == 1e7:  # more than a float holds
        assert math.isfinite(last.sigma)
    else:
        assert last.sigma == pytest.approx((2 * factor) ** depth, rel=1e-3, abs=0)
    assert last.pair.gap == 1.0 if factor == 0 else last.pair.gap > 1e9


def test_a_norm_that_overflows_does_not_make_a_product_zero() -> None:
    tensors = drawn_tensors(2)
    tensors["1.scale1"] *= 1e25  # finite, but not its square
    expected = np.linalg.svd(explicit_stages(tensors, False, 2)["cumulative"][-1])[1][0]
    assert predict(made_backbone(tensors, 2), ["cumulative"]).stages["cumulative"][-1].sigma == pytest.approx(expected)


def test_two_predictions_are_bit_identical() -> None:
    backbone = made_backbone(drawn_tensors())
    assert torch.equal(predict(backbone).directions(), predict(backbone).directions())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_naming_the_block(value: float) -> None:
    tensors = drawn_tensors()
    tensors["2.down"][3, 4] = value
    with pytest.raises(BadInputError, match="block 2 is not finite") as caught:
        predict(made_backbone(tensors))
    assert caught.value.exit_code == 65


def test_weights_whose_product_overflows_are_refused_naming_the_block() -> None:
    tensors = drawn_tensors()
    tensors["1.down"] *= 1e30
    tensors["1.up"] *= 1e20
    with pytest.raises(BadInputError, match="block 1 is not finite"):
        predict(made_backbone(tensors))


def test_progress_is_told_block_by_block() -> None:
    events: list[object] = []
    predict(made_backbone(drawn_tensors()), ["attention"], events.append)
    phase = "predicting"
    assert events == [Started(phase, DEPTH, "blocks"), *[Advanced(phase)] * DEPTH, Finished(phase)]


def spectra(*gap_and_turn: tuple[float, float | None]) -> Prediction:
    rows = [
        BlockSpectrum(index, LeadingPair(torch.eye(N)[0], gap, 1.0), gap, turn)
        for index, (gap, turn) in enumerate(gap_and_turn)
    ]
    return Prediction("by hand", N, {"cumulative": tuple(rows)}, None)


def test_a_direction_settles_at_the_last_block_that_turned_it() -> None:
    assert spectra((2.0, None), (2.0, 1.0), (2.0, 62.0)).settled_from() is None  # the last block turns by itself
    assert spectra((2.0, None), (2.0, 40.0), (2.0, 30.0), (2.0, 5.0), (2.0, 1.0)).settled_from() == 2


def test_a_direction_that_never_turns_is_settled_at_once() -> None:
    assert spectra((2.0, None), (2.0, 3.0), (2.0, 3.0)).settled_from() == 0


def test_a_direction_cannot_settle_where_it_is_not_determined() -> None:
    assert spectra((2.0, None), (1.05, 1.0), (2.0, 1.0), (2.0, 1.0)).settled_from() == 2
    assert spectra((2.0, None), (1.05, 1.0), (1.1, 1.0), (2.0, 1.0)).settled_from() == 2  # determined from 1.1 on


def test_a_direction_undetermined_in_the_last_block_never_settles() -> None:
    assert spectra((2.0, None), (2.0, 1.0), (1.09, 1.0)).settled_from() is None


def position_backbone(rows: Tensor, prefix: int = 1) -> Backbone:
    position = PositionMap(weight=WeightRef(name="position"), prefix=prefix)
    return made_backbone({"position": rows}, position=position)


def random_table(patches: int = 400) -> Tensor:
    return torch.randn(1, 1 + patches, N, generator=torch.Generator().manual_seed(1))


def test_a_random_position_embedding_has_no_outlying_patch() -> None:
    check = check_positions(position_backbone(random_table()))
    assert check is not None
    assert (check.patches, check.outliers) == (400, ())


def test_a_planted_outlying_patch_is_found() -> None:
    table = random_table()
    table[0, 1 + 137] = 0.1
    table[0, 1 + 137, 5] = -90.0
    check = check_positions(position_backbone(table))
    assert check is not None
    (outlier,) = check.outliers
    energy = 90.0**2 + (N - 1) * 0.01
    assert (outlier.patch, outlier.dimension) == (137, 5)
    assert outlier.norm == pytest.approx(math.sqrt(energy))
    assert outlier.share == pytest.approx(90.0**2 / energy)
    assert (check.max_norm, check.largest_share) == (outlier.norm, outlier.share)


def test_an_outlying_patch_is_beyond_robust_deviations_and_a_factor() -> None:
    for spread in (0.02, 0.5):  # where the factor decides, and where the deviations do
        table = random_table(101)
        rows = table[0, 1:] / table[0, 1:].norm(dim=1, keepdim=True)
        rows *= (spread * torch.randn(101, 1, generator=torch.Generator().manual_seed(3))).exp()
        for at, share in ((7, 0.9), (8, 0.99), (9, 1.01), (10, 1.1)):
            rows[at] *= share * looped_limit(rows) / rows[at].norm()
        table[0, 1:] = rows
        check = check_positions(position_backbone(table))
        assert check is not None
        expected = [at for at in range(101) if float(rows[at].norm()) > looped_limit(rows)]
        assert [outlier.patch for outlier in check.outliers] == expected
        assert {9, 10} <= set(expected)
        assert not {7, 8} & set(expected)


def looped_limit(rows: Tensor) -> float:
    norms = sorted(float(row.norm()) for row in rows)
    median = norms[(len(norms) - 1) // 2]
    away = sorted(abs(norm - median) for norm in norms)
    return max(median + 6 * 1.4826 * away[(len(norms) - 1) // 2], 1.5 * median)


def test_an_empty_row_of_a_half_precision_table_has_no_share() -> None:
    table = random_table()
    table[0, 1 + 3] = 0.0
    table[0, 1 + 137, 5] = -500.0  # its square is more than float16 holds
    check = check_positions(position_backbone(table.half()))
    assert check is not None
    assert [outlier.patch for outlier in check.outliers] == [137]
    assert check.outliers[0].norm == pytest.approx(500, rel=1e-3)
    assert 0.99 < check.largest_share <= 1


def test_prefix_rows_of_a_position_embedding_are_no_patches() -> None:
    table = random_table()
    table[0, 0] = 1000.0  # cls
    check = check_positions(position_backbone(table))
    assert check is not None
    assert check.outliers == ()


def test_nearly_equal_norms_make_no_outlier_of_the_largest() -> None:
    table = torch.ones(1, 401, N)
    table[0, 1:] *= 1 + 1e-4 * torch.randn(400, 1, generator=torch.Generator().manual_seed(2))
    table[0, 77] *= 1.2  # many robust deviations, yet only a fifth above
    check = check_positions(position_backbone(table))
    assert check is not None
    assert check.outliers == ()


def test_a_backbone_without_a_position_table_has_no_check() -> None:
    assert check_positions(made_backbone({})) is None
