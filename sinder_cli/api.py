"""The verbs as functions: they take settings and return records. The one place where stages are composed."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sinder_cli import __version__
from sinder_cli.backbone.describe import Backbone, ModelRequest
from sinder_cli.backbone.opening import load_module, open_backbone
from sinder_cli.backbone.registry import InstalledBackbone, hooks_for, installed_backbones
from sinder_cli.defects.settings import AnalyzeSettings
from sinder_cli.errors import CannotCreateError, NoInputError, UnavailableError, UsageError
from sinder_cli.events import Emit, Finished, Noted, Started, Warned, silent, tracked
from sinder_cli.files import require_writable_file, require_writable_folder, write_json
from sinder_cli.images import (
    DrawnImages,
    ImageSource,
    Preprocessing,
    find_images,
    load_in_order,
    require_some,
)
from sinder_cli.repair.settings import RepairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.defects.prediction import Prediction, Stage
    from sinder_cli.defects.survey import BlockSurvey
    from sinder_cli.repair.evaluation import Snapshot

DRAWN_IMAGES = 64  # how many a backbone draws that brings its own


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found: a row a block, and what could not be read."""

    model: str
    images: int
    image_size: int
    blocks: tuple[BlockSurvey, ...]
    skipped: dict[str, str]


@dataclass(frozen=True)
class RepairResult:
    """What `repair` left in its run directory, and the tokens before and after for pictures."""

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
    """Ask the plugin that the model belongs to for a checked description."""
    return open_backbone(hooks_for(request.model), request)


def predict(request: ModelRequest, stages: Sequence[Stage], emit: Emit = silent) -> Prediction:
    """Defect directions from the weights alone; the module is never built."""
    from sinder_cli.defects.prediction import predict as predict_defects

    return predict_defects(open_model(request), stages, emit)


def resolve_device(name: str) -> str:
    """`auto` is the first CUDA device, else the CPU. Raises `UnavailableError` for a device that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    there = {
        "cpu": True,
        "cuda": torch.cuda.device_count() > int(number or 0),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(kind, False):
        raise UnavailableError(f"cannot use device {name!r}", "PyTorch does not see it", "use --device cpu")
    return name


def image_source(backbone: Backbone, places: Sequence[str], seed: int, stdin: IO[str] | None = None) -> ImageSource:
    """The images the user named, or those that the backbone draws itself when none were named."""
    if places:
        return find_images(places, stdin)
    if backbone.sample_images is None:
        raise NoInputError(f"no images for {backbone.name}", "it brings none of its own", "name a folder with --data")
    return DrawnImages(tuple(backbone.sample_images(DRAWN_IMAGES, seed)), backbone.name)


def preprocessing(backbone: Backbone, image_size: int | None) -> Preprocessing:
    """The model's normalization and a crop rounded down to whole patches. Raises `UsageError` for less than 5 × 5."""
    size = image_size or backbone.image_size
    rounded = size - size % backbone.patch_size
    if rounded < 5 * backbone.patch_size:
        raise UsageError(
            f"image size {size} is too small", f"it makes under 5 × 5 patches of {backbone.patch_size} pixels"
        )
    return Preprocessing(rounded, backbone.mean, backbone.std)


def analyze(
    request: ModelRequest,
    places: Sequence[str],
    settings: AnalyzeSettings,
    emit: Emit = silent,
    stdin: IO[str] | None = None,
) -> Analysis:
    """Token norms, defects, and observed against predicted directions, block by block."""
    import torch

    from sinder_cli.defects.detection import DetectionRule
    from sinder_cli.defects.prediction import predict as predict_defects
    from sinder_cli.defects.survey import BlockCollector, collect, summarize
    from sinder_cli.defects.tokens import autocast

    backbone = open_model(request)
    preprocess = preprocessing(backbone, settings.image_size)
    source = image_source(backbone, places, settings.seed, stdin)
    device = resolve_device(settings.device)
    prediction = predict_defects(backbone, ("cumulative",), emit, device)
    module = load_module(backbone, device)
    collectors = [BlockCollector() for _ in range(backbone.depth)]
    skipped: dict[str, str] = {}
    batch: list[Tensor] = []
    images = 0

    def run() -> None:
        with autocast(settings.dtype, torch.device(device)):
            collect(backbone, module, torch.stack(batch).to(device), prediction, DetectionRule.of(settings), collectors)
        batch.clear()

    for image in tracked(
        load_in_order(source, preprocess, range(len(source))), emit, "analyzing", len(source), "images"
    ):
        if image.pixels is None:
            emit(Warned(f"skipped {image.name}: {image.problem}"))
            skipped[image.name] = image.problem
            continue
        images += 1
        batch.append(image.pixels)
        if len(batch) == settings.batch_size:
            run()
    if batch:
        run()
    require_some(images, len(skipped))
    return Analysis(backbone.name, images, preprocess.size, summarize(collectors, prediction), skipped)


