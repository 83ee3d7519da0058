"""The public API: one function per command; the one place where the stages of a command are composed.

`from sinder_cli import predict_defects, analyze, repair, export`: each takes one request, writes to `out` all that its
command writes, and returns a record. Nothing is printed except with `progress=True`, on standard error. Errors are
`SinderError`s, one line each: `WHAT: WHY; WHAT TO DO`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, overload

from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.device import exact_device, require_attention, resolve_device
from sinder_cli.backbone.hooks import ModelRequest
from sinder_cli.backbone.opening import describe, require_loadable
from sinder_cli.backbone.registry import backbones, hooks_for
from sinder_cli.defects.settings import PassSettings
from sinder_cli.distributed import ALONE, Ranks, require_alike
from sinder_cli.errors import NoInputError, SinderError, UsageError
from sinder_cli.evaluation.settings import EvaluateSettings, task_settings
from sinder_cli.events import Emit, Noted, Warned, silent
from sinder_cli.exporting.targets import ExportSettings
from sinder_cli.files import (
    make_folder,
    require_creatable_folder,
    require_new_folder,
    require_writable_file,
    write_bytes,
    write_json,
)
from sinder_cli.folders import RUNS
from sinder_cli.images.sources import ImageSource
from sinder_cli.inputs import (
    drawn_images,
    images_of_repair,
    named_images,
    open_model,
    places_of_task,
    preprocessing,
    require_places,
    run_named,
    shared_images,
)
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.report.notebook import show_records
from sinder_cli.requests import (
    AnalyzeRequest,
    EvaluateRequest,
    ExportRequest,
    ModelOrRun,
    Place,
    PredictRequest,
    Process,
    RepairRequest,
    model_named,
    places_named,
)
from sinder_cli.signals import Stop

if TYPE_CHECKING:
    from sinder_cli.analysis.run import AnalysisResult
    from sinder_cli.conformance.subject import Conformance
    from sinder_cli.defects.prediction import Prediction
    from sinder_cli.evaluation.contract import Task
    from sinder_cli.evaluation.run import EvaluationResult
    from sinder_cli.evaluation.settings import TaskSettings
    from sinder_cli.exporting.drafts import ExportResult
    from sinder_cli.exporting.targets import Plan
    from sinder_cli.repairing.dry_run import DryRun
    from sinder_cli.repairing.folder import FinishedRun, RunFolder
    from sinder_cli.repairing.preparing import Start
    from sinder_cli.repairing.results import RepairResult
    from sinder_cli.report.analysis.look import Look

__all__ = [
    "AnalyzeRequest",
    "AnalyzeSettings",
    "EvaluateRequest",
    "EvaluateSettings",
    "ExportRequest",
    "ExportSettings",
    "PredictRequest",
    "Process",
    "RepairRequest",
    "RepairSettings",
    "analyze",
    "backbones",
    "check_backbone",
    "drawn_images",
    "evaluate",
    "export",
    "look",
    "open_model",
    "predict_defects",
    "preprocessing",
    "repair",
    "repair_place",
    "try_repair",
    "with_flags",
]

FEW_IMAGES = 16  # a repair that is given fewer gets drawn images as well
# A folder of such a name is a mistake, unless it exists.
OTHER_SUFFIXES = {".csv", ".htm", ".html", ".jsonl", ".md", ".pdf", ".png", ".safetensors", ".svg", ".txt"}
HERE = Process()
show_records()  # in notebooks, as the commands show them


def check_backbone(request: ModelRequest, emit: Emit = silent) -> Conformance:
    """Check everything that the engine relies on in a plugin, with the weights that the request means.

    An exception inside a check is a failure of that check. Raises `UsageError` for a name that no plugin offers, and
    whatever prevents the plugin from describing a backbone at all.
    """
    hooks = hooks_for(request.model)
    backbone = describe(hooks, request)
    from sinder_cli.conformance.running import conformance

    return conformance(backbone, lambda path: describe(hooks, replace(request, weights=path)), emit)


def predict_defects(
    request: PredictRequest,
    out: Place | IO[bytes] | None = None,
    *,
    progress: bool = False,
    process: Process = HERE,
) -> Prediction:
    """Predict the defect directions of every block from the weights alone; the module is never built.

    `out` is a file, or an open one, for the directions as safetensors: one `[blocks, N]` float32 tensor per stage.
    """
    place = Path(out) if isinstance(out, str | Path) else out
    with _reporting(process, progress, request.model) as emit:
        if isinstance(place, Path):
            require_writable_file(place)
        backbone = open_model(model_named(request.model, emit))  # before torch is imported: the name may be unknown
        from sinder_cli.defects.prediction import predict, write_directions

        device = exact_device(resolve_device(request.device))
        prediction = predict(backbone, request.stages, emit, device)
        if place is not None:
            write_directions(place, prediction)
        return prediction


@overload
def analyze(request: AnalyzeRequest, out: Place | None = ..., *, progress: bool = ...) -> AnalysisResult: ...
@overload
def analyze(request: AnalyzeRequest, out: Place | None = ..., *, process: Process) -> AnalysisResult | None: ...
def analyze(
    request: AnalyzeRequest, out: Place | None = None, *, progress: bool = False, process: Process = HERE
) -> AnalysisResult | None:
    """Show what the tokens do over a set of images, block by block, and whether the weights predict it.

    `out` is a new folder for report, document, directions and figures, or a file `….json` for the document alone. Each
    of several ranks looks at its share of the images; rank 0 gets the result, the others None.
    Raises `UsageError` for two backbones that do not compare. Where writing fails in the end, `error.found` is the
    result.
    """
    settings, ranks = request.settings, process.ranks
    folder, file = _places_of(None if out is None else Path(out), ranks)
    made = "clamped" if settings.clamp is not None else "inpainted" if settings.method == "inpaint" else None
    if request.compare is not None and made is not None:
        raise UsageError("cannot compare with two models", f"one is named, one is {made}", "leave one of them out")
    with _reporting(process, progress, request.model) as emit:
        named = named_images(places_named(request.data), replace(process, emit=emit))  # before anything is downloaded
        from sinder_cli.analysis.features import require_new_features
        from sinder_cli.analysis.run import AnalysisInput, run_analysis

        if request.features is not None and ranks.writes:
            require_new_features(request.features)
        device = exact_device(_device(settings, ranks, emit))
        model = model_named(request.model, emit)
        require_attention(model.attention, device)
        backbones = _compared(open_model(model), request, emit)
        preprocess = preprocessing(backbones[0], settings.image_size, settings.resize, settings.max_tokens)
        source = named or drawn_images(backbones[0], settings.seed)
        draw = request.portraits or folder is not None
        given = AnalysisInput(backbones, source, preprocess, device, request.features, draw)
        result = run_analysis(given, settings, emit, ranks)
        try:
            return result and _analysis_written(result, folder, file, emit)
        except SinderError as error:
            error.found = result
            raise


def look(
    requests: Sequence[AnalyzeRequest], picture: Place | None = None, *, progress: bool = False, process: Process = HERE
) -> Look:
    """Look at a few photographs with one model or several: in words what each does, and one picture of all.

    `picture` is a file `….png` for it. Each request is an analysis by itself, so that models of any sizes are compared.
    """
    from sinder_cli.report.analysis.look import look_of
    from sinder_cli.report.drawing.pictures import encoded

    path = None if picture is None else Path(picture)
    if path is not None:
        (require_writable_file if path.parent.is_dir() else require_creatable_folder)(path)
    alone = replace(process, ranks=ALONE)
    asked = [_in_all_blocks(request) for request in requests]
    found = [analyze(each, progress=True) if progress else analyze(each, process=alone) for each in asked]
    seen = look_of([each for each in found if each is not None])
    if path is not None:
        make_folder(path.parent)
        write_bytes(path, encoded(seen.picture, texts={"Title": path.stem, "Description": seen.caption}))
    return seen


def _in_all_blocks(request: AnalyzeRequest) -> AnalyzeRequest:
    """Return a request whose result has the maps of every image at every block, and no second side."""
    few = {} if "min_tokens" in request.settings.model_fields_set else {"min_tokens": 1}  # as a repair begins with one
    settings = request.settings.model_copy(update={"blocks": "all", "figures": "all", **few})
    return replace(request, settings=settings, compare=None, portraits=True)


def _places_of(out: Path | None, ranks: Ranks) -> tuple[Path | None, Path | None]:
    """Return the folder or the JSON file that an analysis is written to, once it is known to be usable; one is None.

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
    """Write the result where it belongs, and return it with its figures listed."""
    from sinder_cli.report.analysis.page import write_analysis
    from sinder_cli.report.documents import analysis_document

    if folder is not None:
        return replace(result, analysis=write_analysis(folder, result, emit), folder=folder)
    if file is not None:
        write_json(file, analysis_document(result.analysis))
    return result


