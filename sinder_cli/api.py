"""The verbs as functions: they take settings and return records. The one place where stages are composed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.backbone.contract import Backbone, ModelRequest
from sinder_cli.backbone.device import exact_device, require_attention, resolve_device
from sinder_cli.backbone.opening import describe, load_module, open_backbone
from sinder_cli.backbone.registry import InstalledBackbone, hooks_for, installed_backbones
from sinder_cli.defects.settings import STAGES, DetectionSettings
from sinder_cli.distributed import ALONE, Ranks, require_alike
from sinder_cli.errors import NoInputError, SinderError, UsageError
from sinder_cli.events import Emit, Noted, Warned, silent
from sinder_cli.files import require_new_folder, require_writable_file, write_json
from sinder_cli.images.drawn import DrawnPictures
from sinder_cli.images.loading import require_some, sampled
from sinder_cli.images.preprocessing import MIN_PATCHES, Preprocessing, Resize
from sinder_cli.images.sources import DrawnImages, ImageSource, JoinedImages, find_images, read_bytes
from sinder_cli.memory import told_when_it_runs_out
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.signals import Stop

if TYPE_CHECKING:
    from sinder_cli.analysis.survey import AnalysisResult
    from sinder_cli.analysis.tokens import Subject
    from sinder_cli.conformance.subject import Conformance
    from sinder_cli.defects.prediction import Prediction
    from sinder_cli.defects.settings import Stage
    from sinder_cli.exporting.run import ExportResult
    from sinder_cli.exporting.settings import ExportSettings
    from sinder_cli.exporting.targets import Plan
    from sinder_cli.repairing.dry_run import Trial
    from sinder_cli.repairing.folder import FinishedRun, RunFolder
    from sinder_cli.repairing.results import RepairResult
    from sinder_cli.repairing.run import Start

DRAWN_IMAGES = 64  # how many a backbone draws that brings its own
FEW_IMAGES = 16  # under which drawn pictures are added to those that a repair is given
# A folder of such a name is nobody's wish, unless it is there.
OTHER_SUFFIXES = {".csv", ".htm", ".html", ".jsonl", ".md", ".pdf", ".png", ".safetensors", ".svg", ".txt"}
MOST_SQUARES = 4  # tokens of a long image at most, in squares of the model's size: up to 4:1 nothing is scaled down
MOST_CHEAP = 2048  # tokens that are let be in any case: attention is the smaller part of a block under 6 × width tokens
TO_TRAIN_ON = 32  # images, with those that are drawn


def backbones(emit: Emit = silent) -> list[InstalledBackbone]:
    """Every model of every installed plugin; each plugin that cannot be loaded is warned of."""
    rows = list(installed_backbones())
    for row in rows:
        if row.problem:
            emit(Warned(row.problem))
    return rows


def open_model(request: ModelRequest) -> Backbone:
    """Ask the plugin that the model belongs to for a checked description; of what a run repaired, for its directory.

    An adapter, or a delta, is applied to its weights. Raises `UsageError` for a run directory with weights or heads.
    """
    if run := _run_named(request):
        if request.weights or request.heads or request.revision or request.branch:
            why = "a run has its own weights and heads"
            raise UsageError(f"cannot use {request.model} with other weights", why, "leave the option out")
        model, heads = run.repaired_model()
        request = replace(request, model=model, weights=run.model, heads=heads, sidecars=run.read_sidecars())
    hooks = hooks_for(request.model)
    if request.adapter is None:
        return open_backbone(hooks, request)
    from sinder_cli.repairing.weight_changes import read_change

    change = read_change(request.adapter)  # before a checkpoint is read, or even downloaded
    return change.applied(open_backbone(hooks, request), request.emit)


def _run_named(request: ModelRequest) -> RunFolder | None:
    """The run directory that the user named in the place of a model; it need not be one yet."""
    from sinder_cli.repairing.folder import RunFolder

    run = RunFolder(Path(request.model))
    return run if run.is_run or request.model.startswith(("/", "./", "../")) else None


def check_backbone(request: ModelRequest, emit: Emit = silent) -> Conformance:
    """Run a plugin through everything that the engine relies on, with the weights that the request means.

    What its checks raise are failures of theirs. Raises `UsageError` for a name that no plugin offers, and what goes
    wrong before there is a backbone to look at.
    """
    hooks = hooks_for(request.model)
    backbone = describe(hooks, request)
    from sinder_cli.conformance.running import conformance

    return conformance(backbone, lambda path: describe(hooks, replace(request, weights=path)), emit)


def predict(
    request: ModelRequest, stages: Sequence[Stage] = STAGES, emit: Emit = silent, out: Path | IO[bytes] | None = None
) -> Prediction:
    """Defect directions from the weights alone; the module is never built.

    `out` is a file, or an open one, that gets them as safetensors: one `[blocks, N]` float32 tensor a stage.
    """
    if isinstance(out, Path):
        require_writable_file(out)
    backbone = open_model(request)  # an unknown model is told before torch is imported
    from sinder_cli.defects.prediction import predict as predict_defects
    from sinder_cli.defects.prediction import write_directions

    prediction = predict_defects(backbone, stages, emit)
    if out is not None:
        write_directions(out, prediction)
    return prediction


def analyze(
    request: ModelRequest,
    places: Sequence[str],
    settings: AnalyzeSettings,
    emit: Emit = silent,
    stdin: IO[str] | None = None,
    other: ModelRequest | None = None,
    out: Path | None = None,
    ranks: Ranks = ALONE,
    features: Path | None = None,
    draw: bool = False,
) -> AnalysisResult | None:
    """What the tokens do, block by block, and whether the weights predict it; of two backbones if `other` is given.

    Either may be a run directory. `settings.clamp` and `settings.method` make a second one out of the first. `out` is a
    new folder for the page, the document, directions and figures, or a file `….json` for the document alone. Without
    a folder, `draw` asks for portraits, which are made as they are gone through. `features` is a folder that gets a
    file an image: the last block's tokens after the final norm, of the inpainted side where there is one, else of the
    first. Each of several `ranks` looks at its share of the images, and rank 0 has the result, the others None.
    Raises `UsageError` for two backbones that do not compare. Where writing fails in the end, `error.found` has the
    result.
    """
    folder, file = _places_of(out, ranks)
    made = "clamped" if settings.clamp is not None else "inpainted" if settings.method == "inpaint" else None
    if other is not None and made is not None:
        raise UsageError("cannot compare with two models", f"one is named, one is {made}", "leave one of them out")
    named = _named_images(places, stdin, emit, ranks)  # before a checkpoint is read, or even downloaded
    from sinder_cli.analysis.features import FeatureFiles, require_new_features
    from sinder_cli.analysis.per_image import portraits, shown_blocks
    from sinder_cli.analysis.survey import AnalysisResult, ImageBatches, analysis_of, survey
    from sinder_cli.analysis.tokens import featured

    if features is not None and ranks.writes:
        require_new_features(features)
    device = exact_device(_device(settings, ranks, emit))
    require_attention(request.attention, device)
    backbones = _compared(open_model(request), other, settings.clamp, emit)
    first = backbones[0]
    shown = shown_blocks(first.depth, settings.blocks)
    preprocess = preprocessing(first, settings.image_size, settings.resize, settings.max_tokens)
    source = named or drawn_images(first, settings.seed)
    require_alike({"images": source.fingerprint()}, ranks)
    chosen = sampled(len(source), settings.limit, settings.seed)
    images = ImageBatches(source, preprocess, chosen, settings, emit, ranks)
    subjects = [_subject(backbone, device, emit, ranks) for backbone in backbones]
    if settings.method == "inpaint":
        subjects.append(subjects[0].inpainted(settings))
    written = subjects[featured(subjects)].backbone
    files = None if features is None else FeatureFiles.made(features, images.names, written)

    grid = (preprocess.size // first.patch_size,) * 2
    sizes = f"at image size {preprocess.size}, resize {settings.resize} and batch size {settings.batch_size}"
    with told_when_it_runs_out(sizes, "lower --image-size or --batch-size, or use --resize square"):
        drawing = (draw or folder is not None) and settings.figures != 0
        kept = files.write if files is not None else None
        surveys = survey(subjects, images.share(), grid, settings, device, drawing, ranks, kept)
    images.gather()
    if surveys is None:
        return None
    require_some(surveys.images, len(images.skipped))
    drawn, again = images.again(settings.figures if surveys.basis else 0)
    resolved = settings.model_copy(
        update={
            "device": device,
            "blocks": shown,
            "image_size": None if settings.resize == "none" else preprocess.size,
            "max_tokens": preprocess.max_tokens,
        }
    )
    result = AnalysisResult(
        analysis=analysis_of(subjects, surveys, resolved, grid, images.skipped),
        predictions=tuple(subject.prediction for subject in subjects),
        surveys=surveys.sides,
        blocks=shown,
        portraits=portraits(subjects, again, surveys.basis, settings, device) if surveys.basis else iter(()),
        drawn=drawn,
        mean=preprocess.mean,
        std=preprocess.std,
    )
    try:
        return _analysis_written(result, folder, file, emit)
    except SinderError as error:
        error.found = result
        raise


def _places_of(out: Path | None, ranks: Ranks) -> tuple[Path | None, Path | None]:
    """The folder or the JSON file that an analysis is written to, looked at before anything is run; neither for none.

    Raises `UsageError` for what has the name of another kind of file, `CannotCreateError` where there is no writing.
    """
    if out is None:
        return None, None
    suffix = out.suffix.lower()
    if not out.is_dir() and suffix in OTHER_SUFFIXES:
        why = f"{suffix} is the name of a file, and reports are written into a folder"
        raise UsageError(f"cannot write {out}", why, f"give --out {out.with_suffix('') or 'DIR'}, or FILE.json")
    as_file = suffix == ".json" and not out.is_dir()
    if ranks.writes:
        (require_writable_file if as_file else require_new_folder)(out)
    return (None, out) if as_file else (out, None)


def _analysis_written(result: AnalysisResult, folder: Path | None, file: Path | None, emit: Emit) -> AnalysisResult:
    """The same with its figures listed, once they are written."""
    from sinder_cli.report.analysis.folder import write_analysis
    from sinder_cli.report.documents import analysis_document

    if folder is not None:
        return replace(result, analysis=write_analysis(folder, result, emit), folder=folder)
    if file is not None:
        write_json(file, analysis_document(result.analysis))
    return result


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
    return Subject(backbone, module, ranks.from_rank0(lambda: predict_defects(backbone, emit=emit, device=device)))


def _named_images(places: Sequence[str], stdin: IO[str] | None, emit: Emit, ranks: Ranks) -> ImageSource | None:
    """The images that the user named; a list on standard input is read once, by rank 0."""
    if not places:
        return None
    if "-" in places and ranks.size > 1:
        return find_images(places, BytesIO(ranks.from_rank0(lambda: read_bytes(stdin or sys.stdin))), emit)
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

    `resume` goes on with an unfinished run there, if there is one, over its images where none are named; `force` gives
    a run up that is there. `stop` may ask to end after a step: a checkpoint is written then, and `Ended` raised.
    Of several `ranks`, each takes its share of every batch; rank 0 alone evaluates, writes and has the result, the
    others None.
    """
    if settings.batch_size < ranks.size:
        why = f"each of the {ranks.size} processes takes its share of every batch"
        raise UsageError(f"batch size {settings.batch_size} is too small", why, f"use --batch-size {ranks.size}")
    named = _named_images(places, stdin, emit, ranks)  # before a checkpoint is read, or even downloaded
    from sinder_cli.repairing.folder import RunFolder
    from sinder_cli.repairing.run import run_repair
    from sinder_cli.repairing.run_identity import images_of
    from sinder_cli.report.repair.page import write_repair

    folder = RunFolder(out)
    if force:
        _require_elsewhere(out, request)
    with folder.held(emit) if ranks.writes else nullcontext():
        goes_on = ranks.from_rank0(lambda: folder.require_free(resume, force))
        if resume and not goes_on and ranks.writes:
            emit(Noted(f"no run in {out} yet: starting one"))
        if goes_on:
            named = named or images_of(folder)
        start = _start(request, named, places, settings, ranks)
        result = run_repair(start, folder, emit, goes_on, stop or Stop(), ranks)
        if result is not None:
            write_repair(folder, result)
        return result


