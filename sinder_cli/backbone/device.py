"""Where a backbone runs."""

from __future__ import annotations

from sinder_cli.errors import UnavailableError


def resolve_device(name: str) -> str:
    """`auto` is the first CUDA device, else the CPU. Raises `UnavailableError` for a device that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind == "cuda" and torch.cuda.device_count() <= int(number or 0):
        raise UnavailableError(f"cannot use device {name!r}", "PyTorch does not see it", "use --device cpu")
    return name