def _compared(first: Backbone, request: AnalyzeRequest, emit: Emit) -> list[Backbone]:
    """Return the backbone, followed by the one that it is compared with: a second model, or itself clamped."""
    if request.compare is not None:
        return [first, open_model(model_named(request.compare, emit))]
    if request.settings.clamp is not None:
        from sinder_cli.analysis.clamp import clamped

        return [first, clamped(first, request.settings.clamp, emit)]
    return [first]


@overload
def repair(request: RepairRequest, out: Place | None = ..., *, progress: bool = ...) -> RepairResult | FinishedRun: ...
@overload
def repair(
    request: RepairRequest, out: Place | None = ..., *, process: Process
) -> RepairResult | FinishedRun | None: ...
def repair(
    request: RepairRequest, out: Place | None = None, *, progress: bool = False, process: Process = HERE
) -> RepairResult | FinishedRun | None:
    """Repair a backbone's singular defects by fine-tuning singular values, and leave a run directory in `out`.

    `result.summary["verdict"]` is `healthy`, `repaired`, `improved` or `not improved`. With `request.resume`, a run
    directory may stand in the place of the model, and of a run that has ended the records are returned, unless more
    steps are asked for than it took (`max_steps`): then it goes on. Without `out`, the run directory is
    `sinder-runs/MODEL`. `process.stop` may ask to end after a step: a checkpoint is written then, and `Ended` raised.
    Of several ranks, each takes its share of every batch; rank 0 alone evaluates, writes, and gets the result, the
    others None.
    """
    request, folder = repair_place(request, out)
    settings, ranks = request.settings, process.ranks
    if settings.batch_size < ranks.size:
        why = f"each of the {ranks.size} processes takes its share of every batch"
        raise UsageError(f"batch size {settings.batch_size} is too small", why, f"use --batch-size {ranks.size}")
    from sinder_cli.repairing.trackers import logged

    with (
        _reporting(process, progress, request.model) as shown,
        logged(settings, folder.path, shown, ranks.writes) as emit,
    ):
        named = named_images(places_named(request.data), replace(process, emit=emit))  # before anything is downloaded
        more = ranks.from_rank0(lambda: request.resume and folder.takes_more_steps(settings.max_steps))
        if ranks.from_rank0(lambda: request.resume and folder.complete and not more):
            return _finished(request, folder, named, emit) if ranks.writes else None
        from sinder_cli.repairing.run import run_repair
        from sinder_cli.repairing.run_identity import images_of
        from sinder_cli.report.repair.page import write_repair

        if request.force:
            _require_elsewhere(folder.path, model_named(request.model, emit))
        with folder.held(emit) if ranks.writes else nullcontext():
            if more and ranks.writes:
                emit(Noted(f"{folder.path} goes on to step {settings.max_steps}"))
                folder.go_on(settings.max_steps)
            resumed = ranks.from_rank0(lambda: folder.require_free(request.resume, request.force))
            if request.resume and not resumed and ranks.writes:
                emit(Noted(f"no run in {folder.path} yet: starting one"))
            if resumed:
                named = named or images_of(folder)
            start = _start(request, named, emit, ranks)
            result = run_repair(start, folder, emit, resumed, process.stop or Stop(), ranks)
            if result is not None:
                write_repair(folder, result)
            return result


