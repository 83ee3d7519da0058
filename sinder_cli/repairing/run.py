"""A complete repair: scan the original, take steps, judge the result, and write the run directory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.device import exact_device
from sinder_cli.backbone.opening import load_module
from sinder_cli.defects.detection import DetectionRule
from sinder_cli.defects.prediction import predict
from sinder_cli.defects.tokens import in_precision
from sinder_cli.distributed import Ranks
from sinder_cli.events import Emit, Finished, Noted, Started, Warned
from sinder_cli.files import write_json, write_text
from sinder_cli.images.loading import load_in_order, readable, require_some, sampled
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.sources import ImageSource, SomeImages, files_of
from sinder_cli.memory import out_of_memory_reported
from sinder_cli.repairing.batches import forget_mended, require_readable
from sinder_cli.repairing.deltas import Deltas, SingularBasis, singular_basis
from sinder_cli.repairing.folder import RunFolder
from sinder_cli.repairing.forward import Directions
from sinder_cli.repairing.guard import SAMPLES, Evaluation, Guard, Snapshot, guard_sizes, guarded
from sinder_cli.repairing.loop import (
    ANEW,
    DivergedError,
    Known,
    Progress,
    StepRecord,
    density_window,
    repair_steps,
    size_of_step,
)
from sinder_cli.repairing.results import RepairResult, run_summary, write_model
from sinder_cli.repairing.run_identity import listed_images
from sinder_cli.repairing.scan import ImageOutliers, Scan, rarest_first, scan, see, to_train_on
from sinder_cli.repairing.session import checkpointed, restored, saved_if_it_fails
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.repairing.verdict import Elsewhere
from sinder_cli.repairing.weight_changes import write_adapter
from sinder_cli.signals import Stop

if TYPE_CHECKING:
    from torch import Tensor, nn


MOST_ELSEWHERE = 64  # images with kinds of defects that the guard does not show, examined at the end


@dataclass(frozen=True)
class Start:
    """The inputs of a repair, and the `config.json` that describes them."""

    backbone: Backbone
    preprocess: Preprocessing
    source: ImageSource
    settings: RepairSettings
    device: str
    config: dict[str, Any]
    given: int  # number of the user's images, which come first in the source; the others are drawn


@dataclass(frozen=True)
class Prepared:
    """A backbone ready for its scan and for steps: directions from the weights, the module, no deltas yet."""

    start: Start
    directions: Directions
    module: nn.Module
    deltas: Deltas
    emit: Emit
    ranks: Ranks


@dataclass(frozen=True)
class Repair:
    """A repair in memory, ready for its next step."""

    prepared: Prepared
    scan: Scan
    training: ImageSource  # the images for the steps; empty if there is nothing to repair
    guard: Guard | None  # on rank 0; None on the others
    also_trained: int  # number of guard images that are trained on, since no other image has such a defect
    drawn: int  # number of guard images that the program drew
    unjudged: tuple[ImageOutliers, ...]  # their kind of defect is on no image of the guard
    progress: Progress

    @property
    def known(self) -> Known | None:
        """Function from an image's name to the tokens that the original marks in it.

        None without a norm factor, or if all images are visited.
        """
        settings, depth = self.prepared.start.settings, self.prepared.start.backbone.depth
        if settings.norm_factor == 0 or settings.visit == "all":
            return None
        images = self.scan.by_name
        return lambda name: images[name].first_marks(depth)


def run_repair(
    start: Start, folder: RunFolder, emit: Emit, resume: bool, stop: Stop, ranks: Ranks
) -> RepairResult | None:
    """Repair into a folder that this process, or rank 0, holds; return the result on rank 0, None on others."""
    began = time.monotonic()
    if resume and ranks.writes:
        folder.require_same(start.config, start.source, emit)
    with out_of_memory_reported(*size_of_step(start.preprocess, start.settings)):
        repair = ready(prepared(start, emit, ranks), folder, resume)
        _go_on_or_begin(repair, folder, resume)
        earlier = repair.progress.seconds
        after = _repaired(repair, folder, stop)
        if after is None or repair.guard is None:
            return None
        return _written(repair, folder, repair.guard, after, lambda: earlier + time.monotonic() - began)


def prepared(
    start: Start, emit: Emit, ranks: Ranks, decompose: Callable[[Tensor], SingularBasis] = singular_basis
) -> Prepared:
    """Prepare everything that needs no image: directions from the weights, the module, no deltas yet."""
    settings, backbone = start.settings, start.backbone
    device = exact_device(start.device)
    prediction = ranks.from_rank0(lambda: predict(backbone, ("cumulative",), emit, device))
    directions = Directions(prediction.directions().to(start.device), prediction.gaps())
    rule = DetectionRule.of(settings)
    if not any(rule.can_mark(gap) for gap in directions.gaps):
        emit(Warned(f"no direction is determined (σ₁/σ₂ < {settings.min_gap} in every block): no token can be marked"))
    module = load_module(backbone, start.device)
    deltas = Deltas(backbone, module, emit, settings.offload, decompose=decompose)
    return Prepared(start, directions, module, deltas, emit, ranks)


def ready(prepared: Prepared, folder: RunFolder, resume: bool) -> Repair:
    """Scan the original, or read an earlier scan, and choose the images to train on and to be judged by."""
    start, ranks = prepared.start, prepared.ranks
    settings, source = start.settings, start.source
    unreadable: dict[str, str] = {}
    chosen = sampled(len(source), settings.scan_images, settings.seed)
    if len(chosen) < len(source):
        prepared.emit(Noted(f"looking at {len(chosen):,} of {len(source):,} images (--scan-images)"))
    if ranks.from_rank0(lambda: resume and folder.outliers.is_file()):
        found = ranks.from_rank0(lambda: Scan.read(folder.outliers)).named_as_in(source)
        unreadable |= {source.name(place): why for place, why in found.unreadable.items()}
        require_readable(source, unreadable, settings.strict)
    else:
        found = _scanned(prepared, chosen, unreadable)
    found.require_finite()
    flooded = [image.name for image in found.images if image.flooded]
    if flooded and not found.healthy:
        which = flooded[0] if len(flooded) == 1 else f"{len(flooded)} images, such as {flooded[0]}"
        prepared.emit(
            Noted(f"most tokens, or cls, of {which} have far larger norms than usual: no repair is judged by it")
        )
    images = list(found.images)
    indices = [image.place for image in images]
    guard_indices, also = _guard_indices(start, found, images, indices)
    held = set(guard_indices) - set(also)
    if found.healthy:
        training: Sequence[int] = ()
    elif settings.visit == "all":
        offered = [index for index in range(len(source)) if index not in held]
        unfit = {image.place for image in images if image.flooded}
        training = [index for index in offered if index not in unfit] or offered
    else:
        chosen_images = to_train_on([image for image in images if image.place not in held])
        training = rarest_first(chosen_images, [image.place for image in chosen_images])
    progress = Progress(density_window(len(training), settings), unreadable=unreadable)
    guard = _guard(prepared, guard_indices, progress) if ranks.writes else None
    if also:
        prepared.emit(
            Noted("the only image with its kind of defect is used for training and for judging: more images would help")
        )
    judged = {image.kind for image in images if image.place in set(guard_indices)}
    others = [image for image in images if image.blocks and image.kind not in judged]
    unjudged = tuple(others[at] for at in sampled(len(others), MOST_ELSEWHERE, settings.seed))
    drawn = sum(at >= start.given for at in guard_indices)
    return Repair(prepared, found, SomeImages(source, training), guard, len(also), drawn, unjudged, progress)


def _scanned(prepared: Prepared, chosen: Sequence[int], unreadable: dict[str, str]) -> Scan:
    start = prepared.start
    found = scan(
        start.backbone,
        prepared.module,
        prepared.directions,
        start.source,
        start.preprocess,
        chosen,
        start.settings,
        unreadable,
        prepared.emit,
        prepared.ranks,
    )
    given = {start.source.name(index) for index in chosen if index < start.given}
    read = sum(image.name in given for image in found.images)
    require_some(read, len(given) - read)  # drawn images do not replace the user's if none of these can be read
    require_readable(start.source, unreadable, start.settings.strict)
    return found


def _guard_indices(
    start: Start, found: Scan, images: Sequence[ImageOutliers], indices: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Choose the images of the guard, by index in the source; and those of them to train on too, as no others exist.

    They are images that the user gave, if there are two or more of them, and drawn ones up to four. If none of them has
    a defect, a defective image is added, which is then lost for training unless it is the only one of its kind. Flooded
    images are left out if there are others: for them, the inpainted original is no yardstick.
    """
    settings = start.settings
    pairs = list(zip(images, indices, strict=True))
    fit = [(image, at) for image, at in pairs if not image.flooded] or pairs
    given = [(image.kind, at) for image, at in fit if at < start.given]
    drawn = [(image.kind, at) for image, at in fit if at >= start.given]
    chosen = [
        offered[place][1]
        for offered, size in zip((given, drawn), guard_sizes(len(given), len(drawn), settings.eval_images), strict=True)
        for place in guarded([kind for kind, _ in offered], size, settings.seed)
    ]
    if found.healthy:
        return chosen or list(indices[:1]), []
    defective = [(image.kind, at) for image, at in fit if image.blocks]
    defective = defective or [(image.kind, at) for image, at in pairs if image.blocks]
    shown = Counter(kind for kind, _ in defective)
    if {at for _, at in defective} & set(chosen):
        return chosen, []
    kind, commonest = max(defective, key=lambda each: shown[each[0]])
    return [*chosen, commonest], [commonest] if shown[kind] == 1 else []


