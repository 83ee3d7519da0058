"""Writing safetensors one tensor at a time, in any order of names.

The library's own writer wants all tensors in memory at once and sorts them; what we write keeps the order of what was
read and holds one tensor. The library reads every such file back in the tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sinder_cli.backbone.sources import SAFETENSORS_DTYPES, TensorInfo
from sinder_cli.errors import BadInputError
from sinder_cli.files import replacing

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def write_safetensors(
    path: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the tensors that `infos` announces, whole or not at all; they are taken one at a time, in that order."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        stream_safetensors(file, infos, tensors, metadata)


def stream_safetensors(
    file: IO[bytes],
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the safetensors format to an open binary file: header length, JSON header padded to 8 bytes, data."""
    import torch

    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, info in infos.items():
        stop = offset + _bytes_of(info)
        header[name] = {"dtype": _code(name, info), "shape": list(info.shape), "data_offsets": [offset, stop]}
        offset = stop
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for (name, info), tensor in zip(infos.items(), tensors, strict=True):
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise AssertionError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, announced as {info}")
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def stored_as(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """`tensor` in the dtype of the file. Raises `BadInputError` where that loses a finite value to infinity."""
    import torch

    cast = tensor.to(dtype)
    if cast.is_floating_point() and not bool(torch.isfinite(cast).all()):
        raise BadInputError(f"cannot store {name}", f"it holds values that are not finite in {dtype}")
    return cast


def _bytes_of(info: TensorInfo) -> int:
    count = info.dtype.itemsize
    for size in info.shape:
        count *= size
    return count


def _code(name: str, info: TensorInfo) -> str:
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    code = codes.get(str(info.dtype).removeprefix("torch."))
    if code is None:
        raise BadInputError(f"cannot store {name} as safetensors", f"there is no code for {info.dtype}")
    return code