def repair_place(request: RepairRequest, out: Place | None = None) -> tuple[RepairRequest, RunFolder]:
    """Return a request with what the run in the place of its model was called with, and the run directory."""
    from sinder_cli.repairing.folder import RunFolder
    from sinder_cli.repairing.run_identity import as_called

    model = model_named(request.model)
    folder = RunFolder(Path(model.model))
    if out is None and request.resume and folder.is_run:
        model, settings = as_called(folder, model, request.settings)
        return replace(request, model=model, settings=settings), folder
    return request, RunFolder(Path(out) if out is not None else Path(RUNS, model.model.replace("/", "-")))


def try_repair(request: RepairRequest, out: Place | None = None, process: Process = HERE) -> DryRun:
    """Report what `repair` would do: everything before its first step, and that step's time and memory.

    Nothing is written, and no existing file is changed.
    """
    request, folder = repair_place(request, out)
    named = named_images(places_named(request.data), replace(process, ranks=ALONE))  # rank 0 alone calls this
    from sinder_cli.repairing.dry_run import dry_run

    with folder.held(process.emit):
        folder.require_free(resume=False, force=request.force)
        return dry_run(_start(request, named, process.emit), process.emit)


def _finished(request: RepairRequest, folder: RunFolder, named: ImageSource | None, emit: Emit) -> FinishedRun:
    """Return the records of a finished run. Raises `ConflictError` where the request is of another run."""
    from sinder_cli.repairing.run_identity import images_of

    start = _start(request, named or images_of(folder), emit)
    folder.require_same(start.config, start.source, emit)
    return folder.read_finished()