def _guard(prepared: Prepared, indices: Sequence[int], progress: Progress) -> Guard:
    """Build the guard and run the original on its images. Raises `BadInputError` if a token is not finite."""
    start = prepared.start
    settings = start.settings
    loaded = load_in_order(start.source, start.preprocess, indices)
    images = dict(readable(loaded, progress.unreadable, prepared.emit))
    require_some(len(images), len(progress.unreadable))
    guard = Guard(
        backbone=in_precision(start.backbone, settings.dtype, settings.tf32),
        module=prepared.module,
        directions=prepared.directions,
        rule=DetectionRule.of(settings),
        images=images,
        batch_size=settings.batch_size,
        device=start.device,
        emit=prepared.emit,
    )
    guard.remember()
    guard.before.require_finite("the backbone is broken", "give other weights")
    return guard


def _go_on_or_begin(repair: Repair, folder: RunFolder, resume: bool) -> None:
    """Restore the newest checkpoint of the run in the folder, or begin a new run there."""
    start, progress, emit, ranks = repair.prepared.start, repair.progress, repair.prepared.emit, repair.prepared.ranks
    goes_on = resume and restored(folder.checkpoints, repair.prepared.deltas, progress, emit, ranks)
    if goes_on:
        forget_mended(start.source, start.preprocess, progress.unreadable)
        emit(Noted(f"resuming after step {progress.steps}"))
    if ranks.writes:
        if not goes_on:
            files = files_of(start.source)
            config = folder.read_config() if resume else start.config  # of a run without a checkpoint yet
            folder.begin(config, listed_images(files, emit) if files else ())
            repair.scan.write(folder.outliers)
        folder.write_sidecars(start.backbone.sidecars)
        folder.forget_after(progress.steps, progress.last_look)


