"""The verbs as functions: they take settings and return records. The one place where stages are composed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.backbone.attention import require_attention
from sinder_cli.backbone.describe import Backbone, ModelRequest
from sinder_cli.backbone.device import exact_device, resolve_device
from sinder_cli.backbone.opening import load_module, open_backbone, require_loadable
from sinder_cli.backbone.registry import InstalledBackbone, hooks_for, installed_backbones
from sinder_cli.defects.settings import DetectionSettings
from sinder_cli.errors import NoInputError, UsageError
from sinder_cli.events import Emit, Finished, Noted, Started, Warned, silent
from sinder_cli.files import require_writable_file, sha256_of, write_json
from sinder_cli.images.choosing import sampled
from sinder_cli.images.finding import find_images
from sinder_cli.images.loading import require_some
from sinder_cli.images.preprocessing import MIN_PATCHES, Preprocessing, Resize
from sinder_cli.images.sources import DrawnImages, ImageSource
from sinder_cli.memory import told_when_it_runs_out
from sinder_cli.ranks import ALONE, Ranks, require_alike
from sinder_cli.repair.settings import RepairSettings
from sinder_cli.stopping import Stop

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.analysis.results import AnalysisResult
    from sinder_cli.analysis.tokens import Subject
    from sinder_cli.defects.prediction import Prediction
    from sinder_cli.defects.rules import Stage
    from sinder_cli.repair.evaluation import Snapshot
    from sinder_cli.repair.folder import RunFolder
    from sinder_cli.repair.results import RepairResult

DRAWN_IMAGES = 64  # how many a backbone draws that brings its own


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote."""

    path: Path
    target: str
    tensors: int
    bytes: int
    sha256: str


def backbones() -> list[InstalledBackbone]:
    """Every model of every installed plugin."""
    return list(installed_backbones())


def open_model(request: ModelRequest) -> Backbone:
    """Ask the plugin that the model belongs to for a checked description; of what a run repaired, for its directory.

    An adapter is applied to its weights. Raises `UsageError` for a run directory with weights, heads or an adapter.
    """
    from sinder_cli.repair.folder import RunFolder

    run = RunFolder(Path(request.model))
    if run.config.is_file() or request.model.startswith(("/", "./", "../")):
        if request.weights or request.heads or request.adapter or request.revision:
            why = "a run has its own weights and heads"
            raise UsageError(f"cannot use {request.model} with other weights", why, "leave the option out")
        model, heads = run.repaired_model()
        request = replace(request, model=model, weights=run.model, heads=heads, sidecars=run.read_sidecars())
    hooks = hooks_for(request.model)
    if request.adapter is None:
        return open_backbone(hooks, request)
    from sinder_cli.repair.adapter import adapted, read_adapter

    adapter = read_adapter(request.adapter)  # before a checkpoint is read, or even downloaded
    return adapted(open_backbone(hooks, request), adapter, request.emit)


def predict(request: ModelRequest, stages: Sequence[Stage], emit: Emit = silent) -> Prediction:
    """Defect directions from the weights alone; the module is never built."""
    backbone = open_model(request)  # an unknown model is told before torch is imported
    from sinder_cli.defects.prediction import predict as predict_defects

    return predict_defects(backbone, stages, emit)