def _start(request: RepairRequest, named: ImageSource | None, emit: Emit, ranks: Ranks = ALONE) -> Start:
    """Return what a repair starts from; on all ranks the same."""
    from sinder_cli.repairing.preparing import Start
    from sinder_cli.repairing.results import run_config

    model, settings = model_named(request.model, emit), request.settings
    device = _device(settings, ranks, emit)
    require_attention(model.attention, device)
    backbone = ranks.machine_first(lambda: open_model(model))
    preprocess = preprocessing(backbone, settings.image_size)
    settings = settings.model_copy(update={"image_size": preprocess.size})
    enough = 0 if settings.visit == "all" else FEW_IMAGES
    source = images_of_repair(backbone, named, enough, preprocess.size, settings.seed, emit)
    given = len(named) if named else 0
    config = run_config(backbone, model, settings, source, places_named(request.data), device, given)
    require_alike(config, ranks)
    return Start(backbone, preprocess, source, settings, device, config, given)


def _require_elsewhere(out: Path, model: ModelRequest) -> None:
    """Refuse to remove the run that the model to be repaired, or its adapter, lies in."""
    for place in (Path(model.model), model.weights, model.adapter):
        if place is not None and place.exists() and out.resolve() in (place.resolve(), *place.resolve().parents):
            what = f"cannot replace the run in {out}"
            raise UsageError(what, "it holds the weights that are to be repaired", "choose another --out")