def run_as_called(
    out: Path, given: ModelRequest, settings: RepairSettings
) -> tuple[ModelRequest, RepairSettings] | None:
    """What the run in a folder was called with, and over it what is given now; None where there is no run."""
    from sinder_cli.repairing.folder import RunFolder
    from sinder_cli.repairing.run_identity import as_called

    folder = RunFolder(out)
    return as_called(folder, given, settings) if folder.is_run else None


def try_repair(
    request: ModelRequest,
    places: Sequence[str],
    out: Path,
    settings: RepairSettings,
    emit: Emit = silent,
    stdin: IO[str] | None = None,
    force: bool = False,
) -> Trial:
    """What `repair` would do with the same arguments: all that it does before its first step, and that step's cost.

    Nothing is written, and nothing that is there is touched.
    """
    named = find_images(places, stdin, emit) if places else None
    from sinder_cli.repairing.dry_run import trial
    from sinder_cli.repairing.folder import RunFolder

    folder = RunFolder(out)
    with folder.held(emit):
        folder.require_free(resume=False, force=force)
        return trial(_start(request, named, places, settings), emit)


def finished_repair(
    request: ModelRequest,
    places: Sequence[str],
    out: Path,
    settings: RepairSettings,
    emit: Emit = silent,
    stdin: IO[str] | None = None,
) -> FinishedRun:
    """The records of the run that has ended in `out`. Raises `ConflictError` where this would be another run."""
    named = find_images(places, stdin, emit) if places else None
    from sinder_cli.repairing.folder import RunFolder
    from sinder_cli.repairing.run_identity import images_of

    folder = RunFolder(out)
    start = _start(request, named or images_of(folder), places, settings)
    folder.require_same(start.config, start.source, emit)
    return folder.read_finished()