def analyze(
    request: ModelRequest,
    places: Sequence[str],
    settings: AnalyzeSettings,
    emit: Emit = silent,
    stdin: IO[str] | None = None,
    other: ModelRequest | None = None,
    draw: bool = False,
    ranks: Ranks = ALONE,
) -> AnalysisResult | None:
    """What the tokens do, block by block, and whether the weights predict it; of two backbones if `other` is given.

    Either may be a run directory. `settings.clamp` makes a second one out of the first. `draw` asks for portraits,
    which are made as they are gone through. Each of several `ranks` looks at its share of the images, and rank 0 has
    the result, the others None. Raises `UsageError` for two backbones that do not compare.
    """
    if other is not None and settings.clamp is not None:
        raise UsageError("cannot compare with two models", "one is named, one is clamped", "leave one of them out")
    named = _named_images(places, stdin, emit, ranks)  # before a checkpoint is read, or even downloaded
    from sinder_cli.analysis.batches import ImageBatches
    from sinder_cli.analysis.portraits import portraits, shown_blocks
    from sinder_cli.analysis.results import AnalysisResult, analysis_of
    from sinder_cli.analysis.survey import survey

    device = exact_device(_device(settings, ranks, emit))
    require_attention(request.attention, device)
    backbones = _compared(open_model(request), other, settings.clamp, emit)
    first = backbones[0]
    shown = shown_blocks(first.depth, settings.blocks)
    preprocess = preprocessing(first, settings.image_size, settings.resize)
    source = named or drawn_images(first, settings.seed)
    require_alike({"images": source.fingerprint()}, ranks)
    chosen = sampled(len(source), settings.limit, settings.seed)
    images = ImageBatches(source, preprocess, chosen, settings, emit, ranks)
    subjects = [_subject(backbone, device, emit, ranks) for backbone in backbones]

    grid = (preprocess.size // first.patch_size,) * 2
    sizes = f"at image size {preprocess.size}, resize {settings.resize} and batch size {settings.batch_size}"
    with told_when_it_runs_out(sizes, "lower --image-size or --batch-size, or use --resize square"):
        surveys = survey(subjects, images.share(), grid, settings, device, draw and settings.figures != 0, ranks)
    images.gather_skipped()
    if surveys is None:
        return None
    require_some(surveys.images, len(images.skipped))
    drawn, again = images.again(settings.figures if surveys.basis else 0)
    resolved = settings.model_copy(
        update={"device": device, "blocks": shown, "image_size": None if settings.resize == "none" else preprocess.size}
    )
    return AnalysisResult(
        analysis=analysis_of(subjects, surveys, resolved, grid, images.skipped),
        predictions=tuple(subject.prediction for subject in subjects),
        surveys=surveys.sides,
        blocks=shown,
        portraits=portraits(subjects, again, surveys.basis, settings, device) if surveys.basis else iter(()),
        drawn=drawn,
        mean=preprocess.mean,
        std=preprocess.std,
    )


def _compared(first: Backbone, other: ModelRequest | None, clamp: int | None, emit: Emit) -> list[Backbone]:
    """The backbone, and the one that it is compared with if there is one: another, or itself clamped."""
    from sinder_cli.analysis.survey import require_comparable

    if other is not None:
        backbones = [first, open_model(other)]
        require_comparable(backbones)
        return backbones
    if clamp is not None:
        from sinder_cli.analysis.clamp import clamped

        return [first, clamped(first, clamp, emit)]
    return [first]


def _subject(backbone: Backbone, device: str, emit: Emit, ranks: Ranks) -> Subject:
    """A backbone with its predictions, and its weights in place."""
    from sinder_cli.analysis.tokens import Subject
    from sinder_cli.defects.prediction import predict as predict_defects

    module = load_module(backbone, device)
    return Subject(backbone, module, ranks.once(lambda: predict_defects(backbone, emit=emit, device=device)))


def _named_images(places: Sequence[str], stdin: IO[str] | None, emit: Emit, ranks: Ranks) -> ImageSource | None:
    """The images that the user named; a list on standard input is read once, by rank 0."""
    if not places:
        return None
    if "-" in places and ranks.size > 1:
        stdin = StringIO(ranks.once(lambda: (stdin or sys.stdin).read()))
    return find_images(places, stdin, emit)


def repair(
    request: ModelRequest,
    places: Sequence[str],
    out: Path,
    settings: RepairSettings,
    emit: Emit = silent,
    stdin: IO[str] | None = None,
    resume: bool = False,
    force: bool = False,
    stop: Stop | None = None,
    ranks: Ranks = ALONE,
) -> RepairResult | None:
    """Fine-tune singular values until the images are clean, and leave a run directory behind.

    `resume` goes on with an unfinished run there, if there is one; `force` gives a run up that is there. `stop` may ask
    to end after a step: a checkpoint is written then, and `Ended` raised. Of several `ranks`, each takes its share of
    every batch; rank 0 alone evaluates, writes and has the result, the others None.
    """
    if settings.batch_size < ranks.size:
        why = f"each of the {ranks.size} processes takes its share of every batch"
        raise UsageError(f"batch size {settings.batch_size} is too small", why, f"use --batch-size {ranks.size}")
    named = _named_images(places, stdin, emit, ranks)  # before a checkpoint is read, or even downloaded
    from sinder_cli.repair.folder import RunFolder

    folder = RunFolder(out)
    if force:
        _require_elsewhere(out, request)
    with folder.held(emit) if ranks.writes else nullcontext():
        resume = ranks.once(lambda: folder.require_free(resume, force))
        opened = _opened(request, named, settings, ranks)
        return _repair(opened, folder, settings, emit, resume, stop or Stop(), ranks)


def finished_repair(
    request: ModelRequest,
    places: Sequence[str],
    out: Path,
    settings: RepairSettings,
    emit: Emit = silent,
    stdin: IO[str] | None = None,
) -> dict[str, Any]:
    """`summary.json` of the run that has ended in `out`. Raises `ConflictError` where this would be another run."""
    named = find_images(places, stdin, emit) if places else None
    from sinder_cli.repair.folder import RunFolder

    folder = RunFolder(out)
    folder.require_same(_opened(request, named, settings).config)
    return folder.read_summary()


@dataclass(frozen=True)
class _Opened:
    """What a repair starts from, and the `config.json` that says so."""

    backbone: Backbone
    preprocess: Preprocessing
    source: ImageSource
    device: str
    config: dict[str, Any]


def _opened(
    request: ModelRequest, named: ImageSource | None, settings: RepairSettings, ranks: Ranks = ALONE
) -> _Opened:
    from sinder_cli.repair.results import run_config

    device = _device(settings, ranks, request.emit)
    require_attention(request.attention, device)
    backbone = ranks.machine_first(lambda: open_model(request))
    preprocess = preprocessing(backbone, settings.image_size)
    source = named or drawn_images(backbone, settings.seed)
    config = run_config(backbone, request, settings, preprocess, source, device)
    require_alike(config, ranks)
    return _Opened(backbone, preprocess, source, device, config)


def _require_elsewhere(out: Path, request: ModelRequest) -> None:
    """Refuse to remove the run that the model to be repaired, or its adapter, lies in."""
    for place in (Path(request.model), request.weights, request.adapter):
        if place is not None and place.exists() and out.resolve() in (place.resolve(), *place.resolve().parents):
            what = f"cannot replace the run in {out}"
            raise UsageError(what, "it holds the weights that are to be repaired", "choose another --out")


def _repair(
    opened: _Opened,
    folder: RunFolder,
    settings: RepairSettings,
    emit: Emit,
    resume: bool,
    stop: Stop,
    ranks: Ranks,
) -> RepairResult | None:
    """Repair into a folder that this process, or rank 0, holds."""
    began = time.monotonic()
    from sinder_cli.defects.prediction import predict as predict_defects
    from sinder_cli.repair.adapter import write_adapter
    from sinder_cli.repair.batches import forget_mended, require_readable
    from sinder_cli.repair.deltas import Deltas
    from sinder_cli.repair.evaluation import SAMPLES, evaluation_images, take_snapshot
    from sinder_cli.repair.forward import Directions
    from sinder_cli.repair.loop import Progress, density_window, repair_steps
    from sinder_cli.repair.results import RepairResult, run_summary, write_model
    from sinder_cli.repair.session import checkpointed, restored

    backbone, preprocess, source, device = opened.backbone, opened.preprocess, opened.source, opened.device
    progress = Progress(density_window(len(source)))
    samples: dict[str, Tensor] = {}
    if ranks.writes:
        if resume:
            folder.require_same(opened.config, emit)
        samples = evaluation_images(source, preprocess, settings.eval_images, progress.unreadable, emit)
        require_readable(source, progress.unreadable, settings.strict)
    images = list(samples.values())

    prediction = ranks.once(lambda: predict_defects(backbone, ("cumulative",), emit, exact_device(device)))
    directions = Directions(prediction.directions().to(device), prediction.gaps())
    if not any(gap >= settings.min_gap for gap in directions.gaps):
        emit(Warned(f"no direction is determined (σ₁/σ₂ < {settings.min_gap} in every block): none can be defective"))
    module = load_module(backbone, device)

    def look(phase: str) -> Snapshot:
        return take_snapshot(backbone, module, images, settings.batch_size, device, emit, phase)

    before = look("looking at the original") if ranks.writes else None
    if before is not None:
        before.require_finite("the backbone is broken", "give other weights")
    deltas = Deltas(backbone, module, emit, settings.offload)
    checkpoints = folder.checkpoints
    if resume and restored(checkpoints, deltas, progress, emit, ranks):
        forget_mended(source, preprocess, progress.unreadable)
        emit(Noted(f"going on after step {progress.steps}"))
    if ranks.writes:
        if not resume:
            folder.begin(opened.config)
        folder.write_sidecars(backbone.sidecars)
        folder.forget_after(progress.steps)

    def save() -> None:
        if ranks.writes:
            folder.flush_metrics()
            checkpoints.write(deltas, progress)

    steps = repair_steps(backbone, directions, deltas, source, preprocess, settings, progress, emit, ranks)
    earlier = progress.seconds
    emit(Started("repairing", settings.max_steps, "steps", progress.steps))
    with closing(checkpointed(steps, save, progress, settings, stop, emit, ranks)) as records:
        for record in records:
            if ranks.writes:
                folder.record(record)
            emit(record)
    emit(Finished("repairing"))
    if before is None:
        return None
    after = look("looking at the repaired")
    after.require_finite("the repair has diverged", "lower --lr")

    emit(Noted(f"writing {folder.model}"))
    write_model(folder.model, backbone.weights, deltas)
    write_adapter(folder.adapter, backbone.name, opened.config["weights"]["fingerprint"], deltas, settings)
    summary = run_summary(backbone, before, after, progress, deltas, settings)
    summary["seconds"] = round(earlier + time.monotonic() - began, 3)
    write_json(folder.summary, summary)
    return RepairResult(
        folder=folder.path,
        model=backbone.name,
        summary=summary,
        config=opened.config,
        before=before,
        after=after,
        pictures=images[:SAMPLES],
        names=list(samples)[:SAMPLES],
        mean=preprocess.mean,
        std=preprocess.std,
    )


def export(source: str, target: str, out: Path, request: ModelRequest, emit: Emit = silent) -> ExportResult:
    """Write a run's or a model's weights where they can be loaded; checked before the file gets its name."""
    from sinder_cli.export.native import require_native_suffix, write_native

    if target != "native":
        raise UsageError(f"unknown export format {target!r}", "only native is known", "use --to native")
    require_native_suffix(out)
    require_writable_file(out)
    backbone = open_model(replace(request, model=source))
    require_loadable(backbone)
    emit(Noted(f"writing {out}"))
    write_native(out, backbone.weights)
    return ExportResult(out, target, len(backbone.weights.names), out.stat().st_size, sha256_of(out))


def _device(settings: DetectionSettings, ranks: Ranks, emit: Emit) -> str:
    """The device of the settings; what it does not know of them is told."""
    device = resolve_device(settings.device, ranks)
    if settings.tf32 and not device.startswith("cuda"):
        emit(Warned(f"--tf32 has no effect on device {device!r}"))
    return device


def drawn_images(backbone: Backbone, seed: int) -> ImageSource:
    """The images that a backbone draws itself, for when the user named none."""
    if backbone.sample_images is None:
        raise NoInputError(f"no images for {backbone.name}", "it brings none of its own", "name a folder with --data")
    return DrawnImages(tuple(backbone.sample_images(DRAWN_IMAGES, seed)), backbone.name)


def preprocessing(backbone: Backbone, image_size: int | None, resize: Resize = "square") -> Preprocessing:
    """The model's normalization, and a size rounded down to whole patches. Raises `UsageError` for under 5 × 5."""
    size = image_size or backbone.image_size
    rounded = size - size % backbone.patch_size
    if rounded < MIN_PATCHES * backbone.patch_size:
        raise UsageError(
            f"image size {size} is too small",
            f"it makes under {MIN_PATCHES} × {MIN_PATCHES} patches of {backbone.patch_size} pixels",
            f"use --image-size {MIN_PATCHES * backbone.patch_size} or more",
        )
    return Preprocessing(rounded, backbone.mean, backbone.std, resize, backbone.patch_size)
