"""The adapter: all deltas ε in one small file, and what they make of the weights that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sinder_cli.backbone.contract import Backbone, LayerMap, WeightRef, trained_references
from sinder_cli.backbone.sources import TensorInfo, TensorSource, infos_of
from sinder_cli.backbone.storing import stored_as, write_safetensors
from sinder_cli.backbone.weights import Weights, rows_of
from sinder_cli.errors import BadInputError, ConflictError
from sinder_cli.events import Emit, Noted, tracked
from sinder_cli.repair.basis import singular_basis
from sinder_cli.repair.deltas import Deltas, target_name
from sinder_cli.repair.headers import REMEDY, read_header
from sinder_cli.repair.settings import WITHOUT_EFFECT, RepairSettings

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "sinder-adapter-1"


@dataclass(frozen=True)
class Adapter:
    """What an adapter file holds: ε by target, float32 `[r]`, and which weights they belong to."""

    path: Path
    model: str
    base_fingerprint: str
    deltas: Mapping[str, Tensor] = field(repr=False)

    def changed_names(self, layers: LayerMap) -> list[str]:
        """The canonical names of the tensors that hold its targets, each once."""
        references = target_references(layers)
        return list(dict.fromkeys(references[name].name for name in self.deltas))

    def applied(self, backbone: Backbone, emit: Emit) -> Backbone:
        """See `adapted`."""
        return adapted(backbone, self, emit)


def write_adapter(path: Path, model: str, fingerprint: str, deltas: Deltas, settings: RepairSettings) -> None:
    """Write the deltas that are not zero, with the fingerprint of the weights that they belong to."""
    tensors = {target.name: target.delta.float().cpu() for target in deltas.changed}
    metadata = {
        "format": FORMAT,
        "model": model,
        "base_fingerprint": fingerprint,
        "settings": settings.model_dump_json(exclude=set(WITHOUT_EFFECT)),
    }
    write_safetensors(path, infos_of(tensors), tensors.values(), metadata)


def read_adapter(path: Path) -> Adapter:
    """Read an adapter file; nothing but its header is read of a file that is none.

    Raises `NoInputError` where there is no file and `BadInputError` for anything that `write_adapter` does not write.
    """
    from safetensors import safe_open

    what = f"cannot read adapter {path}"
    metadata = read_header(path)
    if metadata.get("format") != FORMAT:
        raise BadInputError(what, f"its format is {metadata.get('format')!r}, not {FORMAT!r}", REMEDY)
    with safe_open(path, framework="pt") as file:
        deltas = {name: file.get_tensor(name) for name in file.offset_keys()}
    try:
        adapter = Adapter(path, metadata["model"], metadata["base_fingerprint"], deltas)
    except KeyError as error:
        raise BadInputError(what, f"its header has no {error}", REMEDY) from error
    for name, delta in adapter.deltas.items():
        if delta.dtype != torch.float32 or not bool(delta.isfinite().all()):
            raise BadInputError(what, f"{name} is not of finite float32 values", "is it whole? fetch it again")
    return adapter


@dataclass(frozen=True)
class AdaptedTensors:
    """A source of tensors in which some rows of some tensors are repaired as they are read; these rows are held."""

    source: TensorSource
    rows: Mapping[str, tuple[tuple[WeightRef, Tensor], ...]] = field(repr=False)  # by stored name
    adapter: Path

    @property
    def label(self) -> str:
        return f"{self.source.label}, adapted by {self.adapter}"

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self.source.infos

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read whole tensors, repaired; writing into them changes no file."""
        found = self.source.read(names)
        for name, tensor in found.items():
            for ref, rows in self.rows.get(name, ()):
                rows_of(tensor, ref).copy_(rows)
        return found


def adapted(backbone: Backbone, adapter: Adapter, emit: Emit) -> Backbone:
    """The backbone with W₀ + U diag(ε) Vᵀ for every target of the adapter, in the stored dtypes.

    The arithmetic is that of a repair on the CPU: on the same machine its result comes back bit for bit. Elsewhere U
    and V differ by what `SingularBasis` keeps from mattering.
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
        rows.setdefault(weights.stored_names[ref.name], []).append((ref, stored_as(repaired, str(ref), stored.dtype)))
    values = sum(len(delta) for delta in adapter.deltas.values())
    emit(Noted(f"{adapter.path}: changed {values:,} singular values of {len(references)} weights"))
    source = AdaptedTensors(weights.source, {name: tuple(each) for name, each in rows.items()}, adapter.path)
    return replace(backbone, weights=replace(weights, source=source))


def target_references(layers: LayerMap) -> dict[str, WeightRef]:
    """Every weight that an adapter may change, by the name that its delta has there."""
    return {
        target_name(block, role): ref
        for block, roles in enumerate(layers.blocks)
        for role, ref in trained_references(roles).items()
    }


def _adapted_references(layers: LayerMap, weights: Weights, adapter: Adapter) -> dict[str, WeightRef]:
    """Where each target of the adapter lies, if the adapter is one of these weights."""
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
        rank = min(rows_of(torch.empty(weights.shape(ref.name), device="meta"), ref).shape)
        if delta.shape != (rank,):
            raise BadInputError(what, f"{name} has shape {list(delta.shape)}, and the weight {rank} singular values")
    return {name: references[name] for name in adapter.deltas}