def _start(
    request: ModelRequest,
    named: ImageSource | None,
    places: Sequence[str],
    settings: RepairSettings,
    ranks: Ranks = ALONE,
) -> Start:
    from sinder_cli.repairing.results import run_config
    from sinder_cli.repairing.run import Start

    device = _device(settings, ranks, request.emit)
    require_attention(request.attention, device)
    backbone = ranks.machine_first(lambda: open_model(request))
    preprocess = preprocessing(backbone, settings.image_size)
    settings = settings.model_copy(update={"image_size": preprocess.size})
    enough = 0 if settings.visit == "all" else FEW_IMAGES
    source = repaired_on(backbone, named, enough, preprocess.size, settings.seed, request.emit)
    given = len(named) if named else 0
    config = run_config(backbone, request, settings, source, places, device, given)
    require_alike(config, ranks)
    return Start(backbone, preprocess, source, settings, device, config, given)


def _require_elsewhere(out: Path, request: ModelRequest) -> None:
    """Refuse to remove the run that the model to be repaired, or its adapter, lies in."""
    for place in (Path(request.model), request.weights, request.adapter):
        if place is not None and place.exists() and out.resolve() in (place.resolve(), *place.resolve().parents):
            what = f"cannot replace the run in {out}"
            raise UsageError(what, "it holds the weights that are to be repaired", "choose another --out")


