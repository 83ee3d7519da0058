"""The backbone's own format: `.safetensors` or `.pth`, official keys, order and dtype."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.backbone.checkpoint import TensorSource, Weights, open_checkpoint
from sinder_cli.backbone.storing import write_safetensors
from sinder_cli.errors import BadInputError, UsageError
from sinder_cli.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt")


def write_native(path: Path, weights: Weights) -> None:
    """Write all tensors of a backbone under their exported names; read back and compared before it gets its name.

    Raises `UsageError` for another suffix and `BadInputError` if what was written differs, which leaves nothing.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"cannot export to {path}", f"unknown suffix {path.suffix!r}", f"use {' or '.join(SUFFIXES)}")
    with replacing(path) as temporary:
        draft = temporary.with_suffix(path.suffix)
        try:
            _write(draft, weights)
            _compare(open_checkpoint(draft), weights)
            draft.replace(temporary)
        finally:
            draft.unlink(missing_ok=True)


def _write(path: Path, weights: Weights) -> None:
    canonical = {weights.output_name(name): name for name in weights.names}
    if path.suffix == ".safetensors":
        infos = {output: weights.info(name) for output, name in canonical.items()}
        write_safetensors(path, infos, lambda output: weights.read([canonical[output]])[canonical[output]])
        return
    import torch

    torch.save(OrderedDict((output, weights.read([name])[name]) for output, name in canonical.items()), path)


def _compare(written: TensorSource, weights: Weights) -> None:
    import torch

    names = [weights.output_name(name) for name in weights.names]
    if list(written.infos) != names:
        raise BadInputError(f"export of {weights.source.label} failed", "the names read back differ")
    for name, output in zip(weights.names, names, strict=True):
        original, copy = weights.read([name])[name], written.read([output])[output]
        if original.dtype != copy.dtype or not torch.equal(_bits(original), _bits(copy)):
            raise BadInputError(f"export of {weights.source.label} failed", f"{output} reads back differently")


def _bits(tensor: Tensor) -> Tensor:
    """The raw bytes of a tensor, so that NaN equals itself."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)