def _repaired(repair: Repair, folder: RunFolder, stop: Stop) -> Snapshot | None:
    """Take the steps, put the best state back, and return its snapshot, on rank 0.

    Raises `DivergedError` if the steps or the final state diverge; in the first case only the checkpoints up to the
    last proven step stay.
    """
    deltas, progress = repair.prepared.deltas, repair.progress
    try:
        if len(repair.training):
            _take_steps(repair, folder, stop)
    except DivergedError:
        if repair.prepared.ranks.writes:
            folder.checkpoints.forget_after(progress.proven)
        raise
    if repair.prepared.start.settings.keep == "best":
        deltas.put_back(progress.best.deltas if progress.best else {})
    if repair.guard is None:
        return None
    after = _seen_already(repair) or repair.guard.look()
    after.require_finite("the repair has diverged", ANEW, DivergedError)
    return after


def _seen_already(repair: Repair) -> Snapshot | None:
    """Return the guard's snapshot of the state that is kept; None if the guard has not looked at it."""
    deltas, progress, guard = repair.prepared.deltas, repair.progress, repair.guard
    assert guard is not None  # rank 0 has it
    if not deltas.changed:
        return guard.before
    kept = progress.best.step if repair.prepared.start.settings.keep == "best" and progress.best else progress.last_look
    return guard.latest if kept == progress.last_look >= progress.last_move else None