def export(
    request: ModelRequest,
    out: Path,
    settings: ExportSettings,
    places: Sequence[str] = (),
    stdin: IO[str] | None = None,
) -> ExportResult:
    """Write a run's or a model's weights where they can be loaded; checked before they get their name.

    `places` are images for the check. A folder gets a model card. Of a run whose deltas are exported, `request.weights`
    are the weights that it repaired.
    """
    from sinder_cli.exporting.run import write_export
    from sinder_cli.exporting.targets import require_options, require_suffix, target_of
    from sinder_cli.folders import require_place
    from sinder_cli.report.cards import export_card

    target = target_of(settings.to)
    require_options(settings.to, target, settings)
    require_suffix(target, out)
    require_place(out, target.kind, settings.force, _read_from(request))
    images = find_images(places, stdin, request.emit) if places else None
    plan = _export_plan(request, settings, of_changes=target.of_changes)
    return write_export(replace(plan, images=images), target, out, export_card)


def _read_from(request: ModelRequest) -> list[Path]:
    """The files and folders that an export must not write over."""
    run = _run_named(request)
    named = [run.path, run.model, run.adapter] if run else []
    return [*named, *(place for place in (request.weights, request.adapter) if place is not None)]


def _export_plan(request: ModelRequest, settings: ExportSettings, of_changes: bool) -> Plan:
    """The backbone as it is to be written, and how it came to be what it is."""
    from sinder_cli.exporting.casting import cast
    from sinder_cli.exporting.targets import Plan, Repaired
    from sinder_cli.repairing.weight_changes import read_change

    run = _run_named(request)
    named = replace(request, weights=None) if run and of_changes else request
    repaired = None
    if request.adapter is not None:
        change = read_change(request.adapter)
        base = open_model(replace(named, adapter=None))
        backbone = change.applied(base, request.emit)
        repaired = Repaired(change, None, lambda: (base, ""))
    else:
        backbone = open_model(named)
        if run and run.adapter.is_file():
            repaired = Repaired(read_change(run.adapter), run, lambda: _base_of(run, request))
    if settings.dtype is not None:
        backbone = cast(backbone, settings.dtype)
    return Plan(backbone, settings, request.emit, repaired)


