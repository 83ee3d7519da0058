"""A Hugging Face folder of weights: one safetensors file, or several with an index of which tensor lies in which."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.backbone.sources import SafetensorsFile, TensorInfo, open_safetensors
from sinder_cli.errors import BadInputError, NoInputError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = f"model{INDEX_SUFFIX}"


@dataclass(frozen=True)
class Shards:
    """Several safetensors files that hold one set of tensors, in the order of the index."""

    path: Path  # of the index
    files: Mapping[str, SafetensorsFile] = field(repr=False)  # tensor name → the file it lies in

    @property
    def label(self) -> str:
        return str(self.path)

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: file.infos[name] for name, file in self.files.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name].path, []).append(name)
        return {
            name: tensor for wanted in by_file.values() for name, tensor in self.files[wanted[0]].read(wanted).items()
        }


def weights_in(folder: Path) -> Path:
    """The weights file or the index in a folder. Raises `NoInputError` where there is neither."""
    found = next((folder / name for name in (SINGLE, INDEX) if (folder / name).is_file()), None)
    if found is None:
        why, remedy = _told(folder)
        raise NoInputError(f"cannot read weights {folder}", why, remedy)
    return found


def _told(folder: Path) -> tuple[str, str]:
    """Why a folder has no weights that can be read, and what to do."""
    if (folder / ".metadata").is_file() or any(folder.glob("*.distcp")):
        turn = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth"
        return "it is a distributed checkpoint of torch", f"turn it into one file: {turn}"
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter of peft", "put it into its model with merge_and_unload(), and save that"
    return f"the folder has neither {SINGLE} nor {INDEX}", "convert its weights to safetensors, or name a file"


def open_shards(index: Path) -> Shards:
    """Open the shards that an index names, reading names, shapes and dtypes only.

    Raises `BadInputError` where index and shards differ in a single name, or for a shard outside the folder.
    """
    located = shard_names(index)
    opened = {shard: open_safetensors(_inside(index, shard)) for shard in dict.fromkeys(located.values())}
    absent = [name for name, shard in located.items() if name not in opened[shard].infos]
    if absent:
        raise _bad(index, f"{_counted(absent)} not in {located[absent[0]]}, against the index")
    for shard, file in opened.items():
        if unlisted := [name for name in file.infos if located.get(name) != shard]:
            raise _bad(index, f"{_counted(unlisted)} in {shard}, against the index")
    return Shards(index, {name: opened[shard] for name, shard in located.items()})


def shard_names(index: Path) -> dict[str, str]:
    """Which tensor lies in which shard, as an index says. Raises `BadInputError` for a file that is no index."""
    try:
        located = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _bad(index, f"it is no index of shards ({type(error).__name__}: {error})") from error
    if not isinstance(located, dict) or not located:
        raise _bad(index, "its weight_map is no table of tensors")
    for shard in located.values():
        if not isinstance(shard, str) or Path(shard).suffix != ".safetensors":
            raise _bad(index, f"shard {shard!r} is no .safetensors file")
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise _leaving(index, shard)
    return located


def _inside(index: Path, shard: str) -> Path:
    """The path of a shard, once it is sure to lie in the index's folder, or where the hub's cache keeps its files."""
    path = index.parent / shard
    try:
        resolved = path.resolve()
        there = resolved.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a link to itself
        raise _bad(index, f"shard {shard[:60]!r} is no file ({type(error).__name__})") from error
    if not any(resolved.is_relative_to(root.resolve()) for root in _roots(index.parent.absolute())):
        raise _leaving(index, shard)
    if not there:
        raise NoInputError(f"cannot read weights {index}", f"there is no shard {shard}", "fetch the missing file")
    return path


def _roots(folder: Path) -> list[Path]:
    """The folder, and in the hub's cache, where snapshots are links, the folder of blobs beside them."""
    return [folder, *([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])]


def _leaving(index: Path, shard: str) -> BadInputError:
    return _bad(index, f"shard {shard!r} is outside the folder")


def _counted(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more are" if len(names) > 1 else " is")


def _bad(index: Path, why: str) -> BadInputError:
    return BadInputError(f"cannot read weights {index}", why, "fetch index and shards again")
