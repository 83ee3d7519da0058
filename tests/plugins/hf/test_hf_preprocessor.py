"""Image size and normalization are what the preprocessor's file says, and what the library does with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from sinder_cli import IMAGENET_MEAN, IMAGENET_STD, Backbone, BadInputError
from sinder_cli.images.preprocessing import Preprocessing

Saved = Callable[[str], Path]
Opened = Callable[..., Backbone]


@pytest.fixture
def folder(saved: Saved, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved("ViT"), tmp_path / "folder"))


def said(folder: Path, opened: Opened, **values: Any) -> Backbone:
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return opened(folder)


PROCESSORS: dict[str, dict[str, Any]] = {
    "ViTImageProcessorPil": {"size": {"height": 48, "width": 48}},
    "BitImageProcessorPil": {"size": {"shortest_edge": 56}, "crop_size": {"height": 48, "width": 48}},
    "CLIPImageProcessorPil": {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}},
    "SiglipImageProcessorPil": {"size": {"height": 48, "width": 48}, "image_mean": [0.1, 0.2, 0.3]},
    "BeitImageProcessorPil": {"do_normalize": False, "size": {"height": 48, "width": 48}},
    "DeiTImageProcessorPil": {"rescale_factor": 1 / 127.5, "crop_size": {"height": 48, "width": 48}},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_become_what_the_library_makes_of_them(name: str, folder: Path, opened: Opened) -> None:
    """On an image that has the right size already, since bicubic and bilinear resizing are the user's affair."""
    processor = getattr(transformers, name)(**PROCESSORS[name])
    processor.save_pretrained(folder)
    backbone = opened(folder)
    assert backbone.image_size == 48
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    expected = processor(Image.fromarray(pixels), return_tensors="pt", do_resize=False)["pixel_values"][0]
    found = Preprocessing(48, backbone.mean, backbone.std).normalize(pixels)
    assert torch.allclose(found, expected, atol=1e-5)


SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "a number": ({"size": 64}, 64),
    "height and width": ({"size": {"height": 64, "width": 64}}, 64),
    "the shorter side": ({"size": {"shortest_edge": 64}}, 64),
    "a crop": ({"size": {"shortest_edge": 64}, "crop_size": 56, "do_center_crop": True}, 56),
    "a crop that is not made": ({"size": 64, "crop_size": {"height": 56, "width": 56}, "do_center_crop": False}, 64),
    "no resizing": ({"size": 64, "do_resize": False}, 40),
    "the longer side": ({"size": {"longest_edge": 64}}, 40),
    "nothing": ({}, 40),
}


@pytest.mark.parametrize(("values", "size"), SIZES.values(), ids=SIZES)
def test_the_size_is_that_of_the_crop_or_resized_image(
    values: dict[str, Any], size: int, folder: Path, opened: Opened
) -> None:
    assert said(folder, opened, **values).image_size == size


def test_the_newer_file_keeps_it_beside_the_tokenizer(folder: Path, opened: Opened) -> None:
    text = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "size": 64}, "processor_class": "CLIPProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(text))
    assert (opened(folder).mean, opened(folder).image_size) == ((0.1, 0.2, 0.3), 64)


def test_without_a_file_each_family_has_its_usual_values(saved: Saved, opened: Opened) -> None:
    assert (opened(saved("DINOv2")).mean, opened(saved("DINOv2")).std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert opened(saved("CLIP")).mean == (0.48145466, 0.4578275, 0.40821073)
    assert opened(saved("SigLIP")).mean == opened(saved("ViT")).std == (0.5, 0.5, 0.5)
    assert opened(saved("DINOv2")).image_size == 40


BAD = {
    "two numbers": {"image_mean": [0.5, 0.5]},
    "words": {"image_mean": ["a", "b", "c"]},
    "no spread": {"image_std": [0.5, 0.0, 0.5]},
    "a negative scale": {"rescale_factor": -1},
    "a processor of one word": {"image_processor": "ViT"},
}


@pytest.mark.parametrize("values", BAD.values(), ids=BAD)
def test_values_that_make_no_sense_are_refused(values: dict[str, Any], folder: Path, opened: Opened) -> None:
    with pytest.raises(BadInputError, match=r"cannot read .*/preprocessor_config"):
        said(folder, opened, **values)
