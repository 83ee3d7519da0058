"""The tensors of one backbone among those of a source, by the names that its module has."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sinder_cli.backbone.sources import TensorInfo, TensorSource
from sinder_cli.errors import BadInputError

if TYPE_CHECKING:
    from torch import Tensor

BATCH_BYTES = 128 << 20  # about one block of a ViT-g: a .pth file is listed anew at every read, so read several at once


@dataclass(frozen=True)
class Weights:
    """The tensors of one backbone inside a source, by canonical name (the module's), in the order of the source."""

    source: TensorSource
    stored_names: Mapping[str, str] = field(repr=False)  # canonical name → name in the source
    prefix: str = ""
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: TensorSource) -> Weights:
        """Every tensor of the source under its own name."""
        return cls(source, {name: name for name in source.infos})

    @property
    def names(self) -> list[str]:
        return list(self.stored_names)

    def info(self, name: str) -> TensorInfo:
        return self.source.infos[self.stored_names[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def __contains__(self, name: str) -> bool:
        return name in self.stored_names

    def output_name(self, name: str) -> str:
        """The name under which a canonical tensor is exported: as stored, without the wrapper it was found under."""
        return self.stored_names[name].removeprefix(self.prefix)

    def output_infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor by the name under which it is exported, in the order of the source."""
        return {self.output_name(name): self.info(name) for name in self.names}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read whole tensors in their stored dtype; writing into them changes no file."""
        wanted = {self.stored_names[name]: name for name in names}
        return {wanted[stored]: tensor for stored, tensor in self.source.read(wanted).items()}

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read whole tensors in the given order, holding about `BATCH_BYTES` of them at a time."""
        batch: list[str] = []
        size = 0
        for name in names:
            info = self.info(name)
            batch.append(name)
            size += math.prod(info.shape) * info.dtype.itemsize
            if size >= BATCH_BYTES:
                yield from self._in_order(batch)
                batch, size = [], 0
        if batch:
            yield from self._in_order(batch)

    def _in_order(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        tensors = self.read(names)
        for name in names:
            yield name, tensors.pop(name)

    def located(self, anchor: str) -> Weights:
        """Find the backbone inside a nested checkpoint by a tensor that every such backbone has.

        `teacher.backbone.patch_embed.proj.weight` puts the backbone under `teacher.backbone.`; where both a
        student and a teacher are stored, the teacher is meant. Raises `BadInputError` if it is not found or not unique.
        """
        prefixes = [name.removesuffix(anchor) for name in self.names if name == anchor or name.endswith("." + anchor)]
        if not prefixes:
            raise BadInputError(
                f"cannot use weights {self.source.label}",
                f"none of its {len(self.names)} tensors is {anchor!r}, with or without a prefix",
                "is it a checkpoint of this model?",
            )
        chosen = (
            [p for p in prefixes if {"teacher", "ema"} & set(re.split(r"[._]", p))] if len(prefixes) > 1 else prefixes
        )
        if len(chosen) != 1:
            raise BadInputError(
                f"cannot use weights {self.source.label}", f"it holds several backbones: {', '.join(prefixes)}"
            )
        prefix = chosen[0]
        inside = {
            name.removeprefix(prefix): stored for name, stored in self.stored_names.items() if name.startswith(prefix)
        }
        outside = tuple(name for name in self.names if not name.startswith(prefix))
        return Weights(self.source, inside, prefix, outside)

    def renamed(self, rename: Callable[[str], str]) -> Weights:
        """The same tensors under other canonical names; two that become one are refused."""
        names: dict[str, str] = {}
        for name, stored in self.stored_names.items():
            canonical = rename(name)
            if canonical in names:
                raise BadInputError(
                    f"cannot use weights {self.source.label}", f"{names[canonical]} and {stored} both mean {canonical}"
                )
            names[canonical] = stored
        return Weights(self.source, names, self.prefix, self.ignored)

    def without(self, unwanted: Callable[[str], bool]) -> Weights:
        """The same but for tensors that are no part of the backbone, such as a head; they count as ignored."""
        kept = {name: stored for name, stored in self.stored_names.items() if not unwanted(name)}
        dropped = tuple(stored for name, stored in self.stored_names.items() if name not in kept)
        return Weights(self.source, kept, self.prefix, self.ignored + dropped)

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all tensors, sorted by canonical name, one at a time."""
        import torch

        digest = hashlib.sha256()
        for name, tensor in self.stream(sorted(self.names)):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
