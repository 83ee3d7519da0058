"""What `sinder doctor` finds: versions, machine, attention kernels, plugins and caches of this installation."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from sinder_cli import __version__
from sinder_cli.backbone.device import AttentionName, attention_kernel
from sinder_cli.backbone.download import hub_cache
from sinder_cli.backbone.registry import installed_backbones
from sinder_cli.cores import usable_cores
from sinder_cli.errors import SinderError
from sinder_cli.evaluation.registry import installed_tasks

LIBRARIES = {  # what each is needed for
    "torch": "everything",
    "safetensors": "everything",
    "numpy": "everything",
    "pillow": "images",
    "matplotlib": "figures",
    "xformers": "the attention kernel xformers",
    "transformers": "models hf/… (extra hf)",
    "huggingface_hub": "models of the hub (extra hf)",
    "timm": "models timm/… (extra timm)",
    "onnx": "export to ONNX (extra onnx)",
    "onnxscript": "export to ONNX (extra onnx)",
    "onnxruntime": "the check of an export to ONNX (extra onnx)",
    "pillow-heif": "HEIC images (extra heic)",
    "scikit-learn": "evaluate: linear, clusters (extra evaluate)",
    "scipy": "evaluate: clusters, discovery (extra evaluate)",
    "OpenEXR": "evaluate: depth as EXR (extra evaluate)",
    "textual-image": "pictures in the terminal (extra terminal)",
    "tensorboard": "--log tensorboard (extra tensorboard)",
    "wandb": "--log wandb (extra wandb)",
}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and whether something is wrong with it."""

    subject: str
    name: str
    found: str
    problem: bool = False


def diagnosis() -> list[Finding]:
    """Look at everything that decides whether and how fast sinder runs here. Nothing is downloaded or changed."""
    return [*_versions(), *_machine(), *_kernels(), *_plugins(), *_caches()]


def _versions() -> list[Finding]:
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    found = [Finding("versions", "sinder", __version__), Finding("versions", "Python", sys.version.split()[0])]
    found.append(Finding("versions", "system", system))
    return [*found, *(_version(name, needed_for) for name, needed_for in LIBRARIES.items())]


def _version(name: str, needed_for: str) -> Finding:
    try:
        return Finding("versions", name, version(name))
    except PackageNotFoundError:
        return Finding("versions", name, f"not installed: {needed_for}", problem=needed_for == "everything")


def _machine() -> list[Finding]:
    import torch

    found = [
        Finding("machine", "cores", f"{usable_cores()} usable, torch takes {torch.get_num_threads()} threads"),
        Finding("machine", "CUDA", _cuda(torch)),
    ]
    if torch.backends.mps.is_available():
        found.append(Finding("machine", "MPS", "there"))
    return found


def _cuda(torch: Any) -> str:
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return f"no device; {built}"
    names = [torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count())]
    return ", ".join(f"{each.name}, {each.total_memory / 1e9:.0f} GB" for each in names)


def _kernels() -> list[Finding]:
    return [Finding("attention", name, _usable(name)) for name in get_args(AttentionName)]


def _usable(kernel: AttentionName) -> str:
    try:
        attention_kernel(kernel)
    except SinderError as error:
        return str(error)
    return "can be used"


def _plugins() -> list[Finding]:
    found = []
    by_plugin: dict[tuple[str, str], list[Any]] = {}
    for row in installed_backbones():
        by_plugin.setdefault((row.plugin.name, row.plugin.distribution), []).append(row)
    for (name, distribution), rows in by_plugin.items():
        problem = next((row.problem for row in rows if row.problem), "")
        missing = sorted({module for row in rows for module in row.missing})
        words = problem or f"{len(rows)} models of {distribution}" + (
            f"; missing: {', '.join(missing)}" if missing else ""
        )
        found.append(Finding("plugins", name, words, bool(problem)))
    return [*found, Finding("plugins", "tasks", ", ".join(installed_tasks()))]


def _caches() -> list[Finding]:
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return [
        Finding("caches", name, _space(place)) for name, place in (("torch hub", hub_cache()), ("Hugging Face", hub))
    ]


def _space(place: Path) -> str:
    if not place.is_dir():
        return f"{place}: nothing yet"
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file() and not path.is_symlink())
    return f"{place}: {size / 1e9:.2f} GB"
