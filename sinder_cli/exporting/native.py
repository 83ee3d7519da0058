"""The backbone's own format: `.safetensors` or `.pth`, with official keys, order and dtype.

`torch.save` needs all tensors in memory at once; here they are written one at a time. Its format is a zip archive of
uncompressed members: `data.pkl`, a pickle that describes an ordered dictionary of tensors and refers to their storages
by number, and `data/0`, `data/1`, … with the bytes. It holds tensors only, so that `torch.load(…, weights_only=True)`
reads it, memory-mapped if asked.
"""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinder_cli.backbone.sources import TensorInfo, bytes_of, open_checkpoint
from sinder_cli.backbone.storing import write_safetensors
from sinder_cli.backbone.weights import Weights, same_bits
from sinder_cli.errors import BadInputError
from sinder_cli.exporting.targets import ExportCheck, ExportTarget, Loading, Plan


def _write(plan: Plan, path: Path) -> None:
    write_weights(path, plan.backbone.weights)


def write_weights(path: Path, weights: Weights) -> None:
    """Write all tensors under their export names, one at a time, in the format that the suffix indicates."""
    write = write_safetensors if path.suffix == ".safetensors" else write_torch_file
    write(path, weights.output_infos(), (tensor for _, tensor in weights.stream(weights.names)))


def _verify(plan: Plan, path: Path) -> ExportCheck:
    return read_back(path, plan.backbone.weights)


def read_back(path: Path, weights: Weights) -> ExportCheck:
    """Compare names, order, shapes, dtypes and bits of a file with the weights.

    Raises `BadInputError` for a difference.
    """
    what = f"export of {weights.source.label} failed"
    written = Weights.of(open_checkpoint(path))
    if list(written.output_infos().items()) != list(weights.output_infos().items()):
        raise BadInputError(what, "names, shapes or dtypes differ when they are read back", "report it")
    pairs = zip(weights.stream(weights.names), written.stream(written.names), strict=True)
    for (_, original), (output, copy) in pairs:
        if not same_bits(original, copy):
            raise BadInputError(what, f"{output} differs when it is read back", "check the disk")
    return ExportCheck("read back bit for bit", difference=0.0, tolerance=0.0, versions={"torch": torch.__version__})


ALIGNMENT = 64  # bytes; as torch does, for files that are memory-mapped
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # fixed, so that the same tensors make the same file
_HEADER = 30  # bytes of a member's header before its name
_ZIP64 = 20  # bytes that zipfile adds to the header of a large member
_PADDING = 0x4246  # an extra field of this number is padding to PyTorch


def write_torch_file(path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[Tensor]) -> None:
    """Write the tensors that `infos` describes; they are taken one at a time, in that order."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", _description(infos))
        _add(archive, "byteorder", sys.byteorder.encode())
        for number, ((name, info), tensor) in enumerate(zip(infos.items(), tensors, strict=True)):
            if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
                raise AssertionError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, announced as {info}")
            _add(archive, f"data/{number}", bytes_of(tensor).numpy().data)
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Add a member whose content begins at a multiple of `ALIGNMENT`."""
    member = zipfile.ZipInfo(f"archive/{name}", _ZIP_TIME)
    size = len(content)
    large = size * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's own rule
    member.file_size = size
    assert archive.fp is not None
    begin = archive.fp.tell() + _HEADER + len(member.filename) + (_ZIP64 if large else 0) + 4
    padding = -begin % ALIGNMENT
    member.extra = _PADDING.to_bytes(2, "little") + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(member, "w", force_zip64=large) as file:
        file.write(content)


class _Storage:
    """The bytes of one tensor, which a pickle refers to by number."""

    def __init__(self, number: int, kind: str, size: int) -> None:
        self.key = ("storage", getattr(torch, kind), str(number), "cpu", size)


class _Described:
    """A tensor that is pickled in the form that `torch.load` reads."""

    def __init__(self, number: int, info: TensorInfo) -> None:
        self.number, self.info = number, info

    def __reduce__(self) -> tuple[Any, ...]:
        shape, dtype = self.info.shape, self.info.dtype
        strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        kind = torch.storage._dtype_to_storage_type_map().get(dtype)
        if kind is None:  # a dtype without a storage of its own, such as float8
            storage = _Storage(self.number, "UntypedStorage", prod(shape) * dtype.itemsize)
            return torch._utils._rebuild_tensor_v3, (storage, 0, shape, strides, False, OrderedDict(), dtype)
        storage = _Storage(self.number, kind, prod(shape))
        return torch._utils._rebuild_tensor_v2, (storage, 0, shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.key if isinstance(obj, _Storage) else None


def _description(infos: Mapping[str, TensorInfo]) -> bytes:
    file = io.BytesIO()
    described = OrderedDict((name, _Described(number, info)) for number, (name, info) in enumerate(infos.items()))
    _Pickler(file, protocol=2).dump(described)
    return file.getvalue()


def loading_of_weights(_: Plan, place: str) -> Loading:
    """Return how a file of weights is loaded as a state dict."""
    if place.endswith(".safetensors"):
        return Loading("from safetensors.torch import load_file", f"state = load_file({place!r})")
    return Loading("import torch", f"state = torch.load({place!r}, map_location='cpu', weights_only=True)")


TARGET = ExportTarget(
    kind="file",
    summary="the backbone's own keys, order and dtype",
    write=_write,
    verify=_verify,
    loading=loading_of_weights,
    suffixes=(".safetensors", ".pth", ".pt"),
    options=frozenset({"--dtype"}),
)
