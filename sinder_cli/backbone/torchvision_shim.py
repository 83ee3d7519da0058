"""Stand-in operators for an installed torchvision whose own operators cannot be loaded.

timm and transformers import torchvision. A torchvision that was compiled for another torch, as the usual wheel is if
torch has no CUDA, fails at import because the schemas of its operators are missing, although nothing here calls them.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.library import Library


# Operators whose output shapes torchvision registers at import, even if its compiled operators are missing.
SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


@cache  # the schemas exist as long as the Library object
def define_torchvision_operators() -> Library | None:
    """Let `import torchvision` succeed without its compiled operators; call it before anything imports torchvision.

    Returns None, and changes nothing, if torchvision is missing or works.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    import torch

    for compiled in sorted(Path(spec.origin).parent.iterdir()):  # the names of the compiled libraries vary
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
