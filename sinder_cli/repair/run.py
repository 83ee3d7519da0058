"""A repair from what it starts from to its run directory: prepared, stepped, looked at, and written, in that order."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sinder_cli.backbone.describe import Backbone
from sinder_cli.backbone.device import exact_device
from sinder_cli.backbone.opening import load_module
from sinder_cli.defects.prediction import predict
from sinder_cli.events import Emit, Finished, Noted, Started, Warned
from sinder_cli.files import write_json
from sinder_cli.images.choosing import Division, divided
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.sources import ImageFiles, ImageSource, SomeImages
from sinder_cli.memory import told_when_it_runs_out
from sinder_cli.ranks import Ranks
from sinder_cli.repair.adapter import write_adapter
from sinder_cli.repair.basis import SingularBasis, singular_basis
from sinder_cli.repair.batches import forget_mended, require_readable
from sinder_cli.repair.deltas import Deltas
from sinder_cli.repair.evaluation import SAMPLES, Snapshot, evaluate, evaluation_images, take_snapshot
from sinder_cli.repair.folder import RunFolder
from sinder_cli.repair.forward import Directions
from sinder_cli.repair.imagelist import listed_images
from sinder_cli.repair.loop import (
    ANEW,
    DivergedError,
    Progress,
    StepRecord,
    density_window,
    repair_steps,
    size_of_step,
)
from sinder_cli.repair.results import RepairResult, run_summary, write_model
from sinder_cli.repair.session import checkpointed, restored, saved_if_it_fails
from sinder_cli.repair.settings import RepairSettings
from sinder_cli.stopping import Stop

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Start:
    """What a repair starts from, and the `config.json` that says so."""

    backbone: Backbone
    preprocess: Preprocessing
    source: ImageSource
    settings: RepairSettings
    device: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Repair:
    """A repair in memory, ready for its next step."""

    start: Start
    training: ImageSource
    samples: dict[str, Tensor]  # evaluation images `[3, H, W]` by name; those of rank 0 alone
    directions: Directions
    module: nn.Module
    deltas: Deltas
    progress: Progress
    emit: Emit
    ranks: Ranks

    def look(self, phase: str) -> Snapshot:
        """The evaluation images as the module shows them now."""
        start, images = self.start, list(self.samples.values())
        return take_snapshot(
            start.backbone, self.module, images, start.settings.batch_size, start.device, self.emit, phase
        )


def run_repair(
    start: Start, folder: RunFolder, emit: Emit, resume: bool, stop: Stop, ranks: Ranks
) -> RepairResult | None:
    """Repair into a folder that this process, or rank 0, holds; rank 0 has the result."""
    began = time.monotonic()
    if resume and ranks.writes:
        folder.require_same(start.config, start.source, emit)
    with told_when_it_runs_out(*size_of_step(start.preprocess, start.settings)):
        repair = prepared(start, emit, ranks)
        before = _original(repair) if ranks.writes else None
        _go_on_or_begin(repair, folder, resume)
        earlier = repair.progress.seconds
        after = _repaired(repair, folder, before, stop)
        if before is None or after is None:
            return None
        return _written(repair, folder, before, after, lambda: earlier + time.monotonic() - began)


def prepared(
    start: Start, emit: Emit, ranks: Ranks, decompose: Callable[[Tensor], SingularBasis] = singular_basis
) -> Repair:
    """Everything up to the first step: images to look at, directions from the weights, the module, no deltas yet."""
    settings, backbone = start.settings, start.backbone
    division = divided(len(start.source), settings.eval_images, held_out=settings.eval_every > 0)
    training = SomeImages(start.source, division.training)
    progress = Progress(density_window(len(training)))
    samples = _samples(start, division, progress, emit) if ranks.writes else {}
    device = exact_device(start.device)
    prediction = ranks.once(lambda: predict(backbone, ("cumulative",), emit, device))
    directions = Directions(prediction.directions().to(start.device), prediction.gaps())
    if not any(gap >= settings.min_gap for gap in directions.gaps):
        emit(Warned(f"no direction is determined (σ₁/σ₂ < {settings.min_gap} in every block): none can be defective"))
    module = load_module(backbone, start.device)
    deltas = Deltas(backbone, module, emit, settings.offload, decompose=decompose)
    return Repair(start, training, samples, directions, module, deltas, progress, emit, ranks)


def _samples(start: Start, division: Division, progress: Progress, emit: Emit) -> dict[str, Tensor]:
    images = evaluation_images(start.source, start.preprocess, division.evaluation, progress.unreadable, emit)
    require_readable(start.source, progress.unreadable, start.settings.strict)
    return images


def _original(repair: Repair) -> Snapshot:
    before = repair.look("looking at the original")
    before.require_finite("the backbone is broken", "give other weights")
    return before


def _go_on_or_begin(repair: Repair, folder: RunFolder, resume: bool) -> None:
    """Restore the newest checkpoint of the run in the folder, or put a new run there."""
    start, progress, emit = repair.start, repair.progress, repair.emit
    goes_on = resume and restored(folder.checkpoints, repair.deltas, progress, emit, repair.ranks)
    if goes_on:
        forget_mended(start.source, start.preprocess, progress.unreadable)
        emit(Noted(f"going on after step {progress.steps}"))
    if repair.ranks.writes:
        if not goes_on:
            files = start.source if isinstance(start.source, ImageFiles) else None
            config = folder.read_config() if resume else start.config  # as it was begun, without a checkpoint yet
            folder.begin(config, listed_images(files, emit) if files else ())
        folder.write_sidecars(start.backbone.sidecars)
        folder.forget_after(progress.steps)


def _repaired(repair: Repair, folder: RunFolder, before: Snapshot | None, stop: Stop) -> Snapshot | None:
    """Take the steps and look at what they made, on rank 0; of a repair that diverges, the last good state stays."""
    try:
        _take_steps(repair, folder, before, stop)
        if before is None:
            return None
        after = repair.look("looking at the repaired")
        after.require_finite("the repair has diverged", ANEW, DivergedError)
    except DivergedError:
        if repair.ranks.writes:
            folder.checkpoints.forget_after(repair.progress.proven)
        raise
    return after


def _take_steps(repair: Repair, folder: RunFolder, before: Snapshot | None, stop: Stop) -> None:
    """Step until the images are clean or the steps used up, recording each, and looking where that is due."""
    start, progress, emit, ranks = repair.start, repair.progress, repair.emit, repair.ranks
    backbone, settings = start.backbone, start.settings
    images = list(repair.samples.values())
    checkpoints = folder.checkpoints

    def save() -> None:
        if ranks.writes:
            folder.flush_lines()
            checkpoints.write(repair.deltas, progress)

    def tell(record: StepRecord) -> None:
        if before is not None:
            folder.record(record)
        emit(record)
        if before is not None and settings.eval_every and record.step % settings.eval_every == 0:
            evaluation = evaluate(
                record.step, backbone, repair.module, repair.directions, images, before, settings, start.device
            )
            folder.record(evaluation)
            emit(evaluation)

    steps = repair_steps(
        backbone, repair.directions, repair.deltas, repair.training, start.preprocess, settings, progress, emit, ranks
    )
    emit(Started("repairing", settings.max_steps, "steps", progress.steps))
    with closing(checkpointed(steps, save, progress, settings, stop, emit, ranks)) as records:
        for record in records:
            with saved_if_it_fails(save):
                tell(record)
    emit(Finished("repairing"))


def _written(
    repair: Repair, folder: RunFolder, before: Snapshot, after: Snapshot, seconds: Callable[[], float]
) -> RepairResult:
    """Write the repaired weights, the adapter, and last the summary, which says that the run has ended."""
    start, deltas = repair.start, repair.deltas
    backbone, settings, config = start.backbone, start.settings, folder.read_config()  # as the run was begun
    repair.emit(Noted(f"writing {folder.model}"))
    write_model(folder.model, backbone.weights, deltas)
    write_adapter(folder.adapter, backbone.name, config["weights"]["fingerprint"], deltas, settings)
    summary = run_summary(backbone, before, after, repair.progress, deltas, settings, config)
    summary["seconds"] = round(seconds(), 3)
    write_json(folder.summary, summary)
    return RepairResult(
        folder=folder.path,
        model=backbone.name,
        summary=summary,
        config=config,
        before=before,
        after=after,
        pictures=list(repair.samples.values())[:SAMPLES],
        names=list(repair.samples)[:SAMPLES],
        mean=start.preprocess.mean,
        std=start.preprocess.std,
    )
