"""A complete repair: scan the original, take steps, judge the result, and write the run directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from sinder_cli.distributed import Ranks
from sinder_cli.events import Emit, Finished, Noted, Started
from sinder_cli.files import write_json, write_text
from sinder_cli.images.loading import load_in_order, readable, require_some, sampled
from sinder_cli.images.sources import ImageSource, SomeImages, files_of
from sinder_cli.memory import out_of_memory_reported
from sinder_cli.repairing.checkpoints import Checkpoints
from sinder_cli.repairing.choosing import Chosen, chosen_images, forget_mended, require_readable
from sinder_cli.repairing.folder import RunFolder
from sinder_cli.repairing.guard import SAMPLES, Evaluation, Guard, Snapshot
from sinder_cli.repairing.loop import (
    ANEW,
    DivergedError,
    Known,
    Progress,
    StepRecord,
    clean_window,
    repair_steps,
    size_of_step,
)
from sinder_cli.repairing.preparing import Prepared, Start, prepare
from sinder_cli.repairing.results import Outcome, RepairResult, run_summary, write_model
from sinder_cli.repairing.run_identity import listed_images
from sinder_cli.repairing.scan import Scan, marked_batch, scan
from sinder_cli.repairing.session import checkpointed, restored, saved_if_it_fails
from sinder_cli.repairing.verdict import Elsewhere
from sinder_cli.repairing.weight_changes import write_adapter
from sinder_cli.signals import Stop


@dataclass(frozen=True)
class Repair:
    """A repair in memory, ready for its next step."""

    prepared: Prepared
    scan: Scan
    chosen: Chosen
    guard: Guard | None  # on rank 0; None on the others
    progress: Progress

    @property
    def training(self) -> ImageSource:
        """The images for the steps; empty if there is nothing to repair."""
        return SomeImages(self.prepared.start.source, self.chosen.training)

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
        repair = ready(prepare(start, emit, ranks), folder, resume)
        _go_on_or_begin(repair, folder, resume)
        earlier = repair.progress.seconds
        after = _repaired(repair, folder, stop)
        if after is None or repair.guard is None:
            return None
        return _written(repair, folder, repair.guard, after, lambda: earlier + time.monotonic() - began)


def ready(prepared: Prepared, folder: RunFolder, resume: bool) -> Repair:
    """Scan the original, or read an earlier scan, and choose the images to train on and to be judged by."""
    start, emit = prepared.start, prepared.emit
    unreadable: dict[str, str] = {}
    found = _looked_at(prepared, folder, resume, unreadable)
    found.require_finite()
    flooded = [image.name for image in found.images if image.flooded]
    if flooded and not found.healthy:
        which = flooded[0] if len(flooded) == 1 else f"{len(flooded)} images, such as {flooded[0]}"
        emit(Noted(f"most tokens, or cls, of {which} have far larger norms than usual: no repair is judged by it"))
    chosen = chosen_images(found, len(start.source), start.given, start.settings)
    progress = Progress(clean_window(len(chosen.training), start.settings), unreadable=unreadable)
    guard = _guard(prepared, chosen.guard, progress) if prepared.ranks.writes else None
    if chosen.also_trained:
        emit(
            Noted("the only image with its kind of defect is used for training and for judging: more images would help")
        )
    return Repair(prepared, found, chosen, guard, progress)


def _looked_at(prepared: Prepared, folder: RunFolder, resume: bool, unreadable: dict[str, str]) -> Scan:
    """Return the scan of this run's folder if it goes on and has one, or else a new one."""
    start, ranks = prepared.start, prepared.ranks
    settings, source = start.settings, start.source
    places = sampled(len(source), settings.scan_images, settings.seed)
    if len(places) < len(source):
        prepared.emit(Noted(f"scanning {len(places):,} of {len(source):,} images (--scan-images)"))
    if ranks.from_rank0(lambda: resume and folder.outliers.is_file()):
        found = ranks.from_rank0(lambda: Scan.read(folder.outliers)).named_as_in(source)
        unreadable |= {source.name(place): why for place, why in found.unreadable.items()}
    else:
        found = scan(prepared, places, unreadable)
        given = {source.name(place) for place in places if place < start.given}
        read = sum(image.name in given for image in found.images)
        require_some(read, len(given) - read)  # drawn images do not replace the user's if none of these can be read
    require_readable(source, unreadable, settings.strict)
    return found


