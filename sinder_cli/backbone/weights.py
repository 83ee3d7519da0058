"""The tensors of one backbone inside a source, by the names that its module has."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from sinder_cli.backbone.contract import BlockMap, WeightRef, references
from sinder_cli.backbone.sources import TensorInfo, TensorSource, bytes_of
from sinder_cli.errors import BadInputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# Parts of names that arise when a module is wrapped in torch.compile or FSDP, or its blocks in recomputation.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
AVERAGED = ("teacher", "ema", "model_ema", "ema_model", "state_dict_ema", "target_encoder")  # in this order

BATCH_BYTES = 128 << 20  # about one block of a ViT-g; each read of a .pth file lists it again, so few reads are better


def recognized_by_names(weights: Weights) -> tuple[str, str] | None:
    """Return why weights of a known kind fit no backbone, and what to do; None if their names show no such kind."""
    names = weights.source.infos
    if any(".lora_" in name or name.startswith("base_model.") for name in names):
        return "it holds a LoRA of peft", "put it into its model with merge_and_unload(), and save that"
    if any("_flat_param" in name for name in names):
        why = "it holds flat parameters of FSDP, one shard of them"
        return why, "use the whole checkpoint that was saved beside it, such as teacher_checkpoint.pth"
    return None


def unusable(weights: Weights, why: str, remedy: str) -> BadInputError:
    """Return the error for weights without the backbone; it says what they are instead, if their names show it."""
    why, remedy = recognized_by_names(weights) or (why, remedy)
    return BadInputError(f"cannot use weights {weights.source.label}", why, remedy)


def is_branch(name: str, prefix: str) -> bool:
    """Return True if a name denotes the branch with this prefix: the whole prefix, or one of its parts."""
    return name in (prefix.rstrip("."), *prefix.split("."))


def unwrapped(name: str) -> str:
    """Return a tensor's name without the parts that wrappers of modules add: `a._orig_mod.b` → `a.b`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@dataclass(frozen=True)
class MappedTensors:
    """A source whose tensors are those of another, some of them changed as they are read; nothing is kept.

    `changes` are functions by stored name, each from the whole tensor to what takes its place; they may write into it.
    `dtypes` are those of the tensors whose dtype is changed.
    """

    source: TensorSource
    label: str
    changes: Mapping[str, Callable[[Tensor], Tensor]] = field(repr=False)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict, repr=False)

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shapes and dtypes by name."""
        return {
            name: TensorInfo(info.shape, self.dtypes.get(name, info.dtype)) for name, info in self.source.infos.items()
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read whole tensors, changed; writing into them changes no file."""
        found = self.source.read(names)
        for name in found:  # one at a time: no two copies of all
            if name in self.changes:
                found[name] = self.changes[name](found[name])
        return found


