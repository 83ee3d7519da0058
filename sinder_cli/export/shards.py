"""Weights as safetensors in one file, or in several with an index, as Hugging Face libraries read them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.backbone.sources import TensorInfo
from sinder_cli.backbone.storing import write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

METADATA = {"format": "pt"}  # without it transformers refuses a file


def write_sharded(
    folder: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[Tensor], most: int, stem: str = "model"
) -> list[Path]:
    """Write the tensors that `infos` announces, one at a time, to files of at most `most` bytes of tensors each.

    One file is `model.safetensors`; several are `model-00001-of-00003.safetensors` and so on, with
    `model.safetensors.index.json`. A tensor larger than `most` has a file of its own. Returns what was written.
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
    total = {"total_size": sum(map(_bytes_of, infos.values()))}
    index.write_text(json.dumps({"metadata": total, "weight_map": places}, indent=2) + "\n", encoding="utf-8")
    return [*written, index]


def _shards(infos: Mapping[str, TensorInfo], most: int) -> Iterator[list[str]]:
    """The names of each file, in order, each as full as it gets."""
    names: list[str] = []
    size = 0
    for name, info in infos.items():
        if names and size + _bytes_of(info) > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes_of(info)
    yield names


def _bytes_of(info: TensorInfo) -> int:
    return prod(info.shape) * info.dtype.itemsize
