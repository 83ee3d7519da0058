"""Each plugin, export and extra once, by the interpreter that runs this: `make test-newest`, `make test-lowest`.

    python tests/install/smoke.py

It needs nothing but an environment with `sinder-cli[all]`, works in a temporary folder, prints a line a check, and
exits with 1 if one failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

from sinder_cli import define_torchvision_operators

NAMED = (
    *("torch", "torchvision", "numpy", "pillow", "matplotlib", "pydantic", "rich", "safetensors", "typer"),
    *("timm", "transformers", "onnx", "onnxruntime", "onnxscript", "pillow-heif", "tensorboard", "wandb", "xformers"),
)
SIZE = 112  # pixels
ENDINGS = {"native": ".safetensors", "dinov2": ".pth", "onnx": ".onnx"}  # of targets that are one file
STEPS = ("--max-steps", "2", "--eval-images", "1", "--image-size", str(SIZE))


class FailedError(Exception):
    """A check that failed, with its last lines."""


def sinder(*arguments: str | Path | int, codes: Sequence[int] = (0,)) -> str:
    """Run a command; what it printed. Raises `FailedError` for another exit code."""
    command = [sys.executable, "-W", "error::FutureWarning:sinder_cli", "-m", "sinder_cli", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if ended.returncode not in codes:
        told = " | ".join((ended.stderr or ended.stdout).strip().splitlines()[-3:])
        raise FailedError(f"sinder {' '.join(map(str, arguments))}: exit code {ended.returncode}: {told}")
    return ended.stdout


def photographs(folder: Path) -> Path:
    """Six drawn pictures, one of them as HEIC."""
    import pillow_heif
    from sinder_plugins.demo.drawing import draw_images

    pillow_heif.register_heif_opener()
    folder.mkdir()
    for at, image in enumerate(draw_images(6, 3)):
        image.save(folder / (f"{at}.heic" if at == 0 else f"{at}.jpg"))
    return folder


def timm_file(folder: Path) -> Path:
    """Random weights of a small model of timm's."""
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    path = folder / "timm.safetensors"
    save_file(model.state_dict(), path)
    return path


def hf_folder(folder: Path) -> Path:
    """Random weights of a small DINOv2 of transformers'."""
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 112, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder / "hf")
    return folder / "hf"


def dinov2_file(folder: Path) -> Path:
    """Random weights of the official ViT-S/14, as a pickle of tensors."""
    import timm
    import torch

    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    path = folder / "timm_dinov2.pth"
    torch.save(model.state_dict(), path)
    out = folder / "official.pth"
    sinder("export", "timm/vit_small_patch14_dinov2", "--weights", path, "--to", "dinov2", "--out", out)
    return out


def repaired(folder: Path, name: str, *model: str | Path, data: Path | None = None) -> Path:
    """A run of two steps: it need not improve anything."""
    images = ("--data", data) if data else ()
    out = folder / f"run-{name}"
    sinder("repair", *model, *images, "--out", out, *STEPS, codes=(0, 1))
    return out


def checks(folder: Path) -> dict[str, Callable[[], object]]:
    """What is tried, by its name."""
    data = photographs(folder / "photographs")
    made: dict[str, tuple[str | Path, ...]] = {
        "demo": ("demo_vit",),
        "timm": ("timm/vit_tiny_patch16_224", "--weights", timm_file(folder)),
        "hf": (f"hf/{hf_folder(folder)}",),
        "dinov2": ("dinov2_custom", "--weights", dinov2_file(folder)),
    }
    everything: dict[str, Callable[[], object]] = {"backbones": lambda: sinder("backbones")}
    for name, model in made.items():
        looked = ("--data", data, "--image-size", SIZE, "--figures", 1, "--out", folder / f"analysis-{name}")
        everything[f"{name}: check-backbone"] = partial(sinder, "check-backbone", *model)
        everything[f"{name}: predict-defects"] = partial(sinder, "predict-defects", *model)
        everything[f"{name}: analyze"] = partial(sinder, "analyze", *model, *looked)
        everything[f"{name}: repair"] = partial(repaired, folder, name, *model, data=data)
    exports = {
        "demo": ("native", "onnx", "torchhub"),
        "timm": ("native", "timm", "transformers", "onnx"),
        "hf": ("native", "transformers", "onnx"),
        "dinov2": ("native", "dinov2", "transformers", "timm", "torchhub", "onnx"),
    }
    for name, targets in exports.items():
        for target in targets:
            written = ("--to", target, "--out", folder / f"{name}-{target}{ENDINGS.get(target, '')}")
            everything[f"{name}: export --to {target}"] = partial(sinder, "export", folder / f"run-{name}", *written)
    logged = ("--log", "tensorboard", "--out", folder / "logged")
    everything["repair --log tensorboard"] = partial(sinder, "repair", "demo_vit", *logged, *STEPS, codes=(0, 1))
    return everything


def main() -> int:
    define_torchvision_operators()  # for the models that are made here
    installed = {each.metadata["Name"].lower().replace("_", "-"): each.version for each in distributions()}
    print(f"python {sys.version.split()[0]}, " + ", ".join(f"{name} {installed.get(name, '-')}" for name in NAMED))
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, check in checks(Path(temporary)).items():
            began = time.monotonic()
            try:
                check()
            except (FailedError, subprocess.TimeoutExpired) as error:
                failed.append(name)
                print(f"FAILED {name}: {error}", flush=True)
            else:
                print(f"ok     {name} ({time.monotonic() - began:.0f} s)", flush=True)
    print(json.dumps({"failed": failed}))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