@dataclass(frozen=True)
class Weights:
    """The tensors of one backbone inside a source, by canonical name (the module's), in the order of the source."""

    source: TensorSource
    stored_names: Mapping[str, str] = field(repr=False)  # canonical name → name in the source
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    branch: str | None = None  # which backbone of several the user wants
    others: tuple[str, ...] = ()  # prefixes of other backbones in the same source

    @classmethod
    def of(cls, source: TensorSource, branch: str | None = None) -> Weights:
        """Return every tensor of the source under its own name, without the parts that wrappers of modules add.

        `branch` names one of several backbones that the source may hold: a part of its prefix, such as `student`.
        """
        return cls(source, {name: name for name in source.infos}, branch=branch).renamed(unwrapped)

    @property
    def names(self) -> list[str]:
        return list(self.stored_names)

    def info(self, name: str) -> TensorInfo:
        return self.source.infos[self.stored_names[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def shape_of(self, ref: WeightRef) -> tuple[int, ...]:
        """Return the shape of what a reference means: a tensor, or some of its rows."""
        shape = self.shape(ref.name)
        return shape if ref.rows is None else (ref.rows[1] - ref.rows[0], *shape[1:])

    def mapped(
        self,
        label: str,
        changes: Mapping[str, Callable[[Tensor], Tensor]],
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> Weights:
        """Return the same weights with some tensors, by canonical name, changed as they are read (`MappedTensors`)."""
        stored = {self.stored_names[name]: change for name, change in changes.items()}
        cast = {self.stored_names[name]: dtype for name, dtype in (dtypes or {}).items()}
        return replace(self, source=MappedTensors(self.source, label, stored, cast))

    def __contains__(self, name: str) -> bool:
        return name in self.stored_names

    def output_name(self, name: str) -> str:
        """Return the name under which a canonical tensor is exported: as stored, without wrapper parts and prefix."""
        return unwrapped(self.stored_names[name]).removeprefix(self.prefix)

    def output_infos(self) -> dict[str, TensorInfo]:
        """Return shape and dtype of every tensor by the name under which it is exported, in the order of the source."""
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
            size += info.bytes
            if size >= BATCH_BYTES:
                yield from self._in_order(batch)
                batch, size = [], 0
        if batch:
            yield from self._in_order(batch)

    def _in_order(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        tensors = self.read(names)
        for name in names:
            yield name, tensors.pop(name)

    def holds(self, anchor: str) -> bool:
        """Return True if there is a tensor of this name, with or without a prefix."""
        return bool(self._prefixes(anchor))

    def located(self, anchor: str) -> Weights:
        """Find the backbone inside a nested checkpoint by a tensor that every such backbone has.

        For example, `teacher.backbone.patch_embed.proj.weight` shows a backbone with the prefix `teacher.backbone.`. Of
        several, the one of `branch` is chosen, or else the teacher or another average over training steps. Raises
        `BadInputError` if none is found or the choice is not unique.
        """
        prefixes = self._prefixes(anchor)
        if not prefixes:
            why = f"none of its {len(self.names)} tensors is {anchor!r}, with or without a prefix"
            raise unusable(self, why, "is it a checkpoint of this model?")
        prefix = self._chosen(prefixes)
        inside = {
            name.removeprefix(prefix): stored for name, stored in self.stored_names.items() if name.startswith(prefix)
        }
        outside = tuple(name for name in self.names if not name.startswith(prefix))
        others = tuple(other for other in prefixes if other != prefix)
        return replace(self, stored_names=inside, prefix=prefix, ignored=self.ignored + outside, others=others)

    def _prefixes(self, anchor: str) -> list[str]:
        return [name.removesuffix(anchor) for name in self.names if name == anchor or name.endswith("." + anchor)]

    def _chosen(self, prefixes: list[str]) -> str:
        """Return the prefix to use. Raises `BadInputError`, which lists the prefixes, if the choice is not unique."""
        names = (self.branch,) if self.branch else AVERAGED if len(prefixes) > 1 else ()
        among = ([prefix for prefix in prefixes if is_branch(name, prefix)] for name in names)
        chosen = next(filter(None, among), []) if names else prefixes
        if len(chosen) == 1:
            return chosen[0]
        if self.branch and len(prefixes) == 1:
            place = f"under {prefixes[0].rstrip('.')}" if prefixes[0] else "without a prefix"
            what = f"cannot use branch {self.branch!r} of {self.source.label}"
            raise BadInputError(what, f"it holds one backbone, {place}", "leave --branch out")
        listed = ", ".join(prefix.rstrip(".") or "one without a prefix" for prefix in prefixes)
        if self.branch and not chosen:
            what, why = f"cannot use branch {self.branch!r} of {self.source.label}", f"its backbones are {listed}"
            raise BadInputError(what, why, "name one of these with --branch")
        raise BadInputError(
            f"cannot use weights {self.source.label}", f"it holds several backbones: {listed}", "choose with --branch"
        )

    def renamed(self, rename: Callable[[str], str]) -> Weights:
        """Return the same tensors under other canonical names. Raises `BadInputError` if two get the same name."""
        names: dict[str, str] = {}
        for name, stored in self.stored_names.items():
            canonical = rename(name)
            if canonical in names:
                raise BadInputError(
                    f"cannot use weights {self.source.label}", f"{names[canonical]} and {stored} both mean {canonical}"
                )
            names[canonical] = stored
        return replace(self, stored_names=names)

    def without(self, unwanted: Callable[[str], bool]) -> Weights:
        """Return the same weights without tensors outside the backbone, such as a head; these count as ignored."""
        kept = {name: stored for name, stored in self.stored_names.items() if not unwanted(name)}
        dropped = tuple(stored for name, stored in self.stored_names.items() if name not in kept)
        return replace(self, stored_names=kept, ignored=self.ignored + dropped)

    def fingerprint(self) -> str:
        """Compute the SHA-256 of name, dtype, shape and bytes of each tensor in turn, sorted by canonical name."""
        digest = hashlib.sha256()
        for name, tensor in self.stream(sorted(self.names)):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(bytes_of(tensor).numpy().data)
        return digest.hexdigest()


BESIDE = "beside."  # prefix of the roles of sub-layers beside the first ones


@dataclass(frozen=True)
class BlockTensors:
    """The map of one block together with its tensors by role, such as `mlp.up` `[H, N]`."""

    map: BlockMap
    by_role: dict[str, Tensor]

    def get(self, role: str) -> Tensor | None:
        return self.by_role.get(role)

    def __getitem__(self, role: str) -> Tensor:
        return self.by_role[role]

    @property
    def branches(self) -> Iterator[BlockTensors]:
        """The sub-layers of this block, and those beside them."""
        yield self
        if self.map.beside:
            beside = {role.removeprefix(BESIDE): part for role, part in self.by_role.items() if role.startswith(BESIDE)}
            yield from BlockTensors(self.map.beside, beside).branches


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors of one shape and dtype hold the same bytes; NaN equals itself."""
    import torch

    return torch.equal(bytes_of(first), bytes_of(second))


def rows_of(tensor: Tensor, ref: WeightRef) -> Tensor:
    """Return the part of a stored tensor that a reference names, as a view."""
    return tensor if ref.rows is None else tensor[ref.rows[0] : ref.rows[1]]


_MIXING_ROLES = re.compile(r"(beside\.)*attention\.(query|key)")  # the linearization drops the mixing of tokens


def read_block(
    weights: Weights, block: BlockMap, dtype: torch.dtype | None = None, device: str = "cpu"
) -> BlockTensors:
    """Read the mapped tensors of one block, except queries and keys, as float32 unless `dtype` says otherwise.

    They are copied at once: a thread that reads ahead then waits for the disk, so that the computation need not.
    """
    import torch

    roles = {role: ref for role, ref in references(block) if not _MIXING_ROLES.match(role)}
    stored = weights.read({ref.name for ref in roles.values()})
    wide = {name: tensor.to(device, dtype or torch.float32, copy=True) for name, tensor in stored.items()}
    return BlockTensors(block, {role: rows_of(wide[ref.name], ref) for role, ref in roles.items()})
