"""Small files with the changes of a repair, adapters and deltas, and their application to the original weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from sinder_cli.backbone.contract import Backbone, LayerMap, WeightRef, trained_references
from sinder_cli.backbone.sources import SafetensorsFile, TensorSource, infos_of, open_checkpoint
from sinder_cli.backbone.storing import stored_as, write_safetensors
from sinder_cli.backbone.weights import Weights, rows_of
from sinder_cli.errors import BadInputError, ConflictError, NoInputError
from sinder_cli.events import Emit, Noted, tracked
from sinder_cli.repairing.deltas import Deltas, singular_basis, target_name
from sinder_cli.repairing.settings import WITHOUT_EFFECT, RepairSettings

if TYPE_CHECKING:
    from torch import Tensor


REMEDY = "give the adapter.safetensors of a run"


def read_header(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file, and nothing else of it.

    Raises `NoInputError` if there is no file, and `BadInputError` if it is not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    what = f"cannot read adapter {path}"
    if not path.is_file():
        raise NoInputError(what, "it is a folder" if path.is_dir() else "there is no such file", REMEDY)
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise BadInputError(what, str(error), REMEDY) from error


ADAPTER_FORMAT = "sinder-adapter-1"


@dataclass(frozen=True)
class Adapter:
    """The contents of an adapter file: ε by target, float32 `[r]`, and the weights that they belong to."""

    path: Path
    model: str
    base_fingerprint: str
    deltas: Mapping[str, Tensor] = field(repr=False)

    def changed_names(self, layers: LayerMap) -> list[str]:
        """Return the canonical names of the tensors that hold its targets, each once."""
        references = target_references(layers)
        return list(dict.fromkeys(references[name].name for name in self.deltas))

    def applied(self, backbone: Backbone, emit: Emit) -> Backbone:
        """Return the adapted backbone; see `adapted`."""
        return adapted(backbone, self, emit)


def write_adapter(path: Path, model: str, fingerprint: str, deltas: Deltas, settings: RepairSettings) -> None:
    """Write the deltas that are not zero, with the fingerprint of the weights that they belong to."""
    tensors = {target.name: target.delta.float().cpu() for target in deltas.changed}
    metadata = {
        "format": ADAPTER_FORMAT,
        "model": model,
        "base_fingerprint": fingerprint,
        "settings": settings.model_dump_json(exclude=set(WITHOUT_EFFECT)),
    }
    write_safetensors(path, infos_of(tensors), tensors.values(), metadata)


def read_adapter(path: Path) -> Adapter:
    """Read an adapter file; of a file in another format, only the header is read.

    Raises `NoInputError` if there is no file, and `BadInputError` for anything that `write_adapter` does not write.
    """
    from safetensors import safe_open

    what = f"cannot read adapter {path}"
    metadata = read_header(path)
    if metadata.get("format") != ADAPTER_FORMAT:
        raise BadInputError(what, f"its format is {metadata.get('format')!r}, not {ADAPTER_FORMAT!r}", REMEDY)
    with safe_open(path, framework="pt") as file:
        deltas = {name: file.get_tensor(name) for name in file.offset_keys()}
    try:
        adapter = Adapter(path, metadata["model"], metadata["base_fingerprint"], deltas)
    except KeyError as error:
        raise BadInputError(what, f"its header has no {error}", REMEDY) from error
    for name, delta in adapter.deltas.items():
        if delta.dtype != torch.float32 or not bool(delta.isfinite().all()):
            raise BadInputError(what, f"{name} is not of finite float32 values", "is it complete? fetch it again")
    return adapter


def adapted(backbone: Backbone, adapter: Adapter, emit: Emit) -> Backbone:
    """Return the backbone with W₀ + U diag(ε) Vᵀ for every target of the adapter, in the stored dtypes.

    The arithmetic is that of a repair on the CPU: on the same machine the result is bit-identical. Elsewhere U and V
    differ, in ways that `SingularBasis` makes harmless.
    Raises `ConflictError` for weights that the adapter was not made for, and `BadInputError` for a delta of no target
    or a value that the stored dtype cannot hold.
    """
    weights = backbone.weights
    references = _adapted_references(backbone.layers, weights, adapter)
    rows: dict[str, list[tuple[WeightRef, Tensor]]] = {}
    for name, ref in tracked(references.items(), emit, "adapting", len(references), "weights"):
        stored = rows_of(weights.read([ref.name])[ref.name], ref)
        wide = stored.to(torch.float32, copy=True)  # as the module of a repair holds it
        repaired = wide + singular_basis(wide).change(adapter.deltas[name])
        rows.setdefault(ref.name, []).append((ref, stored_as(repaired, str(ref), stored.dtype)))
    values = sum(len(delta) for delta in adapter.deltas.values())
    emit(Noted(f"{adapter.path}: changed {values:,} singular values of {len(references)} weights"))
    label = f"{weights.source.label}, adapted by {adapter.path}"
    return replace(backbone, weights=weights.mapped(label, {name: partial(_with_rows, rows[name]) for name in rows}))


def _with_rows(rows: Sequence[tuple[WeightRef, Tensor]], tensor: Tensor) -> Tensor:
    """Return a whole tensor with the rows of each reference replaced."""
    for ref, part in rows:
        rows_of(tensor, ref).copy_(part)
    return tensor


def target_references(layers: LayerMap) -> dict[str, WeightRef]:
    """Return every weight that an adapter may change, by the name of its delta."""
    return {
        target_name(block, role): ref
        for block, roles in enumerate(layers.blocks)
        for role, ref in trained_references(roles).items()
    }


def _adapted_references(layers: LayerMap, weights: Weights, adapter: Adapter) -> dict[str, WeightRef]:
    """Return the reference of each target of the adapter. Raises as `adapted` does, if it is not for these weights."""
    fingerprint = weights.fingerprint()
    if fingerprint != adapter.base_fingerprint:
        raise ConflictError(
            f"adapter {adapter.path} does not fit {weights.source.label}",
            f"it was made for weights of {adapter.model} with fingerprint {adapter.base_fingerprint}, "
            f"and these have {fingerprint}",
            "give the weights that were repaired",
        )
    references = target_references(layers)
    for name, delta in adapter.deltas.items():
        what = f"cannot use adapter {adapter.path}"
        if name not in references:
            raise BadInputError(what, f"{name} is no target weight of this model")
        ref = references[name]
        rank = min(weights.shape_of(ref))
        if delta.shape != (rank,):
            raise BadInputError(what, f"{name} has shape {list(delta.shape)}, and the weight {rank} singular values")
    return {name: references[name] for name in adapter.deltas}


DIFF_FORMAT = "sinder-diff-1"
OLD_DIFF_FORMAT = "sinder-delta-1"  # the same under its old name


@dataclass(frozen=True)
class Diff:
    """A diff file: whole tensors by canonical name, and the fingerprints of the weights before and after."""

    path: Path
    model: str
    base_fingerprint: str
    fingerprint: str
    tensors: TensorSource = field(repr=False)

    def changed_names(self, layers: LayerMap) -> list[str]:  # noqa: ARG002 - as of every change
        """Return the canonical names of the tensors that it replaces."""
        return list(self.tensors.infos)

    def applied(self, backbone: Backbone, emit: Emit) -> Backbone:
        """Return the backbone with these tensors in place of its own, with the same bits as written.

        Raises `ConflictError` for weights that the diff was not made for, and `BadInputError` for a file that has
        changed since.
        """
        weights = backbone.weights
        found = weights.fingerprint()
        if found != self.base_fingerprint:
            raise ConflictError(
                f"diff {self.path} does not fit {weights.source.label}",
                f"it was made for weights of {self.model} with fingerprint {self.base_fingerprint}, "
                f"and these have {found}",
                "give the weights that were repaired",
            )
        what, remedy = f"cannot use diff {self.path}", "is it complete? fetch it again"
        for name, info in self.tensors.infos.items():
            if name not in weights or weights.info(name) != info:
                raise BadInputError(what, f"{name} is no tensor of this model, or of another shape or dtype", remedy)
        names = list(self.tensors.infos)
        label = f"{weights.source.label}, changed by {self.tensors.label}"
        changed = weights.mapped(label, {name: partial(self._tensor, name) for name in names})
        if changed.fingerprint() != self.fingerprint:
            raise BadInputError(what, "its tensors are not those that were written", remedy)
        emit(Noted(f"{self.path}: replaced {len(names)} tensors"))
        return replace(backbone, weights=changed)

    def _tensor(self, name: str, original: Tensor) -> Tensor:  # noqa: ARG002 - it is replaced as a whole
        return self.tensors.read([name])[name]


def write_diff(path: Path, model: str, base_fingerprint: str, weights: Weights, names: list[str]) -> None:
    """Write the named tensors, one at a time, with the fingerprint of the weights before and after."""
    metadata = {
        "format": DIFF_FORMAT,
        "model": model,
        "base_fingerprint": base_fingerprint,
        "fingerprint": weights.fingerprint(),
    }
    infos = {name: weights.info(name) for name in names}
    write_safetensors(path, infos, (tensor for _, tensor in weights.stream(names)), metadata)


def read_diff(path: Path, metadata: Mapping[str, str]) -> Diff:
    """Open a diff whose header has been read; its tensors are read on demand. Raises `BadInputError`."""
    tensors = open_checkpoint(path)
    assert isinstance(tensors, SafetensorsFile)
    try:
        return Diff(path, metadata["model"], metadata["base_fingerprint"], metadata["fingerprint"], tensors)
    except KeyError as error:
        raise BadInputError(f"cannot read diff {path}", f"its header has no {error}", "export it again") from error


class Change(Protocol):
    """A file that turns the weights that it was made for into repaired ones."""

    @property
    def path(self) -> Path: ...

    @property
    def model(self) -> str: ...

    @property
    def base_fingerprint(self) -> str: ...

    def changed_names(self, layers: LayerMap) -> list[str]:
        """Return the canonical names of the tensors that it changes."""
        ...

    def applied(self, backbone: Backbone, emit: Emit) -> Backbone:
        """Return the backbone with the change made. Raises `ConflictError` for weights that it was not made for."""
        ...


def read_change(path: Path) -> Change:
    """Read an adapter, or open a diff; of a file that is neither, only the header is read.

    Raises `NoInputError` if there is no file, and `BadInputError` for a file of another format.
    """
    metadata = read_header(path)
    kind = metadata.get("format")
    if kind == ADAPTER_FORMAT:
        return read_adapter(path)
    if kind in (DIFF_FORMAT, OLD_DIFF_FORMAT):
        return read_diff(path, metadata)
    why = f"its format is {kind!r}, neither {ADAPTER_FORMAT!r} nor {DIFF_FORMAT!r}"
    raise BadInputError(f"cannot read adapter {path}", why, REMEDY)