def _base_of(run: RunFolder, request: ModelRequest) -> tuple[Backbone | None, str]:
    """The weights that a run repaired; None, and why, if they are no more where they were.

    Those that the user names are taken at the word: others raise `ConflictError` where they are put to use.
    """
    model, heads = run.repaired_model()
    source, fingerprint = run.repaired_weights()
    branch = request.branch or run.branch
    asked = replace(request, model=model, heads=heads, adapter=None, sidecars=run.read_sidecars(), branch=branch)
    if request.weights is not None:
        return open_model(asked), ""
    gone = f"the weights that were repaired, {source}, are not there; name them with --weights"
    if not Path(source).is_file() and source != model:  # a plugin that makes its weights calls them after the model
        return None, gone
    base = open_model(replace(asked, weights=Path(source) if Path(source).is_file() else None))
    if base.weights.fingerprint() != fingerprint:
        return None, f"{source} holds other weights now than those that were repaired; name them with --weights"
    return base, ""


def _device(settings: DetectionSettings, ranks: Ranks, emit: Emit) -> str:
    """The device of the settings; what it does not know of them is told."""
    device = resolve_device(settings.device, ranks)
    if settings.tf32 and not device.startswith("cuda"):
        emit(Warned(f"--tf32 has no effect on device {device!r}"))
    return device


def repaired_on(
    backbone: Backbone, named: ImageSource | None, enough: int, size: int, seed: int, emit: Emit
) -> ImageSource:
    """The images of a repair: those that the user named, first; where they are none, or not enough, drawn ones
    after them.

    A backbone that draws images itself gets its own.
    """
    if named is None and backbone.sample_images is not None:
        return drawn_images(backbone, seed)
    count = len(named) if named else 0
    if named is not None and count >= enough:
        return named
    drawn = DrawnPictures(TO_TRAIN_ON - count, size, seed)
    emit(Noted(f"{counted_images(count)} given: drawing {len(drawn)} pictures of {size} × {size} pixels to train on"))
    return JoinedImages((named, drawn)) if named else drawn


def counted_images(count: int) -> str:
    """How many images, in words."""
    return {0: "no image was", 1: "1 image was"}.get(count, f"{count} images were")


def drawn_images(backbone: Backbone, seed: int) -> ImageSource:
    """The images that a backbone draws itself, for when the user named none."""
    if backbone.sample_images is None:
        raise NoInputError(f"no images for {backbone.name}", "it brings none of its own", "name a folder with --data")
    return DrawnImages(tuple(backbone.sample_images(DRAWN_IMAGES, seed)), backbone.name)


def preprocessing(
    backbone: Backbone, image_size: int | None, resize: Resize = "square", max_tokens: int | None = None
) -> Preprocessing:
    """The model's normalization, a size rounded down to whole patches, and a bound on tokens for what keeps its shape.

    Raises `UsageError` for under 5 × 5 patches.
    """
    size = image_size or backbone.image_size
    rounded = size - size % backbone.patch_size
    if rounded < MIN_PATCHES * backbone.patch_size:
        raise UsageError(
            f"image size {size} is too small",
            f"it makes under {MIN_PATCHES} × {MIN_PATCHES} patches of {backbone.patch_size} pixels",
            f"use --image-size {MIN_PATCHES * backbone.patch_size} or more",
        )
    if resize == "short" and max_tokens is None:
        max_tokens = max(MOST_CHEAP, MOST_SQUARES * (rounded // backbone.patch_size) ** 2)
    return Preprocessing(rounded, backbone.mean, backbone.std, resize, backbone.patch_size, max_tokens)
