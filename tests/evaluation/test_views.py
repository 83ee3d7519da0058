"""What is kept of a pass, against the module itself, and how images are cut, against arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sinder_cli import Backbone, ModelRequest, UsageError, api
from sinder_cli.backbone.opening import load_module
from sinder_cli.defects.detection import norm_ratios, outlying
from sinder_cli.defects.tokens import residual_stream
from sinder_cli.evaluation.contract import Part, View
from sinder_cli.evaluation.views import Observer, ViewPreprocessing, blurred, smoothed, starts
from sinder_cli.images.decoding import UnreadableImageError

PATCH, SIZE = 14, 84


@pytest.fixture(scope="module")
def model(weights: Path) -> tuple[Backbone, Any]:
    backbone = api.open_model(ModelRequest("dinov2_custom", weights))
    return backbone, load_module(backbone)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE + PATCH, generator=torch.Generator().manual_seed(0))


def observed(model: tuple[Backbone, Any], view: View, images: Tensor, factor: float = 3.0) -> dict[str, Tensor]:
    return Observer.of(*model, view, factor, "float32", False, "cpu").observe(images)


@torch.no_grad()
def test_parts_are_those_of_the_pass(model: tuple[Backbone, Any], images: Tensor) -> None:
    backbone, module = model
    parts: tuple[Part, ...] = ("cls", "mean", "patches", "stream", "stream_cls", "norms")
    found = observed(model, View(parts, SIZE), images, factor=1.05)
    stream = list(residual_stream(backbone, module, images))
    last = backbone.finish(module, stream[-1])
    assert torch.equal(found["patches"].flatten(1, 2), last[:, 2:])
    assert torch.equal(found["cls"], last[:, 0])
    torch.testing.assert_close(found["mean"], last[:, 2:].mean(dim=1))
    assert torch.equal(found["stream"].flatten(1, 2), stream[-1][:, 2:])
    assert torch.equal(found["stream_cls"], stream[-1][:, 0])
    norms = torch.stack([tokens[:, 2:].norm(dim=-1).unflatten(1, (6, 7)) for tokens in stream], dim=1)
    torch.testing.assert_close(found["norms"], norms)
    start = norm_ratios(backbone.embed(module, images)[0][:, 2:].norm(dim=-1).unflatten(1, (6, 7)))
    marked = torch.stack([outlying(norm_ratios(norms[:, at]), start, 1.05) for at in range(3)]).any(dim=0)
    assert 0 < marked.float().mean() < 1
    assert torch.equal(found["outlying"], marked)
    for kind, derive in (("smoothed", smoothed), ("blurred", blurred)):
        means = [derive(patches, mask).mean(dim=(0, 1)) for patches, mask in zip(found["patches"], marked, strict=True)]
        torch.testing.assert_close(found[f"mean.{kind}"], torch.stack(means))


@torch.no_grad()
def test_queries_keys_and_values_are_the_modules_own(model: tuple[Backbone, Any], images: Tensor) -> None:
    backbone, module = model
    found = observed(model, View(("query", "key", "value"), SIZE), images)
    kept: list[Tensor] = []
    hook = module.blocks[-1].attn.qkv.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    list(residual_stream(backbone, module, images))
    hook.remove()
    for name, own in zip(("query", "key", "value"), kept[0][:, 2:].chunk(3, dim=-1), strict=True):
        torch.testing.assert_close(found[name].flatten(1, 2), own, atol=1e-5, rtol=1e-4)


def test_colours_are_means_of_pixels(model: tuple[Backbone, Any]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    preprocess = ViewPreprocessing.of(View(("colour",), SIZE), model[0])
    found = observed(model, preprocess.view, preprocess.normalize(pixels)[None])["colour"][0]
    for row, column in ((0, 0), (2, 5)):
        square = pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] / 255
        assert np.allclose(found[row, column].numpy(), square.mean(axis=(0, 1)), atol=1e-5)


@torch.no_grad()
def test_windows_are_averaged_where_they_overlap(model: tuple[Backbone, Any], images: Tensor) -> None:
    window, stride = 5 * PATCH, 2 * PATCH
    found = observed(model, View(("patches",), SIZE, window=window, stride=stride), images)["patches"]
    backbone, module = model
    for at, image in enumerate(images):
        sums, counts = torch.zeros(6, 7, 64), torch.zeros(6, 7, 1)
        for top in (0, 1):  # patches
            for left in (0, 2):
                part = image[None, :, top * PATCH : top * PATCH + window, left * PATCH : left * PATCH + window]
                tokens = backbone.finish(module, list(residual_stream(backbone, module, part))[-1])[0, 2:]
                sums[top : top + 5, left : left + 5] += tokens.view(5, 5, -1)
                counts[top : top + 5, left : left + 5] += 1
        torch.testing.assert_close(found[at], sums / counts, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [(98, 70, 28, [0, 28]), (84, 70, 28, [0, 14]), (70, 70, 28, [0]), (140, 70, 70, [0, 70])],
)
def test_windows_end_at_the_edge(length: int, window: int, stride: int, expected: list[int]) -> None:
    assert starts(length, window, stride) == expected


@pytest.mark.parametrize(
    ("view", "image", "size"),
    [
        (View((), 84), (200, 100), (168, 84)),
        (View((), 84), (101, 100), (84, 84)),  # both sides to the nearest whole patches: nothing is cut off
        (View((), 84, resize="square"), (200, 100), (84, 84)),
        (View((), 96, resize="square", crop=84), (200, 100), (84, 84)),
        (View((), 84, resize="none"), (100, 90), (98, 84)),
        (View((), 84, resize="none", most_tokens=42), (100, 90), (98, 84)),
        (View((), 84, resize="none", most_tokens=41), (100, 90), (84, 84)),
        (View((), 84, resize="none", most_tokens=64), (2000, 1000), (154, 70)),
        (View((), 84, shift=1), (200, 100), (154, 70)),
    ],
)
def test_images_get_the_size_of_the_view(
    model: tuple[Backbone, Any], view: View, image: tuple[int, int], size: tuple[int, int]
) -> None:
    fitted = ViewPreprocessing.of(view, model[0]).fit(Image.new("RGB", image))
    assert fitted.shape == (size[1], size[0], 3)


def test_a_shifted_view_is_the_rest_of_the_image(model: tuple[Backbone, Any], pictures: Path) -> None:
    image = Image.open(pictures / "1.png").convert("RGB")
    whole, rest = (ViewPreprocessing.of(View((), 84, shift=shift), model[0]).fit(image) for shift in (0, 1))
    assert np.array_equal(whole[PATCH:, PATCH:], rest)


def test_an_image_too_small_for_a_view_is_named(model: tuple[Backbone, Any]) -> None:
    with pytest.raises(UnreadableImageError, match="60×60 pixels make under 5 × 5 patches"):
        ViewPreprocessing.of(View((), 84, resize="none"), model[0]).fit(Image.new("RGB", (60, 60)))


@pytest.mark.parametrize("view", [View((), 84, window=75), View((), 84, window=84, stride=20), View((), 90, "square")])
def test_sizes_that_are_no_whole_patches_are_refused(model: tuple[Backbone, Any], view: View) -> None:
    with pytest.raises(UsageError, match="does not fit: patches are 14 pixels, and at least"):
        ViewPreprocessing.of(view, model[0])


def test_infinite_neighbours_spoil_no_average() -> None:
    patches = torch.ones(5, 5, 2)
    marked = torch.zeros(5, 5, dtype=torch.bool)
    marked[2, 2] = marked[2, 3] = True
    patches[marked] = torch.inf
    assert torch.equal(smoothed(patches, marked), torch.ones(5, 5, 2))


def test_placebos_change_what_they_say() -> None:
    patches = torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(1))
    marked = torch.zeros(5, 6, dtype=torch.bool)
    marked[2, 3] = True
    changed = smoothed(patches, marked)
    assert torch.equal(changed[~marked], patches[~marked])
    weights = {(-1, -1): 1, (-1, 0): 2, (-1, 1): 1, (0, -1): 2, (0, 1): 2, (1, -1): 1, (1, 0): 2, (1, 1): 1}
    expected = sum(weight * patches[2 + i, 3 + j] for (i, j), weight in weights.items()) / 12
    torch.testing.assert_close(changed[2, 3], expected)
    every = blurred(patches, marked)
    torch.testing.assert_close(every[0, 0], patches[:2, :2].mean(dim=(0, 1)))
    torch.testing.assert_close(every[2, 3], patches[1:4, 2:5].mean(dim=(0, 1)))
