"""U, S, V of a weight against their definition, and the same repaired weights from the SVD of another machine."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor

from sinder_cli.repairing.deltas import NEAR_EQUAL, Deltas, SingularBasis, blank_basis, singular_basis, svd_by_polar

Svd = tuple[Tensor, Tensor, Tensor]
SVD = torch.linalg.svd  # before a test puts another machine's in its place


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(values: list[float], rows: int, columns: int) -> Tensor:
    """A float64 weight of these singular values."""
    U, V = (torch.linalg.qr(drawn(size, len(values), seed=size))[0] for size in (rows, columns))
    return (U * torch.tensor(values, dtype=torch.float64)) @ V.T


def hadamard(*scales: float) -> Tensor:
    """Float32 blocks of orthogonal ±1, scaled: groups of four or more exactly equal singular values, 2 × the scale."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    return torch.block_diag(*(scale * torch.kron(pair, pair) for scale in scales))


GENERIC = {
    "wide": drawn(12, 30).float(),
    "tall": drawn(30, 12).float(),
    "square": drawn(24, 24).float(),
    "gaps of three tolerances": with_values([4 - 3 * NEAR_EQUAL * 4 * k for k in range(6)] + [1, 0.5], 16, 12),
    "small ones apart, and zeros": with_values([1, 0.5, 1e-3, 1e-8, 4e-9], 9, 9),
}
DEGENERATE = {
    "equal": hadamard(3, 2, 2, 0.5, 0.5, 0.5),
    "nearly equal": with_values([3, 2, 2 - 1e-13, 2 - 3e-13, 1, 1 - 2e-14, 0.25], 20, 10),
    "of rank 3": (4 * drawn(20, 3)).round().float() @ (4 * drawn(3, 14, seed=1)).round().float() / 16,
    "equal and of deficient rank": torch.nn.functional.pad(hadamard(1, 1), (0, 7, 0, 5)),
    "square and nearly of rank 4": with_values([3, 2, 1, 0.5, 1e-14, 1e-15, 1e-16, 0], 8, 8),
}
ALL = GENERIC | DEGENERATE


def noisy(weight: Tensor) -> Svd:
    ulps = torch.randint(-1, 2, weight.shape, generator=torch.Generator().manual_seed(7), dtype=weight.dtype)
    U, S, Vt = SVD(weight * (1 + ulps * torch.finfo(torch.float64).eps), full_matrices=False)
    return U, S, Vt


def permuted(weight: Tensor) -> Svd:
    rows, columns = (torch.randperm(size, generator=torch.Generator().manual_seed(3)) for size in weight.shape)
    U, S, Vt = SVD(weight[rows][:, columns], full_matrices=False)
    return U[rows.argsort()], S, Vt[:, columns.argsort()]


def transposed(weight: Tensor) -> Svd:
    U, S, Vt = SVD(weight.T, full_matrices=False)
    return -Vt.T, S, -U.T


def by_qr_iteration(weight: Tensor) -> Svd:
    U, S, Vt = scipy.linalg.svd(weight.numpy(), full_matrices=False, lapack_driver="gesvd")
    return torch.from_numpy(U), torch.from_numpy(S), torch.from_numpy(Vt)


def by_polar(weight: Tensor) -> Svd:
    """As on a CUDA device."""
    return svd_by_polar(weight) or by_qr_iteration(weight)


MACHINES = (by_polar, noisy, permuted, transposed, by_qr_iteration)


