"""The patch: the changed tensors of a repair alone, and what they make of the weights that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.backbone.contract import Backbone, LayerMap
from sinder_cli.backbone.sources import SafetensorsFile, TensorInfo, TensorSource, open_checkpoint
from sinder_cli.backbone.storing import write_safetensors
from sinder_cli.backbone.weights import Weights
from sinder_cli.errors import BadInputError, ConflictError
from sinder_cli.events import Emit, Noted

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "sinder-delta-1"


@dataclass(frozen=True)
class Patch:
    """A patch file: whole tensors by canonical name, and the fingerprints of the weights before and after."""

    path: Path
    model: str
    base_fingerprint: str
    fingerprint: str
    tensors: TensorSource = field(repr=False)

    def changed_names(self, layers: LayerMap) -> list[str]:  # noqa: ARG002 - as of every change
        """The canonical names of the tensors that it replaces."""
        return list(self.tensors.infos)

    def applied(self, backbone: Backbone, emit: Emit) -> Backbone:
        """The backbone with these tensors in the place of its own, bit for bit what was written.

        Raises `ConflictError` for weights that the patch was not made for, and `BadInputError` for a file that has
        changed since.
        """
        weights = backbone.weights
        found = weights.fingerprint()
        if found != self.base_fingerprint:
            raise ConflictError(
                f"delta {self.path} does not fit {weights.source.label}",
                f"it was made for weights of {self.model} with fingerprint {self.base_fingerprint}, "
                f"and these have {found}",
                "give the weights that were repaired",
            )
        what, remedy = f"cannot use delta {self.path}", "is it whole? fetch it again"
        for name, info in self.tensors.infos.items():
            if name not in weights or weights.info(name) != info:
                raise BadInputError(what, f"{name} is no tensor of this model, or of another shape or dtype", remedy)
        stored = {weights.stored_names[name]: name for name in self.tensors.infos}
        patched = replace(weights, source=PatchedTensors(weights.source, self.tensors, stored))
        if patched.fingerprint() != self.fingerprint:
            raise BadInputError(what, "its tensors are not those that were written", remedy)
        emit(Noted(f"{self.path}: replaced {len(stored)} tensors"))
        return replace(backbone, weights=patched)


@dataclass(frozen=True)
class PatchedTensors:
    """A source of tensors some of which are read from a patch instead."""

    source: TensorSource
    patch: TensorSource
    names: Mapping[str, str] = field(repr=False)  # stored name → name in the patch

    @property
    def label(self) -> str:
        return f"{self.source.label}, patched by {self.patch.label}"

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self.source.infos

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors, in the order asked for."""
        wanted = list(names)
        changed = self.patch.read(self.names[name] for name in wanted if name in self.names)
        own = self.source.read(name for name in wanted if name not in self.names)
        return {name: changed[self.names[name]] if name in self.names else own[name] for name in wanted}


def write_patch(path: Path, model: str, base_fingerprint: str, weights: Weights, names: list[str]) -> None:
    """Write the named tensors, one at a time, with the fingerprint of the weights before and after."""
    metadata = {
        "format": FORMAT,
        "model": model,
        "base_fingerprint": base_fingerprint,
        "fingerprint": weights.fingerprint(),
    }
    infos = {name: weights.info(name) for name in names}
    write_safetensors(path, infos, (tensor for _, tensor in weights.stream(names)), metadata)


def read_patch(path: Path, metadata: Mapping[str, str]) -> Patch:
    """A patch whose header is read already; its tensors are read when they are asked for. Raises `BadInputError`."""
    tensors = open_checkpoint(path)
    assert isinstance(tensors, SafetensorsFile)
    try:
        return Patch(path, metadata["model"], metadata["base_fingerprint"], metadata["fingerprint"], tensors)
    except KeyError as error:
        raise BadInputError(f"cannot read delta {path}", f"its header has no {error}", "export it again") from error
