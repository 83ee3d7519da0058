"""Maps as colours, against slow, obvious twins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from made_analysis import Made
from matplotlib import colormaps

from sinder_cli.analysis.records import Distribution
from sinder_cli.report.analysis.image_maps import MARK, drawn_image, mask_map, paint_image, shared_scales
from sinder_cli.report.drawing.canvas import ABSENT
from sinder_cli.report.drawing.pictures import LabelledPicture, clip_range, pca_map
from sinder_cli.report.drawing.rows import Row, draw_rows
from sinder_cli.report.drawing.scales import (
    ANGLES,
    ColourScale,
    NormSpread,
    attention_scale,
    cosine_scale,
    norm_scale,
)


def distribution(low: float, median: float, high: float) -> Distribution:
    return Distribution(count=9, mean=median, min=low, p01=low, median=median, p99=high, max=high)


def test_a_colour_is_that_of_the_map_at_the_value() -> None:
    values = torch.tensor([[0.0, 30.0], [45.0, 90.0]])
    painted = ANGLES.paint(values)
    for row, column in np.ndindex(2, 2):
        expected = np.array(colormaps["viridis_r"](values[row, column].item() / 90)[:3]) * 255
        assert np.abs(painted[row, column] - expected).max() <= 1


def test_small_angles_and_large_norms_are_bright() -> None:
    angles = ANGLES.paint(torch.tensor([[1.0, 89.0]])).astype(int).sum(axis=2)
    assert angles[0, 0] > angles[0, 1]
    norms = norm_scale([distribution(10, 20, 400)]).paint(torch.tensor([[400.0, 20.0]])).astype(int).sum(axis=2)
    assert norms[0, 0] > norms[0, 1]


@pytest.mark.parametrize(
    ("given", "low", "high"),
    [
        ([distribution(10, 20, 400)], 10, 400),
        ([distribution(10, 20, 25)], 10, 60),  # 3 × the median is always on it
        ([distribution(10, 20, 400), distribution(5, 30, 35)], 5, 400),
        ([distribution(0, 20, 60)], 0.02, 60),
        ([None], 1, 1),
    ],
)
def test_the_scale_of_norms_covers_both_sides(given: list[Distribution | None], low: float, high: float) -> None:
    scale = norm_scale(given)
    assert math.isclose(scale.low, low)
    assert math.isclose(scale.high, high)
    assert scale.logarithmic


def test_ticks_lie_where_their_labels_say() -> None:
    assert [(tick.at, tick.label) for tick in ANGLES.ticks] == [(0, "0°"), (1 / 3, "30°"), (2 / 3, "60°"), (1, "90°")]
    cosines = cosine_scale(distribution(-0.23, 0.9, 1.0))
    assert (cosines.low, cosines.high) == (-0.3, 1)
    assert [tick.label for tick in cosines.ticks] == ["0", "0.5", "1"]
    for tick in cosines.ticks:
        assert math.isclose(-0.3 + 1.3 * tick.at, float(tick.label), abs_tol=1e-9)
    assert len(ColourScale("x", 2.0, 2.0, "cividis").ticks) == 1


def test_values_that_are_no_numbers_still_make_a_map() -> None:
    broken = torch.tensor([[math.nan, math.inf], [1.0, 20.0]])
    painted = norm_scale([distribution(10, 20, 400)]).paint(broken)
    assert [tuple(colour) for colour in painted[0]] == [ABSENT, ABSENT]
    assert ABSENT not in [tuple(colour) for colour in painted[1]]
    assert attention_scale(broken).high == 20
    assert attention_scale(torch.zeros(2, 2)).paint(torch.zeros(2, 2)).shape == (2, 2, 3)


def norms_from(low: float, high: float) -> ColourScale:
    return ColourScale("L2 norm", low, high, "inferno", logarithmic=True)


def test_a_norm_map_shows_the_logarithm_of_each_norm() -> None:
    norms = torch.tensor([[10.0, 20.0], [40.0, 1000.0]])
    rgb = norms_from(10.0, 1000.0).paint(norms)
    for row, column in np.ndindex(2, 2):
        position = math.log(norms[row, column].item() / 10) / math.log(100)
        expected = np.array(colormaps["inferno"](position)[:3]) * 255
        assert np.abs(rgb[row, column] - expected).max() <= 1
    assert rgb.dtype == np.uint8


def test_equal_norms_have_equal_colours_before_and_after() -> None:
    before, after = torch.tensor([[21.0, 432.0]]), torch.tensor([[21.0, 30.0]])
    scale = norm_scale([NormSpread.of(before), NormSpread.of(after)])
    assert (scale.low, scale.high) == (21.0, 432.0)
    assert (scale.paint(before)[0, 0] == scale.paint(after)[0, 0]).all()
    assert scale.paint(after).sum() < scale.paint(before).sum()


def test_norms_beyond_the_scale_saturate() -> None:
    rgb = norms_from(1.0, 9.0).paint(torch.tensor([[0.0, 1.0, 9.0, 10.0]]))
    assert (rgb[0, 0] == rgb[0, 1]).all()
    assert (rgb[0, 2] == rgb[0, 3]).all()


def test_norms_without_a_range_still_make_a_map() -> None:
    assert norms_from(7.0, 7.0).paint(torch.full((2, 2), 7.0)).shape == (2, 2, 3)
    scale = norm_scale([NormSpread.of(torch.zeros(2, 2))])
    assert (scale.low, scale.high) == (1.0, 1.0)


def test_the_colour_bar_runs_from_darkest_to_brightest() -> None:
    brightness = norms_from(1.0, 9.0).bar(64, 3).astype(int).sum(axis=2)
    assert brightness.shape == (3, 64)
    assert (np.diff(brightness[0]) >= -2).all()  # rounding to bytes aside


def test_marked_patches_are_amber_on_a_dimmed_photograph() -> None:
    photograph = np.full((40, 60, 3), 200, dtype=np.uint8)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 2] = True
    drawn = mask_map(photograph, mask)
    assert drawn.shape == (4, 6, 3)
    assert tuple(drawn[1, 2]) == MARK
    assert (drawn[~mask.numpy()] == 90).all()


def test_equal_coordinates_have_equal_colours_on_both_sides() -> None:
    result = Made(compared=True, drawn=2).result()
    images = [drawn_image(portrait, result.mean, result.std) for portrait in result.portraits]
    scales = shared_scales(result.analysis, images)
    shared = images[0].sides[0].components[2, 3]
    images[0].sides[1].components[5, 6] = shared
    images[1].sides[1].components[7, 8] = shared
    first, second = (paint_image(each, scales, ["a", "b"]) for each in images)
    colours = [first.sides[0].pca.picture[2, 3], first.sides[1].pca.picture[5, 6], second.sides[1].pca.picture[7, 8]]
    assert (colours[0] == colours[1]).all()
    assert (colours[0] == colours[2]).all()


def test_principal_components_are_clipped_at_the_percentiles_of_both_sides() -> None:
    result = Made(compared=True, drawn=3).result()
    images = [drawn_image(portrait, result.mean, result.std) for portrait in result.portraits]
    low, high = shared_scales(result.analysis, images).pca
    maps = [side.components for each in images for side in each.sides]
    pooled = np.array([value for components in maps for row in components.tolist() for value in row])
    for channel in range(3):
        assert np.allclose((low[channel], high[channel]), np.percentile(pooled[:, channel], [1, 99]), atol=1e-6)


def test_a_token_that_is_not_finite_is_grey() -> None:
    components = torch.tensor([[[1.0, 2.0, 3.0], [1.0, math.nan, 3.0]], [[0.0, 1.0, 2.0], [-1.0, 5.0, math.inf]]])
    colours = pca_map(components, clip_range([components]))
    grey = [[tuple(colour) == ABSENT for colour in row] for row in colours]
    assert grey == [[False, True], [False, True]]


def test_norms_of_both_sides_share_a_scale_block_by_block() -> None:
    analysis = Made(compared=True, drawn=0).result().analysis
    assert analysis.other is not None
    scales = shared_scales(analysis, []).norms
    for block, scale in enumerate(scales):
        both = [side.blocks[block].patch_norm for side in (analysis, analysis.other)]
        assert scale.high >= max(norm.max for norm in both if norm)
        assert scale.low == min(norm.min for norm in both if norm)


def test_rows_hold_every_picture_in_whole_pixels() -> None:
    one = LabelledPicture("a", "", np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10)
    drawn = draw_rows([Row("heading", [one, LabelledPicture("gone", "", None)])], ANGLES)
    for colour in one.picture.reshape(-1, 3):
        assert ((drawn == colour).all(axis=2)).sum() == 85 * 85
    wide = draw_rows([Row("", [one] * 9)])
    assert wide.shape[0] > 2 * 170