def on(machine: Callable[[Tensor], Svd], weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> SingularBasis:
    """The basis that another machine finds."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", lambda given, full_matrices: machine(given))  # noqa: ARG005
        return singular_basis(weight)


def plainly_projected(basis: SingularBasis, gradient: Tensor) -> Tensor:
    """∂L/∂ε as the paper has it, each for itself."""
    rank = len(basis.S)
    return torch.stack([basis.U[:, k] @ gradient @ basis.Vt[k] for k in range(rank)])


def trained(basis: SingularBasis, project: Callable[[SingularBasis, Tensor], Tensor]) -> Tensor:
    """ε after some steps of SGD with momentum along drawn gradients, no small change against the weight."""
    delta, velocity = torch.zeros(2, len(basis.S), dtype=basis.U.dtype)
    for step in range(8):
        gradient = drawn(len(basis.U), basis.Vt.shape[1], seed=50 + step).to(basis.U.dtype)
        velocity.mul_(0.9).add_(project(basis, gradient))
        delta.sub_(velocity, alpha=0.05)
    return delta


def disagreement(mine: SingularBasis, theirs: SingularBasis, delta: Tensor) -> float:
    """How far the changes of a weight are apart, relative to the change."""
    change = mine.change(delta)
    return float((theirs.change(delta) - change).norm() / change.norm().clamp_min(1e-30))


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
@pytest.mark.parametrize("weight", ALL.values(), ids=ALL)
def test_another_machine_makes_the_same_weights_of_a_delta(
    weight: Tensor, machine: Callable[[Tensor], Svd], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = singular_basis(weight), on(machine, weight, monkeypatch)
    delta = trained(mine, SingularBasis.project)
    assert delta.any()
    assert disagreement(mine, theirs, delta) < 1e-5
    before, after = weight + mine.change(delta), weight + theirs.change(delta)
    assert float((after - before).abs().max()) < 1e-5 * float(weight.abs().max())


@pytest.mark.parametrize("spread", [0, 6, 12])
@pytest.mark.parametrize("scale", [1e-30, 1, 1e30])
def test_the_polar_decomposition_gives_an_svd_as_exact_as_lapacks(spread: float, scale: float) -> None:
    """Orders of magnitude between the singular values, and of all of them."""
    U, _, Vt = SVD(drawn(96, 64), full_matrices=False)
    weight = (U * torch.logspace(0, -spread, 64, dtype=torch.float64)) @ Vt * scale
    found, known = svd_by_polar(weight), SVD(weight, full_matrices=False)
    assert found is not None
    identity = torch.eye(64, dtype=torch.float64)
    assert float(((found[0] * found[1]) @ found[2] - weight).norm() / weight.norm()) < 2e-14
    assert float((found[0].T @ found[0] - identity).norm()) < 1e-13
    assert float((found[2] @ found[2].T - identity).norm()) < 1e-13
    assert float((found[1] - known[1]).abs().max() / known[1][0]) < 1e-14


@pytest.mark.parametrize("weight", [torch.zeros(8, 4), drawn(8, 4) * torch.tensor([1, 0, 1, 1])], ids=["0", "a column"])
def test_what_has_no_polar_decomposition_of_full_rank_is_left_to_another_way(weight: Tensor) -> None:
    assert svd_by_polar(weight.double()) is None


@pytest.mark.parametrize("weight", DEGENERATE.values(), ids=DEGENERATE)
def test_it_would_not_with_a_delta_for_each_singular_value(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = singular_basis(weight)
    delta = trained(mine, plainly_projected)
    assert max(disagreement(mine, on(machine, weight, monkeypatch), delta) for machine in MACHINES) > 1e-2


def test_it_would_not_if_the_vectors_were_found_in_float32() -> None:
    weight = drawn(256, 256).float()
    mine, narrow, shaken = singular_basis(weight), SVD(weight, full_matrices=False), noisy(weight.double())
    delta = torch.linspace(1, -1, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    assert disagreement(mine, SingularBasis(*narrow), delta) > 1e-5
    assert disagreement(mine, SingularBasis(*(part.float() for part in shaken)), delta) < 1e-6


def test_threads_do_not_matter() -> None:
    weight = drawn(256, 300).float()
    mine = singular_basis(weight)
    torch.set_num_threads(2)
    assert disagreement(mine, singular_basis(weight), drawn(256).float()) < 1e-6


@pytest.mark.parametrize("weight", GENERIC.values(), ids=GENERIC)
def test_singular_values_that_lie_apart_have_gradients_of_their_own(weight: Tensor) -> None:
    basis, gradient = singular_basis(weight), drawn(*weight.shape, seed=5).to(weight.dtype)
    assert basis.groups == ()
    assert basis.rank == sum(sigma > NEAR_EQUAL * max(basis.S) for sigma in basis.S)
    expected = plainly_projected(basis, gradient)
    torch.testing.assert_close(basis.project(gradient)[: basis.rank], expected[: basis.rank])


@pytest.mark.parametrize("weight", DEGENERATE.values(), ids=DEGENERATE)
def test_a_group_keeps_one_delta_to_the_last_bit(weight: Tensor) -> None:
    basis = singular_basis(weight)
    delta = trained(basis, SingularBasis.project)
    assert basis.groups or basis.rank < len(basis.S)
    for start, stop in basis.groups:
        assert len(delta[start:stop].unique()) == 1
    assert not delta[basis.rank :].any()


def test_a_group_gets_the_mean_of_its_gradients() -> None:
    basis, gradient = singular_basis(DEGENERATE["nearly equal"]), drawn(20, 10, seed=9)
    assert basis.groups == ((1, 4), (4, 6))
    expected = plainly_projected(basis, gradient)
    expected[1:4], expected[4:6], expected[7:] = expected[1:4].mean(), expected[4:6].mean(), 0
    torch.testing.assert_close(basis.project(gradient), expected)
    turn = torch.block_diag(torch.eye(1), torch.linalg.qr(drawn(3, 3))[0].float(), torch.eye(6)).double()
    turned = SingularBasis(basis.U @ turn, basis.S, turn.T @ basis.Vt)
    torch.testing.assert_close(turned.project(gradient), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "groups", "rank"),
    [
        ([3, 2, 1], (), 3),
        ([3, 2, 2], ((1, 3),), 3),
        ([3, 3, 3], ((0, 3),), 3),
        ([1, 1, 0.5, 0.5 - 1e-12, 0.25], ((0, 2), (2, 4)), 5),
        ([1, 0.5, 0.5 - 8e-10, 0.5 - 16e-10], ((1, 4),), 4),  # each near-equal to the next
        ([1, 0.5, 0.5 - 2e-9], (), 3),
        ([1000, 5, 5 - 5e-7], ((1, 3),), 3),  # relative to the largest
        ([2, 1, 1e-12, 0], (), 2),
        ([1, 1.6e-9, 8e-10], (), 1),  # near-equal to what is near-equal to 0
        ([0, 0], (), 0),
        ([4], (), 1),
        ([0], (), 0),
    ],
)
def test_near_equal_and_vanishing_singular_values_are_found(
    values: list[float], groups: tuple[tuple[int, int], ...], rank: int
) -> None:
    S = torch.tensor(values, dtype=torch.float64)
    basis = SingularBasis(torch.eye(len(S)), S, torch.eye(len(S)))
    assert (basis.groups, basis.rank) == (groups, rank)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_a_basis_projects_a_gradient_onto_its_diagonal(shape: tuple[int, int]) -> None:
    weight, gradient = drawn(*shape), drawn(*shape, seed=1)
    basis = singular_basis(weight)
    torch.testing.assert_close(basis.project(gradient), plainly_projected(basis, gradient))
    delta = torch.arange(1.0, 1 + min(shape), dtype=torch.float64)
    torch.testing.assert_close(weight + basis.change(delta), basis.U @ torch.diag(basis.S + delta) @ basis.Vt)


@pytest.mark.parametrize(
    ("stored", "used"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_vectors_are_float32_or_better_values_float64_and_all_contiguous(
    stored: torch.dtype, used: torch.dtype
) -> None:
    basis = singular_basis(torch.randn(7, 4).to(stored))
    assert [part.dtype for part in basis.tensors().values()] == [used, torch.float64, used]
    assert all(part.is_contiguous() for part in basis.tensors().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_a_blank_basis_is_of_the_form_of_a_decomposed_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.ones(shape, dtype=dtype)
    blank, found = blank_basis(weight).tensors(), singular_basis(weight).tensors()
    assert {name: (part.shape, part.dtype) for name, part in blank.items()} == {
        name: (part.shape, part.dtype) for name, part in found.items()
    }


def test_an_offloaded_basis_is_the_same() -> None:
    basis, gradient = singular_basis(GENERIC["wide"]), drawn(12, 30).float()
    away = basis.offloaded()
    assert all(torch.equal(a, b) for a, b in zip(basis.tensors().values(), away.tensors().values(), strict=True))
    assert torch.equal(basis.project(gradient), away.project(gradient))
    assert torch.equal(basis.change(gradient[0, :12]), away.change(gradient[0, :12]))


def test_a_basis_that_another_rank_found_brings_its_groups(single: Any) -> None:
    deltas, theirs = Deltas(single.backbone, single.module), singular_basis(hadamard(*range(1, 9)))
    target = deltas.of_block(2)[1]
    assert target.basis.groups == ()
    sent = iter(theirs.tensors().values())
    deltas.by_block[2] = [target]
    ranks: Any = SimpleNamespace(broadcast=lambda part, _holder: next(sent).to(part.device))
    deltas.agree([[2]], ranks)
    (target,) = deltas.by_block[2]
    assert target.basis.groups == theirs.groups != ()
