"""Pictures against slow, obvious twins."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sinder_cli.report.drawing.pictures import encoded, enlarged, image_file, pca_maps, picture


@pytest.fixture
def tokens() -> Tensor:
    scales = torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5, 0.2])
    return torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * scales + 2


def test_a_token_equal_on_both_sides_gets_the_same_colour(tokens: Tensor) -> None:
    after = tokens.clone()
    after[0, 1, 2] += 40
    before_rgb, after_rgb = pca_maps(tokens, after)
    same = np.ones((3, 4, 5), dtype=bool)
    same[0, 1, 2] = False
    assert (before_rgb[same] == after_rgb[same]).all()
    assert (before_rgb[~same] != after_rgb[~same]).any()


def test_equal_tokens_of_two_images_get_the_same_colour(tokens: Tensor) -> None:
    tokens[2, 0, 0] = tokens[0, 3, 1]
    rgb, _ = pca_maps(tokens, tokens)
    assert (rgb[2, 0, 0] == rgb[0, 3, 1]).all()


def test_pca_colours_agree_with_a_loop_over_tokens(tokens: Tensor) -> None:
    after = tokens * 0.5
    maps = np.stack(pca_maps(tokens, after))
    pooled = torch.cat([tokens, after]).view(-1, 6).double()
    components = [
        vector * vector[vector.abs().argmax()].sign() for vector in torch.linalg.svd(pooled - pooled.mean(0)).Vh
    ]
    values = np.array([[float((t - pooled.mean(0)) @ vector) for vector in components[:3]] for t in pooled])
    for channel in range(3):
        low, high = np.percentile(values[:, channel], [1, 99])
        expected = [round(255 * min(max((value - low) / (high - low), 0), 1)) for value in values[:, channel]]
        assert np.abs(maps[..., channel].ravel().astype(int) - expected).max() <= 1


def test_a_single_outlier_does_not_wash_out_the_rest(tokens: Tensor) -> None:
    spoilt = tokens.clone()
    spoilt[0, 1, 1] += 1000 * torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    rgb, _ = pca_maps(spoilt, tokens)
    assert (rgb.reshape(-1, 3).std(axis=0) > 30).all()


def test_tokens_without_variation_still_make_a_map() -> None:
    assert pca_maps(torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4))[0].shape == (1, 2, 2, 3)
    assert pca_maps(torch.randn(1, 2, 2, 2), torch.randn(1, 2, 2, 2))[1].shape == (1, 2, 2, 3)


def test_a_picture_is_what_was_normalized() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    original = torch.randint(0, 256, (3, 6, 8), generator=torch.Generator().manual_seed(5))
    normalized = (original / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert (picture(normalized, mean, std) == original.permute(1, 2, 0).numpy()).all()


def test_enlarging_repeats_every_patch_in_whole_pixels() -> None:
    rgb = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    large = enlarged(rgb, 10)
    assert large.shape == (6, 9, 3)
    assert all((large[y, x] == rgb[y // 3, x // 3]).all() for y, x in np.ndindex(6, 9))
    assert enlarged(rgb, 2).shape == rgb.shape


def test_a_png_keeps_every_colour_as_a_data_uri() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(encoded(rgb)))) == rgb).all()
    head, _, body = image_file(rgb, "jpeg").uri.partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).format == "JPEG"
