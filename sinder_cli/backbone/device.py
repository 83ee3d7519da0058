"""Where a backbone runs, and how exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sinder_cli.distributed import ALONE, Ranks
from sinder_cli.errors import UnavailableError


def resolve_device(name: str, ranks: Ranks = ALONE) -> str:
    """`auto` is the first CUDA device, else the CPU; each of several processes has a CUDA device of its own.

    A CUDA device becomes this process's current one. Raises `UnavailableError` for a device that is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks.size > 1:
        name = f"cuda:{ranks.local_rank}"
    kind, _, number = name.partition(":")
    missing = kind == "cuda" and torch.cuda.device_count() <= int(number or 0)
    if missing or (kind == "mps" and not torch.backends.mps.is_available()):
        raise UnavailableError(f"cannot use device {name!r}", "PyTorch does not see it", "use --device cpu")
    if kind == "cuda":  # what names no device, such as pinned memory, is this one's as well
        torch.cuda.set_device(int(number or 0))
    return name


def exact_device(device: str) -> str:
    """Where what needs float64 is computed: on the device itself, or on the CPU where it has none, as MPS."""
    return "cpu" if device == "mps" else device


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Products of float32 matrices, and convolutions, on CUDA devices: in TF32, or else in float32 indeed.

    PyTorch's own default is TF32 for convolutions alone.
    """
    from torch.backends import cuda, cudnn

    switches = (cuda.matmul, cudnn.conv)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
