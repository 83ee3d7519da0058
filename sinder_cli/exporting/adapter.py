"""Target `adapter`: only the deltas of the singular values, about 1 MB for a ViT-g; `--adapter` applies them."""

from __future__ import annotations

import shutil
from pathlib import Path

from sinder_cli.errors import BadInputError, UsageError
from sinder_cli.events import silent
from sinder_cli.exporting.diff import loading_of_changes, require_repaired
from sinder_cli.exporting.targets import ExportCheck, ExportTarget, Plan
from sinder_cli.repairing.weight_changes import Adapter, read_adapter

TOLERANCE = 1e-5  # for float32: singular vectors from another machine differ in their last bits


def _require(plan: Plan) -> None:
    change = require_repaired(plan).change
    if not isinstance(change, Adapter):
        why = f"{change.path} holds whole tensors, not singular values"
        raise UsageError("cannot export an adapter", why, "use --to diff")


def _write(plan: Plan, path: Path) -> None:
    shutil.copyfile(require_repaired(plan).change.path, path)


def _verify(plan: Plan, path: Path) -> ExportCheck:
    import torch

    base, why = require_repaired(plan).open_base()
    if base is None:
        return ExportCheck(f"not applied again: {why}", verified=False)
    found, weights = read_adapter(path).applied(base, silent).weights, plan.backbone.weights
    difference, tolerance = 0.0, TOLERANCE
    for name, again in found.stream(found.names):
        tensor = weights.read([name])[name]
        largest = tensor.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        difference = max(difference, ((again.float() - tensor.float()).abs().max() / largest).item())
        tolerance = max(tolerance, torch.finfo(tensor.dtype).eps)
    if not difference <= tolerance:
        why = f"applied again, it differs by {difference:.1e}, and the tolerance is {tolerance:.1e}"
        raise BadInputError(f"export of {plan.backbone.name} failed", why, "check that the adapter belongs to this run")
    return ExportCheck(f"applied again to {base.weights.source.label}", difference=difference, tolerance=tolerance)


TARGET = ExportTarget(
    kind="file",
    summary="only the deltas, to be passed as --adapter",
    write=_write,
    verify=_verify,
    loading=loading_of_changes,
    require=_require,
    suffixes=(".safetensors",),
    of_changes=True,
)
