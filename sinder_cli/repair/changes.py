"""What `--adapter` names: an adapter or a delta, told apart by the header of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from sinder_cli.backbone.contract import Backbone, LayerMap
from sinder_cli.errors import BadInputError
from sinder_cli.events import Emit
from sinder_cli.repair.adapter import FORMAT as ADAPTER
from sinder_cli.repair.adapter import read_adapter
from sinder_cli.repair.headers import REMEDY, read_header
from sinder_cli.repair.patch import FORMAT as DELTA
from sinder_cli.repair.patch import read_patch


class Change(Protocol):
    """A file that makes repaired weights of those that it was made for."""

    @property
    def path(self) -> Path: ...

    @property
    def model(self) -> str: ...

    @property
    def base_fingerprint(self) -> str: ...

    def changed_names(self, layers: LayerMap) -> list[str]:
        """The canonical names of the tensors that it changes."""
        ...

    def applied(self, backbone: Backbone, emit: Emit) -> Backbone:
        """The backbone with the change made. Raises `ConflictError` for weights that it was not made for."""
        ...


def read_change(path: Path) -> Change:
    """Read an adapter, or open a delta; nothing but its header is read of a file that is neither.

    Raises `NoInputError` where there is no file and `BadInputError` for a file of another format.
    """
    metadata = read_header(path)
    kind = metadata.get("format")
    if kind == ADAPTER:
        return read_adapter(path)
    if kind == DELTA:
        return read_patch(path, metadata)
    why = f"its format is {kind!r}, neither {ADAPTER!r} nor {DELTA!r}"
    raise BadInputError(f"cannot read adapter {path}", why, REMEDY)
