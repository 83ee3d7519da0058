"""Checkpoints, read lazily by tensor name: files of any format, and folders of several files with an index.

Between two reads nothing stays mapped or in memory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sinder_cli.errors import BadInputError, NoInputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip

LFS_MAGIC = b"version h"  # ttps://git-lfs…
MOST_REPEATED = 1 << 28  # bytes allowed for a tensor that stores fewer numbers than its shape has, as after `expand`
DISTRIBUTED_SUFFIX = ".distcp"  # of each part of a distributed checkpoint
TORCH_MAGIC = (b"PK", b"\x80")  # a zip archive, or the pickle of torch before 1.6
TORCH_SUFFIXES = frozenset({".pth", ".pt", ".bin", ".ckpt", ".tar"})
SMALL = 64 << 20  # bytes: if a smaller file needs more memory than there is, its sizes are wrong
ACCEPTED = "give --weights a file of safetensors, or of torch.save (.pth, .pt, .bin, .ckpt)"


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """The size of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the raw bytes of a tensor, `[bytes]` uint8 on the CPU; a view where that is possible."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def infos_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Return the shapes and dtypes of tensors in memory, by name."""
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


class TensorSource(Protocol):
    """Source of named tensors, which can be listed without being read."""

    @property
    def label(self) -> str: ...

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read whole tensors in their stored dtype; writing into them changes no file."""
        ...


@dataclass(frozen=True)
class SafetensorsFile:
    """A `.safetensors` file. Every read maps it again, so that unneeded pages leave memory."""

    path: Path
    infos: Mapping[str, TensorInfo] = field(repr=False)

    @property
    def label(self) -> str:
        return str(self.path)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        with _opened(self.path) as file:
            return {name: file.get_tensor(name) for name in names}


@dataclass(frozen=True)
class TorchFile:
    """A `.pth`/`.pt` file of tensors, nested dictionaries flattened to dotted names; only tensors are unpickled."""

    path: Path
    infos: Mapping[str, TensorInfo] = field(repr=False)

    @property
    def label(self) -> str:
        return str(self.path)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        stored = _load_torch(self.path)
        return {name: stored[name] for name in names}


@dataclass(frozen=True)
class MemoryTensors:
    """Tensors that a plugin made itself, such as a model drawn from a seed."""

    label: str
    tensors: Mapping[str, Tensor] = field(repr=False)

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        return infos_of(self.tensors)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.tensors[name].clone() for name in names}


def open_checkpoint(path: Path) -> TensorSource:
    """Open a weights file, or a folder that contains one; its content decides the format, not its suffix.

    Only names, shapes and dtypes are read. Raises `NoInputError` if there is no file and `BadInputError` for a file
    that is no checkpoint; an `OSError`, such as missing permission to read, passes.
    """
    if path.is_dir():
        return open_checkpoint(weights_in(path))
    if not path.is_file():
        raise NoInputError(f"cannot read weights {path}", "there is no such file", _elsewhere(path))
    if path.name.endswith(INDEX_SUFFIX):
        return open_shards(path)
    with path.open("rb") as file:
        start = file.read(9)
    if start == LFS_MAGIC:
        raise BadInputError(f"cannot read weights {path}", "it is a pointer of git-lfs, not the file", "git lfs pull")
    if start.startswith(TORCH_MAGIC) and not start.endswith(b"{"):
        _require_plain_archive(path)  # only here, since every later read opens the file again
        return TorchFile(path, infos_of(_load_torch(path)))
    if start[8:] == b"{" or path.suffix.lower() == ".safetensors":
        return open_safetensors(path)
    why, remedy = "it is neither a safetensors file nor one that torch.save wrote", ACCEPTED
    if path.suffix.lower() == DISTRIBUTED_SUFFIX:
        why, remedy = _distributed(path.parent)
    elif path.suffix.lower() in TORCH_SUFFIXES:
        why, remedy = "torch.save did not write this file", "is it complete? fetch it again"
    raise BadInputError(f"cannot read weights {path}", why, remedy)


def _elsewhere(path: Path) -> str:
    """Return advice for a missing weights file: what the user may have meant."""
    text = str(path)
    if "://" in text or text.startswith(("http:/", "https:/")):
        return "fetch it first, and give --weights the file"
    if text.startswith("~"):
        return "the shell expands ~ only at the start of a word: write --weights ~/… with a space, or the whole path"
    if any(sign in text for sign in "*?["):
        return "no file matches this pattern, or it was quoted: give --weights one file"
    return ACCEPTED


def open_safetensors(path: Path) -> SafetensorsFile:
    """Open one `.safetensors` file. Raises `BadInputError` if it is not one."""
    return SafetensorsFile(path, _safetensors_infos(path))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:  # an OSError says nothing about the content of the file
        raise BadInputError(f"cannot read weights {path}", str(error), "is it complete? fetch it again") from error


def _safetensors_infos(path: Path) -> dict[str, TensorInfo]:
    import torch

    with _opened(path) as file:
        infos = {}
        for name in file.offset_keys():  # the order of the file
            part = file.get_slice(name)
            dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
            if dtype is None:
                raise BadInputError(f"cannot read weights {path}", f"{name} has dtype {part.get_dtype()}")
            infos[name] = TensorInfo(tuple(part.get_shape()), getattr(torch, dtype))
        return infos


def _load_torch(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a torch.save file, mapped and not copied. Raises `BadInputError` for other content."""
    import torch

    def load(mmap: bool) -> Any:
        warnings.simplefilter("ignore")  # its warnings are followed by an error, or do not concern us
        if path.suffix.lower() == ".safetensors":  # torch chooses the format by the suffix of a path
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        with path.open("rb") as file:
            if not file.read(2).startswith(TORCH_MAGIC):
                raise ValueError("torch.save did not write this file")
        with warnings.catch_warnings():
            try:
                stored = load(mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                stored = load(mmap=False)  # files older than torch 1.6 are no zip archives and cannot be mapped
    except pickle.UnpicklingError as error:
        if "protocol" in str(error) or "Unsupported operand" in str(error):
            why, remedy = "it was pickled in a way that cannot be read safely", "save it again with plain torch.save"
            raise BadInputError(f"cannot read weights {path}", why, remedy) from error
        remedy = "save the state dict alone: torch.save(model.state_dict(), …), better yet as .safetensors"
        raise BadInputError(
            f"cannot read weights {path}", "it holds more than tensors, and pickles are never trusted", remedy
        ) from error
    except Exception as error:  # a broken pickle can raise anything
        if _is_of_the_machine(error) and not (isinstance(error, MemoryError) and path.stat().st_size < SMALL):
            raise
        why = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        why = "it is damaged" if "enforce fail" in why else why
        raise BadInputError(f"cannot read weights {path}", why, "is it complete? fetch it again") from error
    flat: dict[str, Tensor] = {}
    for name, tensor in _flatten(stored):
        if name in flat:
            raise BadInputError(f"cannot read weights {path}", f"it holds two tensors that are named {name}")
        _require_plain(path, name, tensor)
        flat[name] = tensor
    if not flat:
        raise BadInputError(f"cannot read weights {path}", "it holds no named tensors", "save a state dict")
    return flat


def _require_plain_archive(path: Path) -> None:
    """Raise `BadInputError` for archives unlike those that torch.save writes; incomplete archives are left to torch.

    torch would map compressed members as if they were uncompressed, and take their bytes for numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        return
    names = [member.filename for member in members]
    what = f"cannot read weights {path}"
    if names and all(name.endswith(".npy") for name in names):
        raise BadInputError(what, "it is an archive of NumPy arrays", "save them as a state dict with torch.save")
    if any(name.endswith("/constants.pkl") for name in names):
        raise BadInputError(what, "it is a TorchScript program", "save its tensors: torch.jit.load(…).state_dict()")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        remedy = "save it again: torch.save(torch.load(…, weights_only=True), …)"
        raise BadInputError(what, "its members are compressed, which torch.save never does", remedy)


def _require_plain(path: Path, name: str, tensor: Tensor) -> None:
    """Raise `BadInputError` for tensors not stored plainly: meta, sparse, quantized, or far larger than stored."""
    import torch

    kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else ""
    if not kind and tensor.layout != torch.strided:
        kind = "sparse"
    if kind:
        raise BadInputError(f"cannot read weights {path}", f"{name} is a {kind} tensor", "save plain tensors")
    size = tensor.numel() * tensor.element_size()
    if size > MOST_REPEATED and size > tensor.untyped_storage().nbytes():
        why = f"{name} has {size / 1e9:.1f} GB by its shape, and {tensor.untyped_storage().nbytes()} bytes are stored"
        raise BadInputError(f"cannot read weights {path}", why, "save a contiguous copy")


def _is_of_the_machine(error: Exception) -> bool:
    """Return True if this machine caused a failure, not the file; EINVAL is the file's: its archive is truncated."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL)


def _flatten(stored: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    import torch

    if isinstance(stored, Mapping):
        for name, value in stored.items():
            yield from _flatten(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(stored, list | tuple) and prefix:
        for number, value in enumerate(stored):
            yield from _flatten(value, f"{prefix}.{number}")
    elif isinstance(stored, torch.Tensor):
        yield prefix, stored.detach()


SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = f"model{INDEX_SUFFIX}"


@dataclass(frozen=True)
class Shards:
    """Several safetensors files that together hold one set of tensors, in the order of the index."""

    path: Path  # of the index
    files: Mapping[str, SafetensorsFile] = field(repr=False)  # tensor name → the file that holds it

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
    """Return the weights file or the index in a folder. Raises `NoInputError` if there is neither."""
    found = next((folder / name for name in (SINGLE, INDEX) if (folder / name).is_file()), None)
    if found is None:
        why, remedy = _why_refused(folder)
        raise NoInputError(f"cannot read weights {folder}", why, remedy)
    return found


def _distributed(folder: Path) -> tuple[str, str]:
    turn = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth"
    return "it is a distributed checkpoint of torch", f"turn its folder into one file: {turn}"


def _why_refused(folder: Path) -> tuple[str, str]:
    """Return why a folder has no readable weights, and what to do."""
    if (folder / ".metadata").is_file() or any(folder.glob(f"*{DISTRIBUTED_SUFFIX}")):
        return _distributed(folder)
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter of peft", "put it into its model with merge_and_unload(), and save that"
    return f"the folder has neither {SINGLE} nor {INDEX}", "convert its weights to safetensors, or name a file"


def open_shards(index: Path) -> Shards:
    """Open the shards that an index names, reading names, shapes and dtypes only.

    Raises `BadInputError` if index and shards differ in any name, or for a shard outside the folder.
    """
    located = shard_names(index)
    opened = {shard: open_safetensors(_inside(index, shard)) for shard in dict.fromkeys(located.values())}
    absent = [name for name, shard in located.items() if name not in opened[shard].infos]
    if absent:
        raise _bad(index, f"{_counted(absent)} not in {located[absent[0]]}, contrary to the index")
    for shard, file in opened.items():
        if unlisted := [name for name in file.infos if located.get(name) != shard]:
            raise _bad(index, f"{_counted(unlisted)} in {shard}, contrary to the index")
    return Shards(index, {name: opened[shard] for name, shard in located.items()})


def shard_names(index: Path) -> dict[str, str]:
    """Return the shard of each tensor according to an index. Raises `BadInputError` for a file that is no index."""
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
    """Return the path of a shard, checked to lie in the index's folder or in the hub cache's folder of files."""
    path = index.parent / shard
    try:
        resolved = path.resolve()
        there = resolved.is_file()
    except (OSError, RuntimeError) as error:  # too long a name, or a link to itself
        raise _bad(index, f"shard {shard[:60]!r} is no file ({type(error).__name__})") from error
    if not any(resolved.is_relative_to(root.resolve()) for root in _roots(index.parent.absolute())):
        raise _leaving(index, shard)
    if not there:
        raise NoInputError(f"cannot read weights {index}", f"there is no shard {shard}", "fetch the missing file")
    return path


def _roots(folder: Path) -> list[Path]:
    """Return the folder, and for a snapshot in the hub's cache, whose files are links, the folder of blobs too."""
    return [folder, *([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])]


def _leaving(index: Path, shard: str) -> BadInputError:
    return _bad(index, f"shard {shard!r} is outside the folder")


def _counted(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more are" if len(names) > 1 else " is")


def _bad(index: Path, why: str) -> BadInputError:
    return BadInputError(f"cannot read weights {index}", why, "fetch index and shards again")
