"""Streamed distributions against numpy on all values at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sinder_cli.analysis.histogram import ANGLE_SCALE, COSINE_SCALE, NORM_SCALE, Histogram, LinearScale, Scale

QUANTILES = {"p01": 0.01, "median": 0.5, "p99": 0.99}


def histogram(values: object, scale: Scale = NORM_SCALE) -> Histogram:
    found = Histogram(scale)
    found.add(torch.as_tensor(values))
    return found


def drawn(count: int, spread: float, seed: int = 0) -> Tensor:
    return (
        (spread * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).exp().float()
    )


def close_to_numpy(found: Histogram, values: np.ndarray, relative: float = 0.0, absolute: float = 0.0) -> None:
    summed = found.distribution()
    assert summed is not None
    wide = values.astype(np.float64)
    assert summed.count == found.count == len(values)
    assert (summed.min, summed.max) == (wide.min(), wide.max())
    assert summed.mean == pytest.approx(wide.mean(), rel=1e-12, abs=1e-300)
    for name, share in QUANTILES.items():
        expected = float(np.quantile(wide, share))
        assert getattr(summed, name) == pytest.approx(expected, rel=relative, abs=absolute), name


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0], ids=["narrow", "ordinary", "over many magnitudes"])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 5000])
def test_norm_quantiles_are_numpys_to_a_fifth_of_a_percent(count: int, spread: float) -> None:
    values = drawn(count, spread, seed=count)
    close_to_numpy(histogram(values), values.numpy(), relative=0.002)


@pytest.mark.parametrize("count", [1, 7, 2000])
def test_angle_quantiles_are_numpys_to_a_twentieth_of_a_degree(count: int) -> None:
    values = 90 * torch.rand(count, generator=torch.Generator().manual_seed(1))
    close_to_numpy(histogram(values, ANGLE_SCALE), values.numpy(), absolute=0.05)


def test_quantiles_of_cosines_are_numpys_to_half_a_thousandth() -> None:
    values = 2 * torch.rand(2000, generator=torch.Generator().manual_seed(1)) - 1
    close_to_numpy(histogram(values, COSINE_SCALE), values.numpy(), absolute=0.0005)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(2.0**-23, 2.0**39, width=32), min_size=1, max_size=60))
def test_numbers_within_the_octaves_are_summed_up_as_by_numpy(values: list[float]) -> None:
    close_to_numpy(histogram(values), np.asarray(values), relative=0.002)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 90, width=32), min_size=1, max_size=60))
def test_any_angles_are_summed_up_as_numpy_does(values: list[float]) -> None:
    close_to_numpy(histogram(values, ANGLE_SCALE), np.asarray(values), absolute=0.05001)


def test_a_quantile_between_two_far_values_lies_between_them() -> None:
    summed = histogram([1.0, 1000.0]).distribution()
    assert summed is not None
    assert summed.median == pytest.approx(500.5, rel=0.002)


def test_extremes_are_exact_and_not_those_of_bins() -> None:
    values = torch.tensor([1.23456789, 7.6543219, 3.0])
    summed = histogram(values).distribution()
    assert summed is not None
    assert (summed.min, summed.max) == (values[0].item(), values[1].item())


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-9, 1.0, 123.456, 1e13, 3e38])
def test_one_value_is_its_own_mean_extreme_and_quantile(value: float) -> None:
    exact = torch.tensor(value).item()
    summed = histogram([value] * 5).distribution()
    assert summed is not None
    assert summed.count == 5
    assert [summed.mean, summed.min, summed.p01, summed.median, summed.p99, summed.max] == pytest.approx([exact] * 6)


def test_what_lies_beyond_the_octaves_counts_in_the_outer_bins() -> None:
    values = [0.0, 1e-42, 1e-9, 1.0, 2.0, 3.0, 1e13, 1e30]
    found = histogram(values)
    assert int(found.counts[0]) == 3
    assert int(found.counts[-1]) == 2
    assert found.count == len(values)
    summed = found.distribution()
    assert summed is not None
    assert (summed.min, summed.max) == (0.0, torch.tensor(1e30).item())
    assert summed.mean == pytest.approx(np.mean(values))
    assert summed.median == pytest.approx(1.5, rel=0.002)
    assert 0 <= summed.p01 < 2.0**-25
    assert 1e13 < summed.p99 <= 1e30


def test_the_values_of_a_bin_are_taken_to_lie_evenly() -> None:
    summed = histogram(torch.linspace(0, 10, 101), LinearScale(0.0, 10.0, 1)).distribution()
    assert summed is not None
    assert summed.median == pytest.approx(5.0)


def test_nan_and_infinities_are_counted_apart_and_touch_nothing_else() -> None:
    clean, spoilt = histogram([1.0, 2.0, 5.0]), histogram([math.nan, 1.0, math.inf, 2.0, -math.inf, 5.0])
    assert int(spoilt.nonfinite) == 3
    assert int(clean.nonfinite) == 0
    assert spoilt.distribution() == clean.distribution()
    assert torch.equal(spoilt.counts, clean.counts)


def test_nothing_finite_is_no_distribution_and_no_curve() -> None:
    for found in (Histogram(NORM_SCALE), histogram([]), histogram([math.nan, math.inf])):
        assert found.count == 0
        assert found.distribution() is None
        assert found.curve(10) is None
        assert found.curve(10, logarithmic=True) is None


@pytest.mark.parametrize("parts", [2, 7, 300])
def test_a_stream_in_parts_is_the_same_as_a_whole(parts: int) -> None:
    values = drawn(3000, 2.0)
    values[::97] = math.nan
    whole, streamed = histogram(values), Histogram(NORM_SCALE)
    for part in values.reshape(10, 300).flatten().chunk(parts):
        streamed.add(part.reshape(1, -1, 1))
    streamed.add(values[:0])
    assert torch.equal(streamed.counts, whole.counts)
    assert torch.equal(streamed.nonfinite, whole.nonfinite)
    one, other = streamed.distribution(), whole.distribution()
    assert one is not None
    assert other is not None
    assert one.model_dump(exclude={"mean"}) == other.model_dump(exclude={"mean"})
    assert one.mean == pytest.approx(other.mean, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_values_of_any_precision_are_taken_as_float32(dtype: torch.dtype) -> None:
    values = drawn(500, 1.0).to(dtype)
    close_to_numpy(histogram(values), values.float().numpy(), relative=0.002)


@pytest.mark.parametrize("scale", [NORM_SCALE, ANGLE_SCALE, COSINE_SCALE, LinearScale(2.0, 3.0, 7)])
def test_every_value_lies_between_the_edges_of_its_bin(scale: Scale) -> None:
    edges = scale.edges()
    assert edges.shape == (scale.bins + 1,)
    assert bool((edges.diff() > 0).all())
    inside = (edges[:-1] + edges[1:]) / 2
    assert torch.equal(scale.bin_of(inside), torch.arange(scale.bins))
    assert torch.equal(scale.bin_of(torch.stack([edges[0] - 1, edges[-1] + 1])), torch.tensor([0, scale.bins - 1]))


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("points", [1, 7, 60])
def test_a_curve_is_numpys_histogram_with_its_peak_at_one(points: int, logarithmic: bool) -> None:
    values = drawn(20_000, 0.6)
    curve = histogram(values).curve(points, logarithmic)
    assert curve is not None
    axis = np.log(values.double().numpy()) if logarithmic else values.double().numpy()
    counts, edges = np.histogram(axis, bins=points)
    middle = (edges[:-1] + edges[1:]) / 2
    np.testing.assert_allclose(curve.at, np.exp(middle) if logarithmic else middle, rtol=1e-6)
    np.testing.assert_allclose(curve.density, counts / counts.max(), atol=0.03)
    assert max(curve.density) == 1.0


@pytest.mark.parametrize(("pair", "scale"), [((1.0, 2.0), NORM_SCALE), ((1.0, 3.0), LinearScale(0.0, 4.0, 4))])
def test_a_curve_loses_no_value(pair: tuple[float, float], scale: Scale) -> None:
    # each at the beginning of its bin, the upper one with nothing but the end of the axis above it
    curve = histogram(pair, scale).curve(2)
    assert curve is not None
    assert curve.density == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-30, 42.0, 1e20])
def test_the_curve_of_one_value_is_one_point(value: float, logarithmic: bool) -> None:
    curve = histogram([value, value]).curve(60, logarithmic)
    assert curve is not None
    assert curve.at == pytest.approx((torch.tensor(value).item(),))
    assert curve.density == (1.0,)


def test_zeros_lie_at_the_beginning_of_a_logarithmic_curve() -> None:
    curve = histogram([0.0] * 10 + [1.0] * 5).curve(48, logarithmic=True)
    assert curve is not None
    assert curve.at[0] == pytest.approx(2.0**-24, rel=0.3)
    assert curve.density == pytest.approx((1.0, *[0.0] * 46, 0.5))


@pytest.mark.parametrize("scale", [NORM_SCALE, ANGLE_SCALE])
def test_merged_histograms_are_the_histogram_of_all_values(scale: Scale) -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 90
    values[::100] = torch.nan
    whole, first, second = (Histogram(scale) for _ in range(3))
    whole.add(values)
    first.add(values[:300])
    second.add(values[300:])
    first.merge(second)
    first.merge(Histogram(scale))
    assert torch.equal(first.counts, whole.counts)
    assert (first.low, first.high, first.nonfinite) == (whole.low, whole.high, whole.nonfinite)
    assert first.total.item() == pytest.approx(whole.total.item(), rel=1e-12)
    assert first.curve(40) == whole.curve(40)