def export(request: ExportRequest, out: Place, *, progress: bool = False, process: Process = HERE) -> ExportResult:
    """Write the weights of a run or a model to `out` in a format that others load; they are checked first.

    `request.data` are images for the check. A folder gets a model card. For a run whose deltas are exported, the
    weights in the request are those that it repaired.
    """
    from sinder_cli.exporting.drafts import finished_export, write_draft
    from sinder_cli.exporting.targets import require_options, require_suffix, target_of
    from sinder_cli.folders import placed, require_place
    from sinder_cli.report.cards import write_export_card

    place, settings = Path(out), request.settings
    target = target_of(settings.to)
    require_options(settings.to, target, settings)
    require_suffix(target, place)
    with _reporting(process, progress, request.source) as emit:
        model = model_named(request.source, emit)
        require_place(place, target.kind, settings.force, _read_from(model))
        images = named_images(places_named(request.data), replace(process, emit=emit))
        plan = replace(_export_plan(model, settings, of_changes=target.of_changes), images=images)
        target.require(plan)
        require_loadable(plan.backbone)
        with placed(place) as draft:
            emit(Noted(f"writing {place}"))
            check = write_draft(plan, target, draft)
            if target.kind == "folder":
                write_export_card(draft, plan, target, check, place.resolve().name)
            target.finish(plan, draft)
            return finished_export(plan, target, check, draft, place)


def _read_from(request: ModelRequest) -> list[Path]:
    """Return the files and folders that an export must not overwrite."""
    run = run_named(request)
    named = [run.path, run.model, run.adapter] if run else []
    return [*named, *(place for place in (request.weights, request.adapter) if place is not None)]


def _export_plan(request: ModelRequest, settings: ExportSettings, of_changes: bool) -> Plan:
    """Return the plan of an export: the backbone as it is written, and how it was repaired."""
    from sinder_cli.exporting.conversion import cast
    from sinder_cli.exporting.origins import are_the_plugins_own
    from sinder_cli.exporting.targets import Plan, Repaired, target_of
    from sinder_cli.repairing.weight_changes import read_change

    run = run_named(request)
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
    own = target_of(settings.to).kind == "folder" and are_the_plugins_own(request, backbone.name)
    backbone = replace(backbone, license=settings.license or (backbone.license if own else None))
    return Plan(backbone, settings, request.emit, repaired, own_weights=own)


