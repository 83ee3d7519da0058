"""The leading pair against a full SVD in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sinder_cli.defects.spectrum import (
    KEPT,
    KRYLOV_SIZE,
    MAX_RESTARTS,
    LeadingPair,
    _KrylovSpace,
    angle_between,
    fixed_sign,
    leading_left,
)


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_singular_values(values: list[float], rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix `[rows, columns]` float32 with the given singular values and random singular vectors."""
    r = len(values)
    U = torch.linalg.qr(drawn(rows, rows, seed))[0][:, :r]
    V = torch.linalg.qr(drawn(columns, columns, seed + 1))[0][:, :r]
    return (U * torch.tensor(values, dtype=torch.float64) @ V.T).float()


def oracle(matrix: Tensor) -> tuple[np.ndarray, np.ndarray]:
    U, S, _ = np.linalg.svd(matrix.double().numpy())
    return U[:, 0], S


def degrees(found: Tensor, expected: np.ndarray) -> float:
    """From the sine, which keeps small angles."""
    a, b = found.double().numpy(), expected
    return math.degrees(math.asin(min(1.0, float(np.linalg.norm(a - (a @ b) * b)))))


MATRICES = {
    "random": drawn(60, 60).float(),
    "identity plus random": (torch.eye(150, dtype=torch.float64) + 0.3 / 150**0.5 * drawn(150, 150, 3)).float(),
    "gapped": with_singular_values([50.0, *[1.0] * 79], 80, 80),
    "decaying": with_singular_values([0.8**i for i in range(64)], 64, 64),
    "tall": drawn(90, 20, 1).float(),
    "wide": drawn(20, 90, 2).float(),
    "rank one": with_singular_values([3.0], 30, 30),
    "rank two": with_singular_values([3.0, 2.0], 30, 30),
    "2 by 2": torch.tensor([[3.0, 1.0], [-2.0, 0.5]]),
    "2 by 1": torch.tensor([[3.0], [4.0]]),
    "1 by 2": torch.tensor([[3.0, 4.0]]),
    "1 by 1": torch.tensor([[-2.5]]),
    "float64": drawn(70, 70, 5),
    "huge entries": 1e12 * drawn(40, 40, 6).float(),
    "1 by 2, huge entries": torch.tensor([[3e12, 4e12]]),
    "tiny entries": 1e-12 * drawn(40, 40, 6).float(),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
def test_the_leading_pair_is_that_of_a_full_svd(matrix: Tensor) -> None:
    u, S = oracle(matrix)
    pair = leading_left(matrix)
    second = S[1] if len(S) > 1 else 0.0
    assert pair.direction.norm().item() == pytest.approx(1, abs=1e-6)
    assert degrees(pair.direction, u) < 0.02
    assert pair.sigma == pytest.approx(S[0], rel=1e-5)
    assert pair.second == pytest.approx(second, rel=2e-3, abs=1e-5 * S[0])


def test_a_doubled_leading_value_has_a_gap_of_one() -> None:
    pair = leading_left(with_singular_values([7.0, 7.0, *[1.0] * 60], 62, 62))
    assert pair.gap == pytest.approx(1.0, abs=1e-3)
    assert pair.sigma == pytest.approx(7.0, rel=1e-5)


@pytest.mark.parametrize("ratio", [1.001, 1.01, 1.05, 1.1, 1.5])
def test_the_gap_of_a_nearly_flat_spectrum_is_found(ratio: float) -> None:
    rest = np.linspace(1.0, 0.9, 199).tolist()
    pair = leading_left(with_singular_values([ratio, *rest], 200, 200, seed=7))
    assert pair.gap == pytest.approx(ratio, rel=2e-3)


def test_the_identity_determines_no_direction() -> None:
    assert leading_left(torch.eye(50)).gap == pytest.approx(1.0, abs=1e-5)


def test_a_zero_matrix_determines_no_direction() -> None:
    pair = leading_left(torch.zeros(12, 12))
    assert (pair.sigma, pair.second, pair.gap) == (0.0, 0.0, 1.0)
    assert pair.direction.isfinite().all()


def test_a_rank_one_matrix_has_an_endless_gap() -> None:
    assert leading_left(torch.tensor([[2.0]])).gap == math.inf
    assert leading_left(with_singular_values([3.0], 30, 30)).gap > 1e5


def test_the_largest_entry_of_a_direction_is_positive() -> None:
    for seed in range(10):
        direction = leading_left(drawn(25, 25, seed).float()).direction
        assert direction[direction.abs().argmax()] > 0
    assert fixed_sign(torch.tensor([0.5, -2.0, 1.0])).tolist() == [-0.5, 2.0, -1.0]


def test_a_matrix_and_its_negative_have_the_same_direction() -> None:
    matrix = drawn(40, 40).float()
    torch.testing.assert_close(leading_left(matrix).direction, leading_left(-matrix).direction, atol=1e-4, rtol=0)


def test_a_start_orthogonal_to_the_answer_still_finds_it() -> None:
    matrix = with_singular_values([5.0, 3.0, *[1.0] * 78], 80, 80)
    U, _, _ = np.linalg.svd(matrix.double().numpy())
    misleading = torch.from_numpy(U[:, 1].copy())  # the second singular vector, exactly
    assert degrees(leading_left(matrix, misleading).direction, U[:, 0]) < 0.02


def test_a_start_at_another_singular_vector_still_finds_the_first() -> None:
    matrix = torch.diag(torch.linspace(1, 5, 60))
    pair = leading_left(matrix, torch.eye(60)[30])  # a Krylov space of one dimension
    assert pair.sigma == pytest.approx(5.0, rel=1e-5)
    assert degrees(pair.direction, np.eye(60)[59]) < 0.02


def test_a_warm_start_changes_nothing_but_the_way() -> None:
    matrix = drawn(100, 100, 9).float()
    cold = leading_left(matrix)
    warm = leading_left(matrix, cold.direction)
    assert angle_between(cold.direction, warm.direction) < 0.02
    assert warm.sigma == pytest.approx(cold.sigma, rel=1e-5)


@pytest.mark.parametrize("matrix", [drawn(100, 100, 10).float(), torch.eye(50)], ids=["random", "soon exhausted"])
def test_the_same_matrix_gives_the_same_bytes_twice(matrix: Tensor) -> None:
    first = leading_left(matrix)
    torch.manual_seed(7)  # nothing may hang on the global generator, or move it
    state = torch.get_rng_state()
    second = leading_left(matrix)
    assert first.direction.numpy().tobytes() == second.direction.numpy().tobytes()
    assert (first.sigma, first.second) == (second.sigma, second.second)
    assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_small_matrices_of_every_shape_agree_with_a_full_svd(rows: int, columns: int, seed: int) -> None:
    matrix = drawn(rows, columns, seed)
    _, S = oracle(matrix)
    pair = leading_left(matrix)
    assert pair.sigma == pytest.approx(S[0], rel=1e-6)
    assert pair.second == pytest.approx(S[1] if len(S) > 1 else 0.0, rel=2e-3, abs=1e-6 * S[0])


@pytest.mark.parametrize("degrees_apart", [1e-6, 1e-5, 1e-3, 1.0, 45.0, 89.0, 90.0])
def test_an_angle_is_accurate_however_small(degrees_apart: float) -> None:
    t = math.radians(degrees_apart)
    a = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    b = torch.tensor([math.cos(t), math.sin(t), 0.0], dtype=torch.float64)
    assert angle_between(3 * a, 5 * b) == pytest.approx(degrees_apart, rel=1e-6)


def test_an_angle_is_between_lines() -> None:
    a = torch.tensor([1.0, 2.0, 3.0])
    assert angle_between(a, -2 * a) == pytest.approx(0, abs=1e-6)


def products(matrix: Tensor, monkeypatch: pytest.MonkeyPatch, start: Tensor | None = None) -> int:
    """How many vectors a search multiplies with M and with Mᵀ."""
    extended = []
    with monkeypatch.context() as patched:
        extend = _KrylovSpace._extend
        patched.setattr(_KrylovSpace, "_extend", lambda space, q: extended.append(q) or extend(space, q))
        leading_left(matrix, start)
    return len(extended)


@pytest.mark.parametrize("name", ["gapped", "decaying", "rank one", "rank two", "huge entries", "tiny entries", "wide"])
def test_a_search_ends_once_the_pair_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    easy = name not in ("huge entries", "tiny entries", "wide")
    for factor in (1e-4, 1.0, 1e4):
        assert products(factor * MATRICES[name], monkeypatch) <= (2 if easy else 3) * KEPT


def test_a_matrix_without_a_direction_ends_the_search_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for matrix in (torch.zeros(100, 100), torch.eye(100), 1e-9 * torch.eye(100)):
        assert products(matrix, monkeypatch) == 2 * KEPT


def test_a_warm_start_shortens_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = drawn(300, 300, 9).float()
    start = leading_left(matrix).direction
    cold, warm, long = (products(matrix, monkeypatch, guess) for guess in (None, start, 1e4 * start))
    assert warm <= cold - 2 * KEPT
    assert long == warm


def test_a_search_that_finds_no_gap_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.diag(torch.linspace(1, 1 - 1e-6, 400, dtype=torch.float64))
    most = KRYLOV_SIZE + (MAX_RESTARTS - 1) * (KRYLOV_SIZE - KEPT)
    assert most <= products(flat, monkeypatch) <= 2 * most


def test_the_gap_is_the_quotient_of_the_two_values() -> None:
    assert LeadingPair(torch.ones(1), 6.0, 4.0).gap == 1.5
    assert LeadingPair(torch.ones(1), 0.6, 0.4).gap == pytest.approx(1.5)
    assert LeadingPair(torch.ones(1), 0.5, 0.0).gap == math.inf
