"""Writing safetensors one tensor at a time, in any order of names.

The library's own writer needs all tensors in memory at once and sorts them; this one keeps the order in which tensors
were read and has one of them in memory. In the tests, the library reads every such file back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sinder_cli.backbone.sources import SAFETENSORS_DTYPES, TensorInfo, bytes_of
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
    """Write the tensors that `infos` lists, taken one at a time in that order; on failure `path` stays as it was."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        stream_safetensors(file, infos, tensors, metadata)


def stream_safetensors(
    file: IO[bytes],
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the safetensors format to an open binary file: header length, JSON header padded to 8 bytes, data."""

    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, info in infos.items():
        stop = offset + info.bytes
        header[name] = {"dtype": _code(name, info), "shape": list(info.shape), "data_offsets": [offset, stop]}
        offset = stop
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for (name, info), tensor in zip(infos.items(), tensors, strict=True):
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise AssertionError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, announced as {info}")
        file.write(bytes_of(tensor).numpy().data)


def stored_as(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Return `tensor` in the dtype of the file. Raises `BadInputError` if a value is not finite in that dtype."""
    import torch

    cast = tensor.to(dtype)
    if cast.is_floating_point() and not bool(torch.isfinite(cast).all()):
        raise BadInputError(f"cannot store {name}", f"it holds values that are not finite in {dtype}")
    return cast


def _code(name: str, info: TensorInfo) -> str:
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    code = codes.get(str(info.dtype).removeprefix("torch."))
    if code is None:
        raise BadInputError(f"cannot store {name} as safetensors", f"there is no code for {info.dtype}")
    return code


METADATA = {"format": "pt"}  # transformers refuses a file without it


def write_sharded(
    folder: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[Tensor], most: int, stem: str = "model"
) -> list[Path]:
    """Write the tensors that `infos` lists, one at a time, to files of at most `most` bytes of tensors each.

    A single file is `model.safetensors`; several are `model-00001-of-00003.safetensors` and so on, with
    `model.safetensors.index.json`. A tensor larger than `most` has a file of its own. Returns the written files.
    """
    shards = list(_shards(infos, most))
    stream = iter(tensors)
    if len(shards) == 1:
        path = folder / f"{stem}.safetensors"
        write_safetensors(path, infos, stream, METADATA)
        return [path]
    written = []
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        path = folder / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(path, {name: infos[name] for name in names}, islice(stream, len(names)), METADATA)
        places |= dict.fromkeys(names, path.name)
        written.append(path)
    index = folder / f"{stem}.safetensors.index.json"
    total = {"total_size": sum(info.bytes for info in infos.values())}
    index.write_text(json.dumps({"metadata": total, "weight_map": places}, indent=2) + "\n", encoding="utf-8")
    return [*written, index]


def _shards(infos: Mapping[str, TensorInfo], most: int) -> Iterator[list[str]]:
    """Yield the names of the tensors of each file, in order; each file takes as many as fit."""
    names: list[str] = []
    size = 0
    for name, info in infos.items():
        if names and size + info.bytes > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += info.bytes
    yield names