def repair(
    request: ModelRequest,
    places: Sequence[str],
    out: Path,
    settings: RepairSettings,
    emit: Emit = silent,
    stdin: IO[str] | None = None,
) -> RepairResult:
    """Fine-tune singular values until the images are clean, and leave a run directory behind."""
    from sinder_cli.defects.prediction import predict as predict_defects
    from sinder_cli.repair.deltas import Deltas
    from sinder_cli.repair.evaluation import SAMPLES, cls_cosine, take_snapshot
    from sinder_cli.repair.loop import Progress, density_window, repair_steps
    from sinder_cli.repair.results import RunFolder, changed_targets, write_adapter, write_model
    from sinder_cli.repair.step import Directions

    began = time.monotonic()
    backbone = open_model(request)
    preprocess = preprocessing(backbone, settings.image_size)
    source = image_source(backbone, places, settings.seed, stdin)
    device = resolve_device(settings.device)
    folder = RunFolder(_new_run_folder(out))
    images, names = _evaluation_images(source, preprocess, settings, emit)

    prediction = predict_defects(backbone, ("cumulative",), emit, device)
    directions = Directions(prediction.directions().to(device), prediction.gaps())
    if not any(gap >= settings.min_gap for gap in directions.gaps):
        emit(Warned(f"no direction is determined (σ₁/σ₂ < {settings.min_gap} in every block): none can be defective"))
    module = load_module(backbone, device)
    fingerprint = backbone.weights.fingerprint()
    config = _run_config(backbone, settings, preprocess, source, device, fingerprint)
    write_json(folder.config, config)

    before = take_snapshot(backbone, module, images, settings.batch_size, device, emit, "looking at the original")
    progress = Progress(density_window(len(source)))
    deltas = Deltas(backbone, module, emit)
    steps = 0
    emit(Started("repairing", settings.max_steps, "steps"))
    for record in repair_steps(backbone, directions, deltas, source, preprocess, settings, progress, emit):
        folder.record(record)
        emit(record)
        steps = record.step
    emit(Finished("repairing"))
    after = take_snapshot(backbone, module, images, settings.batch_size, device, emit, "looking at the repaired")

    emit(Noted(f"writing {folder.model}"))
    write_model(folder.model, backbone.weights, deltas)
    write_adapter(folder.adapter, backbone.name, fingerprint, deltas, settings)
    summary = {
        "model": backbone.name,
        "defects": {"before": before.defects(), "after": after.defects()},
        "cls_cosine": cls_cosine(before, after),
        "tapped": "residual stream after the last block, before the final norm",
        "evaluation_images": len(images),
        "steps": steps,
        "images": progress.images,
        "skipped_images": len(progress.unreadable),
        "skipped_steps": progress.nonfinite,
        "changed_weights": len(changed_targets(deltas)),
        "trained_values": sum(len(target.delta) for target in changed_targets(deltas)),
        "clean_share": progress.density,
        "stopped_by": "density" if progress.density >= settings.stop_density else "max_steps",
        "seconds": round(time.monotonic() - began, 3),
    }
    write_json(folder.summary, summary)
    return RepairResult(
        folder=folder.path,
        model=backbone.name,
        summary=summary,
        config=config,
        before=before,
        after=after,
        pictures=images[:SAMPLES],
        names=names[:SAMPLES],
        mean=preprocess.mean,
        std=preprocess.std,
    )


def export(source: str, target: str, out: Path, request: ModelRequest, emit: Emit = silent) -> ExportResult:
    """Write a run's or a model's weights where they can be loaded; checked before the file gets its name."""
    from sinder_cli.export.native import write_native
    from sinder_cli.files import sha256_of

    if target != "native":
        raise UsageError(f"unknown export format {target!r}", "only native is known", "use --to native")
    require_writable_file(out)
    backbone = open_model(_run_request(Path(source), request) if (Path(source) / "config.json").is_file() else request)
    emit(Noted(f"writing {out}"))
    write_native(out, backbone.weights)
    return ExportResult(out, target, len(backbone.weights.names), out.stat().st_size, sha256_of(out))


def _run_request(folder: Path, request: ModelRequest) -> ModelRequest:
    """The repaired model of a run directory, as a request for it."""
    import json
    from dataclasses import replace

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise NoInputError(f"cannot export {folder}", "its run did not finish: there is no model.safetensors")
    return replace(request, model=config["model"], weights=weights, heads=config.get("heads"))


def _new_run_folder(out: Path) -> Path:
    if out.is_dir() and any(out.iterdir()):
        raise CannotCreateError(f"cannot create run directory {out}", "it is not empty", "choose another --out")
    require_writable_folder(out)
    return out


def _evaluation_images(
    source: ImageSource, preprocess: Preprocessing, settings: RepairSettings, emit: Emit
) -> tuple[list[Tensor], list[str]]:
    """Up to `eval_images` readable images, spread evenly over the source, and their names."""
    count = min(settings.eval_images, len(source))
    indices = [index * len(source) // count for index in range(count)]
    loaded = list(tracked(load_in_order(source, preprocess, indices), emit, "reading images", count, "images"))
    readable = [image for image in loaded if image.pixels is not None]
    if not readable:  # none of the chosen ones: take any before giving up
        loaded = list(load_in_order(source, preprocess, range(len(source))))
        readable = [image for image in loaded if image.pixels is not None][:count]
    require_some(len(readable), len(loaded))
    return [image.pixels for image in readable if image.pixels is not None], [image.name for image in readable]


def _run_config(
    backbone: Backbone,
    settings: RepairSettings,
    preprocess: Preprocessing,
    source: ImageSource,
    device: str,
    fingerprint: str,
) -> dict[str, Any]:
    import torch

    return {
        "model": backbone.name,
        "weights": {"source": backbone.weights.source.label, "fingerprint": fingerprint},
        "images": {"count": len(source), "fingerprint": source.fingerprint()},
        "settings": settings.model_copy(update={"image_size": preprocess.size}).model_dump(),
        "device": device,
        "versions": {"sinder": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
