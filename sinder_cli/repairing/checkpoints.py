"""Checkpoints: all that is needed to resume a run with bit-identical results, in safetensors and JSON files only.

A checkpoint is written completely or not at all.

checkpoints/bases/HASH.safetensors     U, S, Vt of one target, written once: they never change
checkpoints/step-000200/state.safetensors   ε and momentum of every touched target, what greedy steps have observed,
                                            the ε of the guard's best state, recent images, random state
                        state.json          counters, names of unreadable images, the hash of each target's basis
                        manifest.json       SHA-256 of both files, written last
checkpoints/torn-step-000300           a damaged checkpoint, kept until the next one is written
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sinder_cli.backbone.sources import infos_of, open_checkpoint
from sinder_cli.backbone.storing import write_safetensors
from sinder_cli.errors import BadInputError, NoInputError, StorageError
from sinder_cli.events import Emit, Warned
from sinder_cli.files import replacing_folder, require_writable_folder, sha256_of, write_json
from sinder_cli.memory import is_out_of_memory
from sinder_cli.repairing.deltas import Deltas, SingularBasis, Target, TargetState
from sinder_cli.repairing.greedy import BlockObservation
from sinder_cli.repairing.loop import ANEW, Best, DivergedError, Progress

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2  # the newest; one of them may be damaged
COUNTED = (  # numbers of `Progress`
    *("steps", "images", "seconds", "nonfinite", "nonfinite_in_a_row", "proven", "last_move", "last_look"),
    *("clean_looks", "spoilt_looks", "idle_looks", "stopped"),
)
JUDGED = ("step", "outlying", "cls", "good", "marked")  # numbers of the guard's best state
# raised when a checkpoint is read that differs from what was written, in whatever way
TORN = (BadInputError, NoInputError, FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError)
OBSERVED = ("shares", "squares", "responses")  # tensors of what greedy steps have observed at a block
STATE, COUNTERS, MANIFEST = "state.safetensors", "state.json", "manifest.json"


@dataclass
class Checkpoints:
    """The checkpoints of one run directory."""

    folder: Path
    hashes: dict[str, str] = field(default_factory=dict)  # of the bases known to be on disk, by target

    def write(self, deltas: Deltas, progress: Progress) -> None:
        """Write the state between two steps; remove all checkpoints but the two newest and the newest proven one.

        Raises `DivergedError` for a delta that is not finite, and a `SinderError` if the file system refuses; the
        earlier checkpoints then stay as they were.
        """
        if not self._step_folder(progress.steps).exists():
            self._write(deltas, progress)
        found = self._step_folders()
        proven = [folder for folder in found if _step_of(folder) <= progress.proven]
        for old in found[KEPT:]:
            if old not in proven[:1]:
                _remove(old)
        for torn in self.folder.glob("torn-step-*"):  # a complete checkpoint has replaced them
            _remove(torn)
        self._remove_orphans()

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, the newest first: they belong to a repair that has diverged."""
        for folder in self._step_folders():
            if _step_of(folder) > step:
                _remove(folder)
        self._remove_orphans()

    def _write(self, deltas: Deltas, progress: Progress) -> None:
        require_writable_folder(self.bases)
        touched = deltas.touched
        for target in touched:
            self._write_basis(target)
        with replacing_folder(self._step_folder(progress.steps)) as temporary:
            tensors = _state_tensors(touched, progress, deltas.cuda)
            write_safetensors(temporary / STATE, infos_of(tensors), tensors.values())
            write_json(temporary / COUNTERS, _counters(touched, progress, self.hashes))
            files = {name: sha256_of(temporary / name) for name in (STATE, COUNTERS)}
            write_json(temporary / MANIFEST, files)

    def restore(self, deltas: Deltas, progress: Progress, emit: Emit) -> bool:
        """Load the newest intact checkpoint into `deltas` and `progress`; return True if there is one.

        A damaged checkpoint is named in a warning and renamed, and the one before it is used. Raises `BadInputError`
        if all are damaged. Raises `StorageError` if the disk fails; nothing is renamed then, since files may be intact.
        """
        torn = []
        for folder in self._step_folders():
            try:
                state = self._read(folder, deltas, emit)
            except TORN as error:
                emit(Warned(f"{folder} is damaged ({error}): using the checkpoint before it"))
                torn.append(folder)
                continue
            self._apply(state, deltas, progress)
            for folder in torn:
                _replace(folder, folder.with_name(f"torn-{folder.name}"))
            return True
        if torn:
            why = f"no checkpoint is intact, not even {torn[-1].name}"
            raise BadInputError(f"cannot resume {self.folder.parent}", why, "start anew with --force")
        return False

    def sweep(self) -> None:
        """Remove what a killed process has left under temporary names; none of it is a checkpoint."""
        for folder, pattern in ((self.folder, ".*step-*.part"), (self.bases, ".*.safetensors.*.part")):
            for leftover in folder.glob(pattern):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def _remove_orphans(self) -> None:
        """Remove the bases that no checkpoint names; remove none if a checkpoint cannot be read."""
        try:
            counters = [json.loads((folder / COUNTERS).read_text(encoding="utf-8")) for folder in self._step_folders()]
            named = {f"{digest}.safetensors" for each in counters for digest in each["bases"].values()}
        except TORN:
            return
        for path in self.bases.glob("*.safetensors"):
            if path.name not in named:
                path.unlink()

    @property
    def bases(self) -> Path:
        return self.folder / "bases"

    def _step_folder(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _step_folders(self) -> list[Path]:
        """Return the folders of all checkpoints, the newest first."""
        found = [path for path in self.folder.glob("step-*") if path.name[5:].isdigit()]
        return sorted(found, key=_step_of, reverse=True)

    def _write_basis(self, target: Target) -> None:
        if target.name in self.hashes:
            return
        tensors = _on_cpu(target.basis)
        digest = _digest(tensors)
        write_safetensors(self._basis_file(digest), infos_of(tensors), tensors.values())  # replaces a damaged one
        self.hashes[target.name] = digest

    def _basis_file(self, digest: str) -> Path:
        return self.bases / f"{digest}.safetensors"

    def _read(self, folder: Path, deltas: Deltas, emit: Emit) -> _StoredState:
        """Read a checkpoint.

        Raises one of `TORN` if its files are not those of its manifest, and `StorageError` if the disk fails.
        """
        with _separated_from_damaged(folder):
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            for name in (STATE, COUNTERS):
                if sha256_of(folder / name) != manifest[name]:
                    raise ValueError(f"{name} is not what its manifest says")
            counters = json.loads((folder / COUNTERS).read_text(encoding="utf-8"))
            tensors = _tensors_of(folder / STATE)
        targets = {}
        for name, digest in counters["bases"].items():
            basis = self._read_basis(name, digest, deltas, emit)
            targets[name] = TargetState(tensors[f"delta.{name}"], tensors[f"velocity.{name}"], basis)
        return _StoredState(folder, counters, tensors, targets)

    def _read_basis(self, name: str, digest: str, deltas: Deltas, emit: Emit) -> SingularBasis:
        """Read the basis of a target; if its file is damaged, decompose the weight again.

        Raises `ValueError` if the weight then gives other bits, as it may on another machine.
        """
        path = self._basis_file(digest)
        try:
            with _separated_from_damaged(path):
                tensors = _tensors_of(path)
        except TORN:
            tensors = {}
        if _digest(tensors) != digest:
            emit(Warned(f"{path} is damaged: decomposing {name} again"))
            tensors = _on_cpu(deltas.decomposed(name))
            if _digest(tensors) != digest:
                raise ValueError(f"the basis of {name} is damaged, and its weight gives another one on this machine")
            write_safetensors(path, infos_of(tensors), tensors.values())
        return SingularBasis(**tensors)

    def _apply(self, stored: _StoredState, deltas: Deltas, progress: Progress) -> None:
        for block in stored.counters["blocks"]:
            deltas.restore(block, stored.targets)
        self.hashes.update(stored.counters["bases"])
        for name in COUNTED:
            setattr(progress, name, stored.counters[name])
        progress.unreadable.update(stored.counters["unreadable"])
        device = next(deltas.module.parameters()).device
        progress.observed.by_block = {
            int(block): BlockObservation(
                shares=stored.tensors[f"observed.{block}.shares"].to(device),
                squares=stored.tensors[f"observed.{block}.squares"].to(device),
                weight=numbers["weight"],
                responses=stored.tensors[f"observed.{block}.responses"].to(device),
                probes=numbers["probes"],
            )
            for block, numbers in stored.counters["observed"].items()
        }
        best = stored.counters["best"]
        values = {name[5:]: tensor for name, tensor in stored.tensors.items() if name.startswith("best.")}
        progress.best = None if best is None else Best(**best, deltas=values)
        progress.recent.clear()
        progress.recent.extend(stored.tensors["recent"].bool().tolist())
        torch.set_rng_state(stored.tensors["random.cpu"])
        if "random.cuda" in stored.tensors and deltas.cuda is not None:
            torch.cuda.set_rng_state(stored.tensors["random.cuda"], deltas.cuda)


@dataclass(frozen=True)
class _StoredState:
    """One checkpoint as read from disk."""

    folder: Path
    counters: dict[str, Any]
    tensors: dict[str, Tensor]
    targets: dict[str, TargetState]


def _step_of(folder: Path) -> int:
    return int(folder.name[5:])


def _remove(folder: Path) -> None:
    """Remove a folder; rename it first, so that what is left after a kill does not look like a checkpoint."""
    shutil.rmtree(_replace(folder, folder.with_name(f".{folder.name}.old.part")))


def _replace(folder: Path, other: Path) -> Path:
    """Rename a folder to `other`, which is removed first if it exists; return the new path."""
    if other.exists():
        shutil.rmtree(other)
    return folder.rename(other)


@contextmanager
def _separated_from_damaged(path: Path) -> Iterator[None]:
    """Raise `StorageError`, and none of `TORN`, if the disk fails while a file is read: the file may be intact."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        if is_out_of_memory(error):
            raise
        why, remedy = error.strerror or str(error), "check the disk and run again"
        raise StorageError(f"cannot read {path}", why, remedy) from error


def _state_tensors(targets: list[Target], progress: Progress, cuda: torch.device | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for target in targets:
        if not target.delta.isfinite().all():
            raise DivergedError("the repair has diverged", f"the delta of {target.name} is not finite", ANEW)
        found[f"delta.{target.name}"] = target.delta.cpu()
        found[f"velocity.{target.name}"] = target.velocity.cpu()
    for block, observed in progress.observed.by_block.items():
        found |= {f"observed.{block}.{name}": getattr(observed, name).cpu() for name in OBSERVED}
    if progress.best is not None:
        found |= {f"best.{name}": delta.cpu() for name, delta in progress.best.deltas.items()}
    found["recent"] = torch.tensor(list(progress.recent), dtype=torch.uint8)
    found["random.cpu"] = torch.get_rng_state()
    if cuda is not None:
        found["random.cuda"] = torch.cuda.get_rng_state(cuda)
    return found


def _counters(targets: list[Target], progress: Progress, hashes: dict[str, str]) -> dict[str, Any]:
    best = progress.best
    return {
        **{name: getattr(progress, name) for name in COUNTED},
        "unreadable": progress.unreadable,
        "observed": {
            block: {"weight": observed.weight, "probes": observed.probes}
            for block, observed in progress.observed.by_block.items()
        },
        "best": None if best is None else {name: getattr(best, name) for name in JUDGED},
        "blocks": sorted({target.block for target in targets}),
        "bases": {target.name: hashes[target.name] for target in targets},
    }


def _on_cpu(basis: SingularBasis) -> dict[str, Tensor]:
    return {name: part.cpu() for name, part in basis.tensors().items()}


def _tensors_of(path: Path) -> dict[str, Tensor]:
    source = open_checkpoint(path)
    # cloned, since the bits of a product may depend on the memory layout of its factors
    return {name: tensor.clone() for name, tensor in source.read(source.infos).items()}


def _digest(tensors: dict[str, Tensor]) -> str:
    """Compute the SHA-256 of names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
