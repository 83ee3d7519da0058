"""Weights in several files, as Hugging Face libraries write and read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import load_torch_model, split_torch_state_dict_into_shards
from safetensors.torch import load_file
from torch import Tensor, nn

from sinder_cli.backbone.sources import infos_of
from sinder_cli.backbone.storing import write_sharded
from sinder_cli.errors import UsageError
from sinder_cli.exporting.targets import parse_size


class Layers(nn.Module):
    """Six tensors of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 30) for width in (10, 40, 5))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return dict(Layers().state_dict())


def test_what_fits_is_one_file(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    (path,) = write_sharded(tmp_path, infos_of(tensors), tensors.values(), 1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == [path.name] == ["model.safetensors"]
    assert all(torch.equal(load_file(path)[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("most", [1, 5000, 6000])
def test_files_and_index_are_those_of_the_library(tensors: dict[str, Tensor], tmp_path: Path, most: int) -> None:
    written = write_sharded(tmp_path, infos_of(tensors), tensors.values(), most)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=most)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == split.tensor_to_filename
    assert index["metadata"]["total_size"] == split.metadata["total_size"]
    assert {path.name for path in written} == {"model.safetensors.index.json", *split.filename_to_tensors}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}


def test_no_file_of_several_tensors_is_larger_than_asked_for(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    *shards, _ = write_sharded(tmp_path, infos_of(tensors), tensors.values(), 1300)
    held = [load_file(path) for path in shards]
    assert [name for shard in held for name in shard] == list(tensors)
    assert all(len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= 1300 for shard in held)
    assert max(len(shard) for shard in held) > 1


def test_the_library_loads_them(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_sharded(tmp_path, infos_of(tensors), tensors.values(), 1300)
    module = Layers()
    load_torch_model(module, tmp_path)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_tensors_are_taken_when_their_file_is_written(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    there: list[int] = []

    def taken() -> Iterator[Tensor]:
        for tensor in tensors.values():
            there.append(len(list(tmp_path.glob("model-*"))))
            yield tensor

    write_sharded(tmp_path, infos_of(tensors), taken(), 1)
    assert there == list(range(len(tensors)))


def test_a_missing_tensor_is_a_bug(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        write_sharded(tmp_path, infos_of(tensors), list(tensors.values())[:-1], 1300)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 MiB", 500 << 20), ("1.5kb", 1500), ("123", 123), (" 2 gib ", 2 << 30)],
)
def test_a_size_has_a_unit_or_none(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-5GB", "0", "5TB", "5 G B", "1e9"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="it is not a number of bytes"):
        parse_size(text)
