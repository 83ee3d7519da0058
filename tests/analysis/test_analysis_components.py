"""Principal components against the SVD of all tokens at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sinder_cli.analysis.directions import Basis, Moments


def drawn(count: int, width: int, seed: int = 0) -> Tensor:
    """Tokens far from the origin, each direction of another spread."""
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return (
        torch.randn(count, width, generator=generator, dtype=torch.float64) * 1.5 ** -torch.arange(width)
    ) @ turned + 10


def basis_of(*parts: Tensor) -> Basis:
    moments = Moments(parts[0].shape[1])
    for part in parts:
        moments.add(part)
    return moments.basis()


def signed(vectors: Tensor) -> Tensor:
    """Columns with their entry of largest magnitude positive, by a loop."""
    columns = []
    for column in vectors.T:
        largest = max(column.tolist(), key=abs)
        columns.append(column if largest > 0 else -column)
    return torch.stack(columns, dim=1)


def test_components_are_those_of_the_svd_of_all_centred_tokens() -> None:
    tokens = drawn(500, 24)
    basis = basis_of(*tokens.split(70))
    centred = tokens - tokens.mean(dim=0)
    expected = signed(torch.linalg.svd(centred, full_matrices=False).Vh[:3].T)
    torch.testing.assert_close(basis.mean, tokens.mean(dim=0))
    torch.testing.assert_close(basis.components, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(basis.project(tokens), (centred @ expected).float())


def test_components_span_what_torchs_own_pca_finds() -> None:
    tokens = drawn(300, 16, seed=2)
    torch.manual_seed(0)
    V = torch.pca_lowrank(tokens, q=8, center=True, niter=20)[2][:, :3]
    cosines = (basis_of(tokens).components * V).sum(dim=0).abs()
    torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64))


def test_projections_are_centred_uncorrelated_and_largest_first() -> None:
    tokens = drawn(500, 24)
    projected = basis_of(tokens).project(tokens).double()
    covariance = projected.T @ projected / len(projected)
    assert projected.mean(dim=0).abs().max() < 1e-5
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-5
    assert covariance.diag().tolist() == sorted(covariance.diag().tolist(), reverse=True)


def test_the_largest_entry_of_every_component_is_positive() -> None:
    for seed in range(5):
        components = basis_of(drawn(100, 12, seed)).components
        assert torch.equal(signed(components), components)


@pytest.mark.parametrize("width", [1, 2])
def test_fewer_than_three_dimensions_are_filled_up_with_zeros(width: int) -> None:
    tokens = drawn(50, width)
    basis = basis_of(tokens)
    assert basis.components.shape == (width, 3)
    assert not basis.components[:, width:].any()
    assert basis.project(tokens)[:, :width].abs().sum(dim=0).gt(0).all()
    assert not basis.project(tokens)[:, width:].any()


def test_tokens_that_are_not_finite_are_left_out() -> None:
    tokens = drawn(60, 8)
    spoilt = tokens.clone()
    spoilt[5, 3], spoilt[17, 0] = math.nan, math.inf
    kept = torch.cat([tokens[:5], tokens[6:17], tokens[18:]])
    one, other = basis_of(spoilt), basis_of(kept)
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(one.components, other.components)


def test_nothing_but_nan_gives_a_basis_without_one() -> None:
    basis = basis_of(torch.full((4, 8), math.nan))
    assert basis.mean.isfinite().all()
    assert basis.components.isfinite().all()


def test_a_grid_is_projected_place_by_place() -> None:
    tokens = drawn(12, 8)
    basis = basis_of(tokens)
    torch.testing.assert_close(basis.project(tokens.reshape(3, 4, 8).float()), basis.project(tokens).reshape(3, 4, 3))


def test_float64_sums_keep_a_small_spread_far_from_the_origin() -> None:
    tokens = drawn(400, 6) * 1e-3 + 1000
    expected = torch.linalg.svd(tokens - tokens.mean(dim=0), full_matrices=False).Vh[0]
    assert abs(float(basis_of(*tokens.split(13)).components[:, 0] @ expected)) == pytest.approx(1, abs=1e-6)


def test_merged_moments_are_those_of_all_tokens() -> None:
    tokens = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    whole, first, second = (Moments(5) for _ in range(3))
    whole.add(tokens)
    first.add(tokens[:20])
    second.add(tokens[20:])
    first.merge(second)
    assert first.count == whole.count == 60
    torch.testing.assert_close(first.basis().components, whole.basis().components)
