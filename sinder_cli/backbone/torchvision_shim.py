"""Operators that libraries of models expect of torchvision, where a torchvision is installed that has none.

timm and transformers import torchvision. One that was compiled for another torch, as the usual wheel is for a torch
without CUDA, fails to be imported for want of the schemas of its operators, although nobody here calls them.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.library import Library


# What torchvision describes the shapes of as it is imported; all else it leaves alone where it has no operators.
SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


@cache  # a library's schemas live as long as it does
def define_torchvision_operators() -> Library | None:
    """Let `import torchvision` succeed without its compiled operators; call it before anything imports torchvision.

    Nothing is done where torchvision is missing, or works.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    import torch

    for compiled in sorted(Path(spec.origin).parent.iterdir()):  # whatever the libraries with operators are called
        if compiled.suffix in (".so", ".pyd", ".dylib"):
            with suppress(OSError, ImportError):
                torch.ops.load_library(str(compiled))
    missing = {name: schema for name, schema in SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)}
    if not missing:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in missing.items():
        library.define(f"{name}{schema}")
    return library
