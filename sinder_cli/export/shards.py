"""Safetensors in one file, or in several with an index as Hugging Face has them; one tensor in memory at a time."""

from __future__ import annotations

from math import prod
from pathlib import Path

from sinder_cli.backbone.sources import TensorInfo
from sinder_cli.backbone.storing import write_safetensors
from sinder_cli.backbone.weights import Weights
from sinder_cli.files import write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}  # what transformers and timm look for


def write_shards(folder: Path, weights: Weights, most: int) -> None:
    """Write all tensors into `folder` under the names of their export, no file holding more than `most` bytes of them.

    A single tensor that is larger has a file of its own.
    """
    infos = weights.output_infos()
    stored = {weights.output_name(name): name for name in weights.names}
    shards = divided_by_size(infos, most)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = (tensor for _, tensor in weights.stream(stored[name] for name in names))
        write_safetensors(folder / file, {name: infos[name] for name in names}, tensors, METADATA)
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(map(size_of, infos.values()))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def divided_by_size(infos: dict[str, TensorInfo], most: int) -> list[list[str]]:
    """The names in their order, in runs of at most `most` bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + size_of(info) > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += size_of(info)
    return shards


def size_of(info: TensorInfo) -> int:
    """Bytes of a tensor."""
    return prod(info.shape) * info.dtype.itemsize
