"""Results as JSON documents: plain dictionaries of numbers that are finite or null."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinder_cli.analysis.records import Analysis
    from sinder_cli.backbone.registry import InstalledBackbone
    from sinder_cli.conformance.subject import Conformance
    from sinder_cli.defects.prediction import Prediction
    from sinder_cli.evaluation.records import Evaluation
    from sinder_cli.exporting.drafts import ExportResult
    from sinder_cli.repairing.dry_run import DryRun


def finite(value: Any) -> Any:
    """Return `value` with every NaN and infinity in it replaced by None."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def prediction_document(prediction: Prediction) -> dict[str, Any]:
    """Return the document of `sinder predict-defects --format json`: an entry per block, each measure by stage."""
    blocks = [
        {
            "block": rows[0].block,
            "sigma": {stage: row.sigma for stage, row in zip(prediction.stages, rows, strict=True)},
            "gap": {stage: row.pair.gap for stage, row in zip(prediction.stages, rows, strict=True)},
            "angle_to_previous_deg": {
                stage: row.angle_to_previous for stage, row in zip(prediction.stages, rows, strict=True)
            },
        }
        for rows in zip(*prediction.stages.values(), strict=True)
    ]
    return finite(
        {
            "model": prediction.model,
            "width": prediction.width,
            "settled_from": {stage: prediction.settled_from(stage) for stage in prediction.stages},
            "blocks": blocks,
            "position_embedding": asdict(prediction.position) if prediction.position else None,
        }
    )


def analysis_document(analysis: Analysis) -> dict[str, Any]:
    """Return the document of `sinder analyze --format json` and of `report.json`; see sinder-analysis(5)."""
    document = analysis.model_dump(mode="json")
    return finite(document | {"skipped": analysis.skipped})  # Pydantic alters names that are not UTF-8


def repair_document(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the document of `sinder repair --format json`: the summary, the run directory and its report."""
    return finite(summary | {"folder": str(folder), "report": str(folder / "report.html")})


def export_document(result: ExportResult) -> dict[str, Any]:
    """Return the document of `sinder export --format json`."""
    check = asdict(result.check)
    return finite(
        {
            "path": str(result.path),
            "target": result.target,
            "model": result.model,
            "bytes": result.bytes,
            "files": [asdict(file) for file in result.files],
            "verified": check.pop("verified"),
            "check": check,
            "load": result.load,
        }
    )


def evaluation_document(evaluation: Evaluation) -> dict[str, Any]:
    """Return the document of `sinder evaluate --format json`, which `evaluation.json` holds too."""
    return finite(evaluation.model_dump(mode="json"))


def dry_run_document(dry_run: DryRun) -> dict[str, Any]:
    """Return the document of `sinder repair --dry-run --format json`."""
    return asdict(dry_run) | {"blocks": list(dry_run.blocks)}


def conformance_document(result: Conformance) -> dict[str, Any]:
    """Return the document of `sinder check-backbone --format json`."""
    return {
        "model": result.model,
        "weights": result.weights,
        "conforms": not result.failed,
        "checks": [asdict(check) for check in result.checks],
    }


def backbones_document(rows: Sequence[InstalledBackbone]) -> list[dict[str, Any]]:
    """Return the document of `sinder backbones --format json`."""
    return [
        {
            **(asdict(row.listing) if row.listing else {"name": None}),
            "plugin": row.plugin.name,
            "distribution": row.plugin.distribution,
            "available": not (row.problem or row.missing),
            "missing": list(row.missing),
            "problem": row.problem or None,
        }
        for row in rows
    ]
