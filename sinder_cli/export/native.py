"""The backbone's own format: `.safetensors` or `.pth`, official keys, order and dtype."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.backbone.sources import open_checkpoint
from sinder_cli.backbone.storing import write_safetensors
from sinder_cli.backbone.weights import Weights
from sinder_cli.errors import BadInputError, StorageError, UsageError
from sinder_cli.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt")


def require_native_suffix(path: Path) -> None:
    """Raises `UsageError` for a file name that says no format we write."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"cannot export to {path}", f"unknown suffix {path.suffix!r}", f"use {' or '.join(SUFFIXES)}")


def write_native(path: Path, weights: Weights) -> None:
    """Write all tensors of a backbone under their exported names; read back and compared before it gets its name.

    Raises `UsageError` for another suffix and `BadInputError` if what was written differs, which leaves nothing.
    """
    require_native_suffix(path)
    with replacing(path) as temporary:
        draft = temporary.with_suffix(path.suffix)
        try:
            _write(draft, weights)
            _compare(Weights.of(open_checkpoint(draft)), weights)
            draft.replace(temporary)
        finally:
            draft.unlink(missing_ok=True)


def _write(path: Path, weights: Weights) -> None:
    tensors = weights.stream(weights.names)
    if path.suffix == ".safetensors":
        write_safetensors(path, weights.output_infos(), (tensor for _, tensor in tensors))
        return
    import torch

    state = OrderedDict((weights.output_name(name), tensor.clone()) for name, tensor in tensors)
    try:
        torch.save(state, path)
    except RuntimeError as error:  # how torch's zip writer tells of a full disk
        raise StorageError(f"cannot write {path}", str(error), "free space there and run again") from error


def _compare(written: Weights, weights: Weights) -> None:
    import torch

    if list(written.output_infos().items()) != list(weights.output_infos().items()):
        raise BadInputError(f"export of {weights.source.label} failed", "names, shapes or dtypes read back differ")
    pairs = zip(weights.stream(weights.names), written.stream(written.names), strict=True)
    for (_, original), (output, copy) in pairs:
        if not torch.equal(_bits(original), _bits(copy)):
            raise BadInputError(f"export of {weights.source.label} failed", f"{output} reads back differently")


def _bits(tensor: Tensor) -> Tensor:
    """The raw bytes of a tensor, so that NaN equals itself."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)
