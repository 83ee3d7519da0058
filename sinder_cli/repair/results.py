"""What a repair leaves behind: the repaired weights, the adapter and the summary, as files of the run directory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.backbone.blocks import rows_of
from sinder_cli.backbone.checkpoint import Weights
from sinder_cli.backbone.storing import infos_of, stored_as, write_safetensors
from sinder_cli.repair.deltas import Deltas, Target
from sinder_cli.repair.loop import StepRecord
from sinder_cli.repair.settings import RepairSettings

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_FORMAT = "sinder-adapter-1"


@dataclass(frozen=True)
class RunFolder:
    """The names inside a run directory."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter.safetensors"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    def record(self, step: StepRecord) -> None:
        """Append one line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(step)) + "\n")


def changed_targets(deltas: Deltas) -> list[Target]:
    """Targets with a delta other than zero; a weight without one is left bit for bit."""
    return [target for target in deltas.touched if bool(target.delta.any())]


def repaired_tensor(weights: Weights, name: str, targets: list[Target]) -> Tensor:
    """One tensor of the repaired backbone in its stored dtype; rows that no target covers keep their bits.

    Raises `BadInputError` naming the tensor if a value does not fit its dtype.
    """
    tensor = weights.read([name])[name]
    for target in targets:
        if target.ref.name == name:
            part = rows_of(tensor, target.ref)
            part.copy_(stored_as(target.weight.cpu(), str(target.ref), tensor.dtype))
    return tensor


def write_model(path: Path, weights: Weights, deltas: Deltas) -> None:
    """The repaired backbone in the key order, names and dtypes of the input, one tensor at a time."""
    targets = changed_targets(deltas)
    canonical = {weights.output_name(name): name for name in weights.names}
    write_safetensors(
        path,
        {output: weights.info(name) for output, name in canonical.items()},
        lambda output: repaired_tensor(weights, canonical[output], targets),
    )


def write_adapter(path: Path, model: str, fingerprint: str, deltas: Deltas, settings: RepairSettings) -> None:
    """All deltas ε by target, float32 `[r]`, with the fingerprint of the weights that they belong to."""
    tensors = {target.name: target.delta.float().cpu() for target in changed_targets(deltas)}
    metadata = {
        "format": ADAPTER_FORMAT,
        "model": model,
        "base_fingerprint": fingerprint,
        "settings": settings.model_dump_json(),
    }
    write_safetensors(path, infos_of(tensors), tensors.__getitem__, metadata)
