"""Script that computes features with transformers alone.

`verifying` calls it as `load_transformers.py FOLDER PIXELS FEATURES`.
"""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sinder_cli import define_torchvision_operators

define_torchvision_operators()  # before the library looks for torchvision

import transformers  # noqa: E402


def loaded(folder: str) -> Any:
    """Return the model in float32, loaded strictly.

    Only a pooler or a head may be missing, and only a mask token of pre-training may be left over. Raises `SystemExit`
    that names all other tensors.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    chosen = {"mask_ratio": 0.0} if hasattr(config, "mask_ratio") else {}  # an MAE masks no patch here
    model, report = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, use_safetensors=True, **chosen
    )
    missing = [name for name in report["missing_keys"] if "pooler" not in name and not name.startswith("head.")]
    left_over = [name for name in report["unexpected_keys"] if "mask_token" not in name]
    problems = {"missing": missing, "unexpected": left_over, "mis-shaped": report["mismatched_keys"]}
    if any(problems.values()):
        raise SystemExit("; ".join(f"{kind}: {sorted(map(str, names))}" for kind, names in problems.items() if names))
    return model.eval()


def features(model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return all hidden states, and the tokens after the final norm."""
    output = model(**arguments(model, images), output_hidden_states=True)
    states = {f"hidden_states.{index}": state for index, state in enumerate(output.hidden_states)}
    return states | {"last_hidden_state": output.last_hidden_state}


def arguments(model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the arguments that the model's forward takes for images `[B, 3, H, W]`."""
    names = inspect.signature(model.forward).parameters
    if "noise" in names:  # an MAE sorts its patches by it
        patches = (images.shape[-1] // model.config.patch_size) * (images.shape[-2] // model.config.patch_size)
        return {"pixel_values": images, "noise": torch.arange(patches).expand(len(images), -1).float()}
    if "spatial_shapes" in names:  # SigLIP 2 takes flattened patches, channels last
        P = model.config.patch_size
        grid = images.unfold(2, P, P).unfold(3, P, P).permute(0, 2, 3, 4, 5, 1)  # [B, h, w, P, P, 3]
        shapes = torch.tensor([grid.shape[1:3]] * len(images))
        flat = grid.flatten(3).flatten(1, 2)
        mask = torch.ones(flat.shape[:2], dtype=torch.long)
        return {"pixel_values": flat, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {"pixel_values": images}


@torch.inference_mode()
def main(folder: str, pixels: str, written: str) -> None:
    """Run every batch, write its features, and print the version of transformers."""
    model = loaded(folder)
    found = {
        f"{number}.{name}": tensor.contiguous().clone()
        for number, images in load_file(pixels).items()
        for name, tensor in features(model, images).items()
    }
    save_file(found, written)
    print(json.dumps({"transformers": transformers.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
