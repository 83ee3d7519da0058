"""Script that computes features with timm alone: `load_timm.py FOLDER PIXELS FEATURES`, as `verifying` calls it."""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import load_file, save_file

from sinder_cli import define_torchvision_operators

define_torchvision_operators()  # before the library looks for torchvision

import timm  # noqa: E402


@torch.inference_mode()
def main(folder: str, pixels: str, written: str) -> None:
    """Load the model strictly, as timm does; run every batch, write its features, and print timm's version."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).float().eval()
    found = {
        f"{number}.tokens": model.forward_features(images).contiguous().clone()
        for number, images in load_file(pixels).items()
    }
    save_file(found, written)
    print(json.dumps({"timm": timm.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