def _take_steps(repair: Repair, folder: RunFolder, stop: Stop) -> None:
    """Take steps until the images are clean, the guard ends the run, or the steps are used up; record each."""
    ready, progress = repair.prepared, repair.progress
    start, emit, ranks = ready.start, ready.emit, ready.ranks
    settings, checkpoints = start.settings, folder.checkpoints

    def save() -> None:
        if ranks.writes:
            folder.flush_lines()
            checkpoints.write(ready.deltas, progress)

    def look() -> None:
        """Let the guard judge the state, unless it has seen it already, and keep the best state."""
        if progress.last_look >= progress.last_move:
            return
        evaluation = ranks.from_rank0(lambda: _evaluation(repair))
        progress.judge(evaluation, ready.deltas.values(), stops=settings.keep == "best")
        if ranks.writes:
            folder.record(evaluation)
        emit(evaluation)

    def tell(record: StepRecord) -> None:
        if ranks.writes:
            folder.record(record)
        emit(record)
        if settings.eval_every and record.step % settings.eval_every == 0:
            look()

    if settings.eval_every and progress.steps and progress.steps % settings.eval_every == 0:
        look()  # an earlier process may have ended before this look
    steps = repair_steps(
        start.backbone,
        ready.directions,
        ready.deltas,
        repair.training,
        start.preprocess,
        settings,
        progress,
        emit,
        ranks,
        repair.known,
    )
    emit(Started("repairing", settings.max_steps, "steps", progress.steps))
    with closing(checkpointed(steps, save, progress, settings, stop, emit, ranks)) as records:
        for record in records:
            with saved_if_it_fails(save):
                tell(record)
    emit(Finished("repairing"))
    look()


def _evaluation(repair: Repair) -> Evaluation:
    """Return the guard's evaluation of the state after the latest step."""
    assert repair.guard is not None  # rank 0 has it
    settings, progress = repair.prepared.start.settings, repair.progress
    return repair.guard.evaluation(progress.steps, repair.guard.look(), settings.min_fidelity, progress.best)


def _left_elsewhere(repair: Repair) -> Elsewhere | None:
    """Count what is left on training images whose kind of defect the guard does not show; None without such images."""
    if not repair.unjudged:
        return None
    start, ready = repair.prepared.start, repair.prepared
    running = in_precision(start.backbone, start.settings.dtype, start.settings.tf32)
    rule = DetectionRule.of(start.settings)
    loaded = load_in_order(start.source, start.preprocess, [image.place for image in repair.unjudged])
    left = images = 0
    for _, pixels in readable(loaded, repair.progress.unreadable, ready.emit):
        seen = see(running, ready.module, ready.directions, pixels[None].to(start.device), rule)
        left += int(seen.defective.any(dim=0).sum())
        images += 1
    before = sum(len({at for places in image.blocks.values() for at in places}) for image in repair.unjudged)
    return Elsewhere(images, before, left)


def _written(
    repair: Repair, folder: RunFolder, guard: Guard, after: Snapshot, seconds: Callable[[], float]
) -> RepairResult:
    """Write the repaired weights, the adapter, and last the summary, which marks the run as finished."""
    start, deltas = repair.prepared.start, repair.prepared.deltas
    backbone, settings, config = start.backbone, start.settings, folder.read_config()  # from the beginning of the run
    if not folder.metrics.is_file():  # of a run without a step
        write_text(folder.metrics, "")
    repair.prepared.emit(Noted(f"writing {folder.model}"))
    write_model(folder.model, backbone.weights, deltas)
    write_adapter(folder.adapter, backbone.name, config["weights"]["fingerprint"], deltas, settings)
    elsewhere = _left_elsewhere(repair) if deltas.changed else None
    summary = run_summary(
        backbone,
        guard.before,
        after,
        repair.scan,
        repair.also_trained,
        repair.drawn,
        elsewhere,
        (guard.found_before, guard.found_again(after) if deltas.changed else guard.found_before),
        repair.progress,
        deltas,
        settings,
        config,
    )
    summary["seconds"] = round(seconds(), 3)
    write_json(folder.summary, summary)
    return RepairResult(
        folder=folder.path,
        model=backbone.name,
        summary=summary,
        config=config,
        before=guard.before,
        after=after,
        pictures=list(guard.images.values())[:SAMPLES],
        names=list(guard.images)[:SAMPLES],
        mean=start.preprocess.mean,
        std=start.preprocess.std,
    )