def _base_of(run: RunFolder, request: ModelRequest) -> tuple[Backbone | None, str]:
    """Return the backbone that a run repaired; None, and why, if its weights are not where they were.

    Weights that the user names are not compared here: wrong ones raise `ConflictError` where they are used.
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


@overload
def evaluate(request: EvaluateRequest, out: Place | None = ..., *, progress: bool = ...) -> EvaluationResult: ...
@overload
def evaluate(request: EvaluateRequest, out: Place | None = ..., *, process: Process) -> EvaluationResult | None: ...
def evaluate(
    request: EvaluateRequest, out: Place | None = None, *, progress: bool = False, process: Process = HERE
) -> EvaluationResult | None:
    """Measure by tasks whether a repair helps: the original, the repaired model and placebos, side by side.

    `out` is a folder for the document, a table, a page with pictures, and the features, from which an interrupted
    evaluation goes on. Each of several ranks extracts its share of the features; rank 0 gets the result, the others
    None. Raises `UsageError` for unknown tasks and settings, `BadInputError` for malformed data, naming the file.
    """
    settings, ranks = request.settings, process.ranks
    folder = None if out is None else Path(out)
    with _reporting(process, progress, request.model) as emit:
        from sinder_cli.evaluation.folder import features_folder, require_evaluation_place
        from sinder_cli.evaluation.run import EvaluationInput, TaskRun, run_evaluation
        from sinder_cli.report.evaluation.page import write_evaluation, write_values

        if folder is not None and ranks.writes:
            require_evaluation_place(folder, request.force)
        tasks = _tasks_named(request)  # before anything is downloaded
        require_places(request)
        device = exact_device(_device(settings, ranks, emit))
        original, second, label = _evaluated(request, emit, ranks)
        require_attention(model_named(request.model).attention, device)
        inner = replace(process, emit=emit)
        images = shared_images(original, settings.seed, inner)
        runs = [TaskRun(task, own, places_of_task(task.name, request, inner.emit, images)) for task, own in tasks]
        with features_folder(request.features, folder, emit, ranks) as features:
            given = EvaluationInput(
                original, second, label, runs, features, device, model_named(request.model).attention
            )
            keep = (lambda so_far: write_values(folder, so_far)) if folder is not None else (lambda _: None)
            result = run_evaluation(given, settings, emit, ranks, keep)
            if result is not None and folder is not None:
                write_evaluation(folder, result, settings, emit)
                return replace(result, folder=folder)
            return result


def _tasks_named(request: EvaluateRequest) -> list[tuple[Task, TaskSettings]]:
    """Return the tasks with their settings. Raises `UsageError` for unknown ones."""
    from sinder_cli.evaluation.registry import task_named

    if not request.tasks:
        raise UsageError("no task", "nothing is to be evaluated", "name one, such as dense")
    unknown = [name for name in request.options if name not in request.tasks]
    if unknown:
        raise UsageError(f"bad settings of {unknown[0]!r}", "that task is not run", f"name {', '.join(request.tasks)}")
    tasks = [task_named(name) for name in dict.fromkeys(request.tasks)]
    return [(task, task_settings(task.settings, request.options.get(task.name, {}), task.name)) for task in tasks]


def with_flags(options: Mapping[str, Mapping[str, Any]], flags: Mapping[str, bool]) -> dict[str, dict[str, Any]]:
    """Return settings of tasks with those flags that are set, in every task that has a setting of that name.

    Raises `UsageError` for a flag that none of the tasks has.
    """
    from sinder_cli.evaluation.registry import task_named

    found: dict[str, dict[str, Any]] = {task: dict(given) for task, given in options.items()}
    for name in (name for name, given in flags.items() if given):
        having = [task for task in found if name in task_named(task).settings.model_fields]
        if not having:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"cannot use {option}", f"it has no effect on {', '.join(found)}", "leave it out")
        for task in having:
            found[task][name] = True
    return found


def _evaluated(request: EvaluateRequest, emit: Emit, ranks: Ranks) -> tuple[Backbone, Backbone | None, str]:
    """Return the original, the model that it is compared with, if any, and what that one is called.

    A run stands for the model that it repaired, compared with the result. Raises `UsageError` for a run that is to be
    compared with something else, and `NoInputError` if the weights that it repaired are gone.
    """
    model = model_named(request.model, emit)
    run = run_named(model)
    if run is None:
        original = ranks.machine_first(lambda: open_model(model))
        if request.compare is None:
            return original, None, ""
        second = model_named(request.compare, emit)
        return original, ranks.machine_first(lambda: open_model(second)), second.model
    if request.compare is not None:
        why = "a run is compared with the model that it repaired"
        raise UsageError(f"cannot compare {model.model}", why, "name a model, or leave --compare out")
    repaired = ranks.machine_first(lambda: open_model(replace(model, weights=None)))
    base, gone = ranks.machine_first(lambda: _base_of(run, model))
    if base is None:
        raise NoInputError(f"cannot evaluate {model.model} before its repair", gone)
    return base, repaired, "repaired"


def _device(settings: PassSettings, ranks: Ranks, emit: Emit) -> str:
    """Return the device of the settings; warn of settings that have no effect on it."""
    device = resolve_device(settings.device, ranks)
    if settings.tf32 and not device.startswith("cuda"):
        emit(Warned(f"--tf32 has no effect on device {device!r}"))
    return device


@contextmanager
def _reporting(process: Process, progress: bool, named: ModelOrRun) -> Iterator[Emit]:
    """Yield what receives progress and warnings: a display, or the listener of the process or of the model."""
    if progress:
        from sinder_cli.report.progress import display

        with display() as emit:
            yield emit
    elif process.emit is silent and isinstance(named, ModelRequest):
        yield named.emit
    else:
        yield process.emit