def _guard(prepared: Prepared, places: Sequence[int], progress: Progress) -> Guard:
    """Build the guard and run the original on its images. Raises `BadInputError` if a token is not finite."""
    start = prepared.start
    loaded = load_in_order(start.source, start.preprocess, places)
    images = dict(readable(loaded, progress.unreadable, prepared.emit))
    require_some(len(images), len(progress.unreadable))
    guard = Guard(
        backbone=start.running,
        module=prepared.module,
        directions=prepared.directions,
        rule=start.rule,
        images=images,
        batch_size=start.settings.batch_size,
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
    prepared, progress = repair.prepared, repair.progress
    settings, emit, ranks = prepared.start.settings, prepared.emit, prepared.ranks
    books = _Books(repair, folder, folder.checkpoints)
    if progress.steps:
        books.look_if_due(progress.steps)  # an earlier process may have ended before this look
    steps = repair_steps(prepared, repair.training, progress, repair.known)
    emit(Started("repairing", settings.max_steps, "steps", progress.steps))
    with closing(checkpointed(steps, books.save, progress, settings, stop, emit, ranks)) as records:
        for record in records:
            with saved_if_it_fails(books.save):
                books.enter(record)
    emit(Finished("repairing"))
    books.look()


@dataclass(frozen=True)
class _Books:
    """The books of a repair: rank 0 writes its lines and checkpoints, and every rank knows what the guard says."""

    repair: Repair
    folder: RunFolder
    checkpoints: Checkpoints  # the same at every save: it knows which bases are on disk

    def save(self) -> None:
        """Write a checkpoint."""
        if self.repair.prepared.ranks.writes:
            self.folder.flush_lines()
            self.checkpoints.write(self.repair.prepared.deltas, self.repair.progress)

    def enter(self, record: StepRecord) -> None:
        """Record a step, and let the guard look at the state if that is due."""
        if self.repair.prepared.ranks.writes:
            self.folder.record(record)
        self.repair.prepared.emit(record)
        self.look_if_due(record.step)

    def look_if_due(self, step: int) -> None:
        """Let the guard look after every `eval_every` steps."""
        every = self.repair.prepared.start.settings.eval_every
        if every and step % every == 0:
            self.look()

    def look(self) -> None:
        """Let the guard judge the state, unless it has seen it already, and keep the best state."""
        prepared, progress = self.repair.prepared, self.repair.progress
        if progress.last_look >= progress.last_move:
            return
        settings = prepared.start.settings

        def evaluated() -> Evaluation:
            assert self.repair.guard is not None  # rank 0 has it
            guard = self.repair.guard
            return guard.evaluation(progress.steps, guard.look(), settings.min_fidelity, progress.best)

        evaluation = prepared.ranks.from_rank0(evaluated)
        progress.judge(evaluation, prepared.deltas.values(), stops=settings.keep == "best")
        if prepared.ranks.writes:
            self.folder.record(evaluation)
        prepared.emit(evaluation)


def _left_elsewhere(repair: Repair) -> Elsewhere | None:
    """Count what is left on training images whose kind of defect the guard does not show; None without such images."""
    unjudged, prepared = repair.chosen.unjudged, repair.prepared
    if not unjudged:
        return None
    start, module, directions = prepared.start, prepared.module, prepared.directions
    loaded = load_in_order(start.source, start.preprocess, [image.place for image in unjudged])
    left = images = 0
    for _, pixels in readable(loaded, repair.progress.unreadable, prepared.emit):
        found = marked_batch(start.running, module, directions, pixels[None].to(start.device), start.rule)
        left += int(found.defective.any(dim=0).sum())
        images += 1
    before = sum(len({at for places in image.blocks.values() for at in places}) for image in unjudged)
    return Elsewhere(images, before, left)


def _written(
    repair: Repair, folder: RunFolder, guard: Guard, after: Snapshot, seconds: Callable[[], float]
) -> RepairResult:
    """Write the repaired weights, the adapter, and last the summary, which marks the run as finished."""
    prepared, config = repair.prepared, folder.read_config()  # from the beginning of the run
    start, deltas = prepared.start, prepared.deltas
    if not folder.metrics.is_file():  # of a run without a step
        write_text(folder.metrics, "")
    prepared.emit(Noted(f"writing {folder.model}"))
    write_model(folder.model, start.backbone.weights, deltas)
    write_adapter(folder.adapter, start.backbone.name, config["weights"]["fingerprint"], deltas, start.settings)
    outcome = Outcome(
        guard.before,
        after,
        _left_elsewhere(repair) if deltas.changed else None,
        (guard.found_before, guard.found_again(after) if deltas.changed else guard.found_before),
    )
    summary = run_summary(prepared, repair.scan, repair.chosen, repair.progress, outcome, config)
    summary["seconds"] = round(seconds(), 3)
    write_json(folder.summary, summary)
    return RepairResult(
        folder=folder.path,
        model=start.backbone.name,
        summary=summary,
        config=config,
        before=guard.before,
        after=after,
        pictures=list(guard.images.values())[:SAMPLES],
        names=list(guard.images)[:SAMPLES],
        mean=start.preprocess.mean,
        std=start.preprocess.std,
    )
