"""Paired bootstrap intervals against a loop over resamples, and what is called better."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sinder_cli.evaluation.contract import Figure, mean_figure
from sinder_cli.evaluation.statistics import compared, noise_of, resamples


def test_differences_and_intervals_are_those_of_a_loop() -> None:
    draw = np.random.default_rng(0)
    before, after = draw.random(40), draw.random(40) + 0.2
    counts = torch.cat(list(resamples(40, 500, seed=3)))
    assert counts.sum(dim=1).tolist() == [40.0] * 500
    figures = {"original": mean_figure("f", torch.tensor(before)), "repaired": mean_figure("f", torch.tensor(after))}
    found = compared(figures, 40, 500, 3)
    assert found["original"].value == pytest.approx(100 * before.mean())
    difference = found["repaired"].to_original
    assert difference is not None
    assert difference.value == pytest.approx(100 * (after - before).mean())
    means = []
    for row in counts.numpy():
        drawn = [index for index, count in enumerate(row) for _ in range(int(count))]
        means.append(100 * (after[drawn].mean() - before[drawn].mean()))
    assert difference.low == pytest.approx(np.quantile(means, 0.025))
    assert difference.high == pytest.approx(np.quantile(means, 0.975))
    assert difference.standing == "better"


def test_pairs_matter() -> None:
    """Images differ more than the sides do: only paired resamples see the small and constant gain."""
    values = torch.rand(30, generator=torch.Generator().manual_seed(0)).double()
    figures = {"original": mean_figure("f", values), "repaired": mean_figure("f", values + 0.01)}
    difference = compared(figures, 30, 300, 0)["repaired"].to_original
    assert difference is not None
    assert (difference.low, difference.high) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    ("better", "gain", "noise", "standing"),
    [
        ("higher", 0.01, 0.0, "better"),
        ("higher", -0.01, 0.0, "worse"),
        ("lower", 0.01, 0.0, "worse"),
        ("neither", 0.01, 0.0, "higher"),
        ("neither", -0.01, 0.0, "lower"),
        ("higher", 0.001, 0.15, "within noise"),  # 0.1 points, less than repetitions differ by
        ("higher", 0.0, 0.0, "within noise"),
    ],
)
def test_a_difference_has_a_standing(better: str, gain: float, noise: float, standing: str) -> None:
    values = torch.rand(20, generator=torch.Generator().manual_seed(0)).double()
    one, other = (mean_figure("f", each, better, noise=noise) for each in (values, values + gain))  # type: ignore[arg-type]
    difference = compared({"original": one, "repaired": other}, 20, 200, 0)["repaired"].to_original
    assert difference is not None
    assert difference.standing == standing


def test_the_larger_noise_of_two_sides_is_that_of_their_difference() -> None:
    values = torch.linspace(0, 1, 40, dtype=torch.float64)
    noises = {"original": 0.0, "repaired": 5.0}
    sides = {side: mean_figure("f", values + 0.009 * noise, noise=noise) for side, noise in noises.items()}
    assert noise_of(sides) == 5.0  # type: ignore[arg-type]
    found = compared(sides, 40, 100, 0)["repaired"].to_original  # type: ignore[arg-type]
    assert found is not None
    assert (round(found.value, 6), found.standing) == (4.5, "within noise")
    swapped = compared({"original": sides["repaired"], "repaired": sides["original"]}, 40, 100, 0)
    assert swapped["repaired"].to_original is not None
    assert swapped["repaired"].to_original.standing == "within noise"


def test_values_that_are_unknown_are_left_out() -> None:
    values = torch.tensor([1.0, torch.nan, 0.0, 1.0])
    found = compared({"original": mean_figure("f", values)}, 4, 200, 0)
    assert found["original"].value == pytest.approx(200 / 3)
    nothing = compared({"original": mean_figure("f", torch.full((4,), torch.nan))}, 4, 200, 0)
    assert nothing["original"].value is None


def test_a_model_gains_nothing_by_failing_on_hard_images() -> None:
    """A difference is taken over the images in which both sides can be measured."""
    values = torch.linspace(0, 1, 30).double()
    failing = values.clone()
    failing[:5] = torch.nan  # the hardest
    figures = {"original": mean_figure("f", values), "repaired": mean_figure("f", failing)}
    found = compared(figures, 30, 300, 0)
    difference = found["repaired"].to_original
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == pytest.approx((0, 0, 0), abs=1e-9)
    assert (difference.standing, difference.images) == ("within noise", 25)
    assert (found["original"].images, found["repaired"].images) == (30, 25)
    assert found["repaired"].value == pytest.approx(100 * values[5:].mean().item())


def test_a_difference_to_the_smoothed_original_is_one_to_that() -> None:
    values = torch.rand(30, generator=torch.Generator().manual_seed(0)).double()
    shifted = {"original": 0.0, "repaired": 0.3, "smoothed": 0.1, "blurred": 0.7}
    figures = {side: mean_figure("f", values + by) for side, by in shifted.items()}
    found = compared(figures, 30, 100, 0)  # type: ignore[arg-type]
    to_smoothed = {side: each.to_smoothed.value for side, each in found.items() if each.to_smoothed}
    assert to_smoothed == pytest.approx({"original": -10, "repaired": 20, "blurred": 60})


def test_most_resamples_must_have_something_to_measure() -> None:
    """A figure that few resamples can measure, here one that needs a certain image, judges nothing."""
    rows = torch.zeros(30, 2).double()
    rows[:, 0] = torch.rand(30, generator=torch.Generator().manual_seed(0)) + 1
    rows[3, 1] = 1  # about 63 % of the resamples have it

    def measure(sums: torch.Tensor) -> torch.Tensor:
        return torch.where(sums[..., 1] > 0, sums[..., 0], torch.nan)

    figures = {"original": Figure("f", rows, measure), "repaired": Figure("f", rows + 1e-3, measure)}
    figures["repaired"] = Figure("f", torch.stack([rows[:, 0] + 1, rows[:, 1]], dim=1), measure)
    difference = compared(figures, 30, 300, 0)["repaired"].to_original  # type: ignore[arg-type]
    assert difference is not None
    assert (difference.standing, difference.low) == ("too few images", None)


def test_a_mean_over_tokens_weighs_images_by_their_tokens() -> None:
    figure = mean_figure("f", torch.tensor([3.0, 0.0]), weights=torch.tensor([4.0, 1.0]))
    assert compared({"original": figure}, 2, 100, 0)["original"].value == pytest.approx(60)


def test_a_figure_of_sums_is_resampled_as_a_whole() -> None:
    """A ratio of sums is not the mean of ratios."""
    rows = [[random.Random(index).random(), random.Random(-index - 1).random() + 0.5] for index in range(12)]
    figure = Figure("f", torch.tensor(rows).double(), lambda sums: sums[..., 0] / sums[..., 1], unit="")
    found = compared({"original": figure}, 12, 100, 0)["original"].value
    assert found == pytest.approx(sum(row[0] for row in rows) / sum(row[1] for row in rows))
    assert found != pytest.approx(float(np.mean([row[0] / row[1] for row in rows])))


@pytest.mark.parametrize(("informative", "standing"), [(4, "too few images"), (5, "better")])
def test_few_images_with_something_to_measure_judge_nothing(informative: int, standing: str) -> None:
    """Where most resamples hold one and the same image, the interval has no width, and says nothing."""
    values = torch.full((30,), torch.nan).double()
    values[:informative] = torch.linspace(0.1, 0.2, informative).double()
    figures = {"original": mean_figure("f", values), "repaired": mean_figure("f", values + 0.3)}
    difference = compared(figures, 30, 500, 0)["repaired"].to_original
    assert difference is not None
    assert difference.standing == standing


def test_resamples_depend_on_the_seed_alone() -> None:
    one, again, other = (torch.cat(list(resamples(7, 600, seed))) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.shape == (600, 7)
