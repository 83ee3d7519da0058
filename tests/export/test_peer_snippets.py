"""Each format with the lines that its users write, in another process, against our features of the same pixels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sinder_plugins.demo.drawing import draw_images

from sinder_cli import ModelRequest, api
from sinder_cli.backbone.opening import load_module
from sinder_cli.exporting.drafts import ExportResult
from sinder_cli.exporting.verifying import normalized_tokens, relative_difference

pytestmark = pytest.mark.slow
Export = Callable[..., ExportResult]
SHIM = "import sinder_cli; sinder_cli.define_torchvision_operators()\n"  # for a torchvision of another torch
PIPELINE = """
from transformers import pipeline
from PIL import Image
extract = pipeline("image-feature-extraction", model="written", use_fast=True)
tokens = torch.tensor(extract(Image.open("photo.png")))
pixels = extract.image_processor(Image.open("photo.png"), return_tensors="pt")["pixel_values"]
"""
TIMM = """
import timm
model = timm.create_model("local-dir:written", pretrained=True, num_classes=0).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
from PIL import Image
pixels = transform(Image.open("photo.png"))[None]
with torch.inference_mode():
    tokens = model.forward_features(pixels)
"""
HUB = """
model = torch.hub.load("written", "dinov2_custom", source="local")
pixels = torch.randn(1, 3, 84, 98)
with torch.inference_mode():
    kinds = model(pixels, is_training=True)
    layers = model.get_intermediate_layers(pixels, n=1, return_class_token=True)
    assert torch.equal(model(pixels), kinds["x_norm_clstoken"])
    assert torch.equal(layers[0][0], kinds["x_norm_patchtokens"])
tokens = torch.cat([kinds["x_norm_clstoken"][:, None], kinds["x_norm_patchtokens"]], dim=1)
"""
ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession("written.onnx")
[given] = session.get_inputs()
pixels = torch.randn(1, 3, *given.shape[2:])
cls, patches = (torch.from_numpy(each) for each in session.run(["cls", "patch_tokens"], {given.name: pixels.numpy()}))
tokens = torch.cat([cls[:, None], patches.reshape(1, -1, cls.shape[-1])], dim=1)
"""
SNIPPETS = {
    "transformers": (PIPELINE, "written", ("transformers",), 1e-5),
    "timm": (TIMM, "written", ("timm",), 1e-5),
    "torchhub": (HUB, "written", (), 1e-5),
    "onnx": (ONNX, "written.onnx", ("onnx", "onnxruntime", "onnxscript"), 1e-4),
}


@pytest.mark.parametrize("target", SNIPPETS)
def test_the_usual_lines_give_our_features(
    target: str, export: Export, plain: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    snippet, name, libraries, tolerance = SNIPPETS[target]
    if missing := [library for library in libraries if find_spec(library) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    export("dinov2_custom", target, tmp_path / name, plain, verify=False)
    draw_images(1, seed=3)[0].save(tmp_path / "photo.png")
    code = f"{SHIM}import torch\n{snippet}\nfrom safetensors.torch import save_file\n"
    code += "save_file({'pixels': pixels.contiguous(), 'tokens': tokens.float().contiguous()}, 'seen.safetensors')"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    seen = load_file(tmp_path / "seen.safetensors")
    backbone = api.open_model(ModelRequest("dinov2_custom", weights=plain))
    with torch.inference_mode():
        ours = normalized_tokens(backbone, load_module(backbone), seen["pixels"])
    assert relative_difference(seen["tokens"], ours) <= tolerance
