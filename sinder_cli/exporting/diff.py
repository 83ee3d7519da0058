"""Target `diff`: a safetensors file of the changed tensors, which names its base; `--adapter` applies it."""

from __future__ import annotations

from pathlib import Path

from sinder_cli.errors import UsageError
from sinder_cli.events import silent
from sinder_cli.exporting.targets import ExportCheck, ExportTarget, Loading, Plan, Repaired
from sinder_cli.repairing.weight_changes import read_change, write_diff


def require_repaired(plan: Plan) -> Repaired:
    """Return the change that led to the backbone. Raises `UsageError` for a model that was not repaired."""
    if plan.repaired is None:
        what = f"cannot export the changes of {plan.backbone.name}"
        raise UsageError(what, "it is not a repaired model", "name a run, or give --adapter")
    return plan.repaired


def _require(plan: Plan) -> None:
    require_repaired(plan)


def _write(plan: Plan, path: Path) -> None:
    change = require_repaired(plan).change
    names = change.changed_names(plan.backbone.layers)
    write_diff(path, plan.backbone.name, change.base_fingerprint, plan.backbone.weights, names)


def _verify(plan: Plan, path: Path) -> ExportCheck:
    repaired = require_repaired(plan)
    base, why = repaired.open_base()
    if base is None:
        return ExportCheck(f"not applied again: {why}", verified=False)
    read_change(path).applied(base, silent)  # this compares the fingerprint of all tensors with the one in the file
    return ExportCheck(f"applied again to {base.weights.source.label}", difference=0.0, tolerance=0.0)


def loading_of_changes(plan: Plan, place: str) -> Loading:
    """Return how a file of changes is applied to the weights that they belong to."""
    call = f"model = api.open_model(ModelRequest({plan.backbone.name!r}, adapter=Path({place!r})))"
    return Loading("from pathlib import Path; from sinder_cli import ModelRequest, api", call)


TARGET = ExportTarget(
    kind="file",
    summary="only the changed tensors, to be passed as --adapter",
    write=_write,
    verify=_verify,
    loading=loading_of_changes,
    require=_require,
    suffixes=(".safetensors",),
    of_changes=True,
)
