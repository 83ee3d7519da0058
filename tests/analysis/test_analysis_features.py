"""`--features`: one file an image, with what the model's own forward pass gives, or the inpainted one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sinder_cli import ModelRequest, api, inputs
from sinder_cli.analysis.features import MOST_BYTES, file_names
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.analysis.tokens import Subject
from sinder_cli.defects.inpainting import inpainted
from sinder_cli.defects.tokens import last_tokens
from sinder_cli.errors import CannotCreateError
from sinder_cli.requests import AnalyzeRequest


def written(request: ModelRequest, places: list[str], folder: Path, **given: Any) -> dict[str, dict[str, Tensor]]:
    settings = AnalyzeSettings.model_validate({"device": "cpu", "workers": 0, **given})
    api.analyze(AnalyzeRequest(request, places, settings, features=folder))
    return {path.name: load_file(path) for path in sorted(folder.iterdir())}


def test_the_files_hold_what_the_modules_own_forward_gives(
    checkpoint: Callable[..., Path], small: Subject, photographs: Path, tmp_path: Path, naive: Any
) -> None:
    request = ModelRequest("dinov2_custom", checkpoint("small"))
    found = written(request, [str(photographs)], tmp_path / "new" / "features", image_size=112, batch_size=2)
    paths = sorted(photographs.iterdir())
    assert list(found) == [f"{path.stem}.safetensors" for path in paths]
    assert small.backbone.forward is not None
    for path, tensors in zip(paths, found.values(), strict=True):
        image = naive.pixels(Image.open(path), small.backbone, 112)
        h, w = image.shape[1] // 14, image.shape[2] // 14
        with torch.no_grad():
            tokens = small.backbone.forward(small.module, image[None])[0]
        assert set(tensors) == {"patches", "cls"}
        assert (tensors["patches"].shape, tensors["patches"].dtype) == ((h, w, 128), torch.float32)
        torch.testing.assert_close(tensors["cls"], tokens[0], rtol=1e-3, atol=2e-3)  # two ways of resizing
        torch.testing.assert_close(tensors["patches"], tokens[3:].unflatten(0, (h, w)), rtol=1e-2, atol=2e-2)


def test_the_model_alone_and_the_inpainted_pass(tmp_path: Path, demo: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "DRAWN_IMAGES", 2)
    source, preprocess = api.drawn_images(demo.backbone, 0), api.preprocessing(demo.backbone, None)
    images = [preprocess(source.load(index)) for index in range(2)]
    for method, backbone in (("none", demo.backbone), ("inpaint", inpainted(demo.backbone))):
        found = written(ModelRequest("demo_vit"), [], tmp_path / method, method=method)
        assert list(found) == ["demo_vit #0.safetensors", "demo_vit #1.safetensors"]
        for image, tensors in zip(images, found.values(), strict=True):
            tokens = last_tokens(backbone, demo.module, image[None])
            expected = demo.backbone.finish(demo.module, tokens)[0]
            torch.testing.assert_close(tensors["cls"], expected[0])
            torch.testing.assert_close(tensors["patches"].flatten(0, 1), expected[1:])
    with safe_open(tmp_path / "inpaint" / "demo_vit #1.safetensors", "pt") as file:
        about = file.metadata()
        patches = file.get_tensor("patches")
    assert (about["model"], about["image"]) == ("demo_vit, inpainted", "demo_vit #1")
    assert about["fingerprint"] == demo.backbone.weights.fingerprint()
    assert "final norm" in about["taken"]
    plain = load_file(tmp_path / "none" / "demo_vit #1.safetensors")["patches"]
    assert cosine_similarity(plain, patches, dim=-1).min() < 0.5


def test_clamped_weights_are_no_ones_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "DRAWN_IMAGES", 1)
    (clamped,) = written(ModelRequest("demo_vit"), [], tmp_path / "clamped", clamp=3).values()
    (plain,) = written(ModelRequest("demo_vit"), [], tmp_path / "plain").values()
    assert torch.equal(clamped["patches"], plain["patches"])


def test_files_have_names_of_their_own() -> None:
    names = file_names(["a/x.png", "b/x.jpg", "X.webp", "x-2.png", "two words.png", ".png", "t\tab.png"])
    assert list(names.values()) == [
        f"{name}.safetensors" for name in ("x", "x-2", "X-3", "x-2-2", "two words", ".png", "t-ab")
    ]
    (long,) = file_names(["é" * 300 + ".png"]).values()
    assert len(long.encode()) == MOST_BYTES + len(".safetensors")


def test_a_folder_that_holds_something_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(CannotCreateError, match="it is not empty; choose another --features"):
        written(ModelRequest("demo_vit"), [], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
