"""The results of a repair: the repaired weights, the adapter, and the records of the run."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinder_cli import __version__
from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.hooks import ModelRequest
from sinder_cli.backbone.storing import stored_as, write_safetensors
from sinder_cli.backbone.weights import Weights, rows_of
from sinder_cli.defects.shift import Retrieval
from sinder_cli.images.sources import ImageSource
from sinder_cli.notebooks import Shown
from sinder_cli.repairing.deltas import Deltas, Target
from sinder_cli.repairing.folder import RunFolder
from sinder_cli.repairing.guard import Snapshot
from sinder_cli.repairing.run_identity import call_of
from sinder_cli.repairing.scan import Scan
from sinder_cli.repairing.settings import WITHOUT_EFFECT, RepairSettings
from sinder_cli.repairing.verdict import Elsewhere, stop_reason, verdict_of

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.repairing.choosing import Chosen
    from sinder_cli.repairing.loop import Progress
    from sinder_cli.repairing.preparing import Prepared


@dataclass(frozen=True)
class RepairResult(Shown):
    """The records that `repair` wrote to its run directory, and the tokens before and after for pictures."""

    folder: Path
    model: str
    summary: dict[str, Any]
    config: dict[str, Any]
    before: Snapshot
    after: Snapshot
    pictures: list[Tensor]  # [3, H, W] inputs of the first images, normalized with `mean` and `std`
    names: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def run_config(
    backbone: Backbone,
    request: ModelRequest,
    settings: RepairSettings,
    source: ImageSource,
    places: Sequence[str],
    device: str,
    given: int,
) -> dict[str, Any]:
    """Return `config.json`: the call, resolved settings, versions, and fingerprints of weights and list of images."""
    import torch

    return {
        "model": backbone.name,
        "call": call_of(request, places, RunFolder(Path(request.model)).is_run),
        "heads": request.heads,
        "revision": request.revision,
        "attention": "sdpa" if request.attention == "auto" else request.attention,
        "weights": {"source": backbone.weights.source.label, "fingerprint": backbone.weights.fingerprint()},
        "images": {"count": len(source), "given": given, "fingerprint": source.fingerprint()},
        "settings": settings.model_dump(),
        "device": device.partition(":")[0],  # which of several devices does not matter
        "threads": torch.get_num_threads(),
        "versions": {"sinder": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


@dataclass(frozen=True)
class Outcome:
    """What a repair has come to, on the images of the guard and on those of kinds that it does not show."""

    before: Snapshot
    after: Snapshot
    elsewhere: Elsewhere | None
    found_again: tuple[Retrieval | None, Retrieval | None]  # before and after: shift retrieval


def run_summary(
    prepared: Prepared, scan: Scan, chosen: Chosen, progress: Progress, outcome: Outcome, config: dict[str, Any]
) -> dict[str, Any]:
    """Return `summary.json`, except for the seconds that the run took."""
    settings, changed = prepared.start.settings, prepared.deltas.changed
    before, after, elsewhere = outcome.before, outcome.after, outcome.elsewhere
    to_original = after.fidelity("original")
    verdict = verdict_of(scan, before, after, bool(changed), settings.min_fidelity, elsewhere)
    return {
        "model": prepared.start.backbone.name,
        "verdict": verdict.word,
        "verdict_reason": verdict.reason,
        "recipe": settings.recipe,
        "defects": {"before": before.defects(), "after": after.defects()},
        "fidelity": {
            "to_inpainted": {"before": before.fidelity().as_dict(), "after": after.fidelity().as_dict()},
            "to_original": to_original.as_dict(),
            "floor": settings.min_fidelity,
        },
        "shift_retrieval": {
            side: asdict(found) if found else None
            for side, found in zip(("before", "after"), outcome.found_again, strict=True)
        },
        "cls_cosine": to_original.cls,
        "tapped": "residual stream after each block, before the final norm; cosines: after the last block",
        "evaluation_images": before.norms.shape[1],
        "also_trained": chosen.also_trained,
        "drawn_on_the_guard": chosen.drawn,
        "kinds_not_on_the_guard": asdict(elsewhere) if elsewhere else None,
        "scan": {
            "images": len(scan.images),
            "defective_images": sum(bool(image.blocks) for image in scan.images),
            "tokens": scan.tokens,
            "standing": scan.standing,
            "blocks": [asdict(block) for block in scan.blocks],
        },
        "steps": progress.steps,
        "best_step": progress.best.step if progress.best else None,
        "images": progress.images,
        "skipped_images": len(progress.unreadable),
        "skipped_steps": progress.nonfinite,
        "changed_weights": len(changed),
        "trained_values": sum(int(target.delta.count_nonzero()) for target in changed),
        "clean_fraction": 1.0 if scan.healthy else progress.clean_fraction,
        "stopped_by": stop_reason(scan, after, progress, settings),
        "data": config["images"] | {"places": config["call"]["data"]},  # no places: the images were drawn
        "settings": {name: value for name, value in config["settings"].items() if name not in WITHOUT_EFFECT},
    }


def repaired_tensors(weights: Weights, targets: list[Target]) -> Iterator[Tensor]:
    """Yield the tensors of the repaired backbone in their stored dtype; rows that no target covers keep their bits.

    Raises `BadInputError` naming the tensor if a value does not fit its dtype.
    """
    for name, tensor in weights.stream(weights.names):
        for target in targets:
            if target.ref.name == name:
                part = rows_of(tensor, target.ref)
                part.copy_(stored_as(target.weight.cpu(), str(target.ref), tensor.dtype))
        yield tensor


def write_model(path: Path, weights: Weights, deltas: Deltas) -> None:
    """Write the repaired backbone with the key order, names and dtypes of the input, one tensor at a time."""
    write_safetensors(path, weights.output_infos(), repaired_tensors(weights, deltas.changed))
