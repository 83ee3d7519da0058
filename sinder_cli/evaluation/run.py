"""One evaluation: sides, tasks and their data in; the compared figures, and what pictures are drawn from, out."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinder_cli import __version__
from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.opening import load_module
from sinder_cli.backbone.registry import plugin_versions
from sinder_cli.defects.inpainting import inpainted
from sinder_cli.distributed import Ranks, require_alike
from sinder_cli.errors import BadInputError, ConflictError, UnavailableError, UsageError
from sinder_cli.escaping import printable
from sinder_cli.evaluation.contract import (
    OF_PATCHES,
    Dataset,
    Features,
    Places,
    Scores,
    Scoring,
    SideFeatures,
    SideName,
    Task,
    View,
)
from sinder_cli.evaluation.features import ALWAYS, Extraction, Store, StoredFeatures, identities, shared
from sinder_cli.evaluation.features import Places as FeaturePlaces
from sinder_cli.evaluation.layouts import require_apart
from sinder_cli.evaluation.records import (
    Evaluation,
    FigureRecord,
    SideRecord,
    TaskRecord,
    ValueRecord,
)
from sinder_cli.evaluation.registry import blamed
from sinder_cli.evaluation.sentences import sentences_of
from sinder_cli.evaluation.settings import EvaluateSettings
from sinder_cli.evaluation.statistics import compared, noise_of
from sinder_cli.evaluation.views import DERIVED, Observer, ViewPreprocessing
from sinder_cli.events import Emit, Finished, Started, Warned
from sinder_cli.images.loading import sampled
from sinder_cli.images.processes import worker_count
from sinder_cli.images.sources import SomeImages
from sinder_cli.memory import out_of_memory_reported
from sinder_cli.notebooks import Shown

if TYPE_CHECKING:
    from torch import nn

    from sinder_cli.images.sources import ImageSource

LEAST_IMAGES = 2
FEW_IMAGES = 10  # intervals from fewer are too narrow
PLACEBOS: tuple[SideName, ...] = ("inpainted", "smoothed", "blurred")
MADE: dict[SideName, str] = {
    "original": "as it is",
    "repaired": "as it is",
    "inpainted": "placebo: outlying tokens replaced, where they appear, by their unmarked neighbours' average",
    "smoothed": "placebo: the original's marked tokens replaced, at the end, by their unmarked neighbours' average",
    "blurred": "placebo: every patch token of the original replaced, at the end, by the average of 3 × 3",
}


@dataclass(frozen=True)
class TaskRun:
    """A task with its settings and where its data lie."""

    task: Task
    settings: Any
    places: Places


@dataclass(frozen=True)
class EvaluationInput:
    """The models and tasks of an evaluation; `features` is a folder that exists."""

    original: Backbone
    repaired: Backbone | None
    label: str  # of the second model: repaired, or its name
    tasks: Sequence[TaskRun]
    features: Path
    device: str
    attention: str = "auto"  # the kernel asked for


@dataclass(frozen=True)
class Scored:
    """One task with what its pictures are drawn from."""

    task: Task
    dataset: Dataset
    indices: Sequence[int]  # of the dataset's test images that were scored
    scores: Mapping[SideName, Scores]


@dataclass(frozen=True)
class EvaluationResult(Shown):
    """The document, and what its pictures are drawn from; the features must still be there."""

    evaluation: Evaluation
    scored: tuple[Scored, ...]
    folder: Path | None = None  # that it was written into


def run_evaluation(
    given: EvaluationInput,
    settings: EvaluateSettings,
    emit: Emit,
    ranks: Ranks,
    keep: Callable[[EvaluationResult], None] = lambda _: None,
) -> EvaluationResult | None:
    """Run all tasks; each of several ranks extracts its share of the features, and rank 0 alone gets the result.

    `keep` is called with the result so far after each task, so that a later one that fails costs no earlier one.
    Raises `ConflictError` for two models whose tokens do not compare, and the errors of tasks for malformed data.
    """
    if given.repaired is not None:
        _require_comparable(given.original, given.repaired)
    read = [_Task.read(run, given.original, settings) for run in given.tasks]  # all of them, before anything is run
    for each in read:
        facts = {f"{split} data of {each.task.name}": source.fingerprint() for split, source in each.splits()}
        require_alike(facts, ranks)
    fingerprints = _fingerprints(given)
    require_alike({f"the {side} model": fingerprint for side, fingerprint in fingerprints.items()}, ranks)
    if given.repaired is not None and fingerprints["repaired"] == fingerprints["original"]:
        emit(Warned(f"{given.label} has the same weights as the original"))
    stores = [_stores_by_side(each, given, settings, fingerprints, ranks) for each in read]
    _extract_all(stores, given, settings, emit, ranks)
    if not ranks.writes:
        return None
    evaluation = Evaluation(
        sinder=__version__,
        sides=_side_records(given, settings, fingerprints),
        tasks=(),
        settings=settings.model_dump(exclude={"workers"}) | {"device": given.device},
    )
    result = EvaluationResult(evaluation, ())
    for each, of in zip(read, stores, strict=True):
        record, scored = _scored(each, of, given, settings, emit)
        tasks = (*result.evaluation.tasks, record)
        so_far = {"tasks": tasks, "finished": len(tasks) == len(read)}
        result = EvaluationResult(evaluation.model_copy(update=so_far), (*result.scored, scored))
        keep(result)
    return result


def _require_comparable(first: Backbone, second: Backbone) -> None:
    for name in ("patch_size", "width", "has_cls"):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            why = f"{name.replace('_', ' ')} is {one} and {other}"
            raise ConflictError(f"cannot compare {first.name} and {second.name}", why, "name models of one shape")


@dataclass(frozen=True)
class _Task:
    """A task with its data and views."""

    task: Task
    settings: Any
    dataset: Dataset
    views: Mapping[str, View]

    @classmethod
    def read(cls, run: TaskRun, backbone: Backbone, settings: EvaluateSettings) -> _Task:
        with blamed(run.task):
            require_apart(run.places)
            views = run.task.views(backbone, settings.image_size, run.settings)
            dataset = run.task.read(run.places, run.settings)
            if not isinstance(dataset, Dataset):
                raise TypeError(f"read returned {type(dataset).__name__}, and no Dataset")
        if run.places.train and dataset.train is None:
            raise UsageError(f"cannot use --train with {run.task.name}", "it trains on nothing", "leave it out")
        for name, source, truth in (
            ("test", dataset.test, dataset.truth),
            ("train", dataset.train, dataset.train_truth),
        ):
            if source is not None and len(source) != len(truth):
                why = f"{len(source)} {name} images have {len(truth)} truths"
                raise UnavailableError(f"task {run.task.name!r} failed", why, "tell its author")
        for view in views.values():
            ViewPreprocessing.of(view, backbone)  # sizes that do not fit, before anything is run
        limited = _limited(dataset, settings)
        if len(limited.test) == 1:
            raise _one_image(run.task, limited.test.name(0))
        return cls(run.task, run.settings, limited, views)

    @property
    def patches_matter(self) -> bool:
        return any(OF_PATCHES & set(view.parts) for view in self.views.values())

    def splits(self) -> Iterator[tuple[str, ImageSource]]:
        yield "test", self.dataset.test
        if self.dataset.train is not None:
            yield "train", self.dataset.train


def _limited(dataset: Dataset, settings: EvaluateSettings) -> Dataset:
    """Return at most `settings.limit` images of each split."""
    if settings.limit is None:
        return dataset
    splits = {"test": dataset.test, "train": dataset.train}
    counts = {split: len(source) for split, source in splits.items() if source is not None}
    return _some(dataset, {split: sampled(count, settings.limit, settings.seed) for split, count in counts.items()})


def sides_of(given: EvaluationInput, settings: EvaluateSettings, patches_matter: bool = True) -> tuple[SideName, ...]:
    """Return the sides in their order; the two that only change patches at the end are left out where none matter."""
    second: tuple[SideName, ...] = ("repaired",) if given.repaired is not None else ()
    placebos = [side for side in PLACEBOS if patches_matter or side not in DERIVED] if not settings.no_placebos else []
    return ("original", *second, *placebos)


def _passes(given: EvaluationInput, settings: EvaluateSettings) -> Iterator[tuple[SideName, Backbone]]:
    """Yield the sides that run a backbone."""
    yield "original", given.original
    if given.repaired is not None:
        yield "repaired", given.repaired
    if not settings.no_placebos:
        yield "inpainted", inpainted(given.original, settings.norm_factor)


Stores = dict[tuple[str, str], Extraction]  # the features of one side, by split and view


def _stores_by_side(
    each: _Task,
    given: EvaluationInput,
    settings: EvaluateSettings,
    fingerprints: Mapping[SideName, str],
    ranks: Ranks,
) -> dict[SideName, Stores]:
    """Return the features that a task needs of every side that runs a backbone."""
    # as rank 0 knows them: the times of files, which are in the identities, may differ on other machines
    known = {split: ranks.from_rank0(partial(identities, source)) for split, source in each.splits()}
    found: dict[SideName, Stores] = {}
    for side, backbone in _passes(given, settings):
        found[side] = {}
        for name, view in each.views.items():
            about = _about(side, backbone, view, given, settings, fingerprints[side])
            store, preprocess = Store.of(given.features, about), ViewPreprocessing.of(view, backbone)
            for split, source in each.splits():
                found[side][split, name] = Extraction(store, about, source, known[split], preprocess)
    return found


def _model_of(side: SideName, given: EvaluationInput) -> Backbone:
    """Return the model whose weights a side has; all placebos have the original's."""
    return given.repaired if side == "repaired" and given.repaired is not None else given.original


def _fingerprints(given: EvaluationInput) -> dict[SideName, str]:
    """Return the fingerprint of every side's weights; all of a model's weights are read for it, once."""
    sides: tuple[SideName, ...] = ("original", *PLACEBOS)
    found = dict.fromkeys(sides, given.original.weights.fingerprint())
    return found if given.repaired is None else {**found, "repaired": given.repaired.weights.fingerprint()}


def _about(
    side: SideName,
    backbone: Backbone,
    view: View,
    given: EvaluationInput,
    settings: EvaluateSettings,
    fingerprint: str,
) -> dict[str, Any]:
    """Return all that features depend on but the image; a model has the same on whichever side it stands.

    Which parts of them a view keeps is left out: tasks share what they see in the same way.
    """
    import torch

    sidecars = json.dumps(dict(backbone.sidecars), sort_keys=True).encode("utf-8", "surrogateescape")
    return {
        "pass": "inpainted" if side == "inpainted" else "plain",
        "model": backbone.name,
        "fingerprint": fingerprint,
        "heads": [block.attention.heads for block in backbone.layers.blocks],
        "sidecars": hashlib.sha256(sidecars).hexdigest(),
        "norm_factor": settings.norm_factor,
        "view": asdict(replace(view, parts=())),
        "dtype": settings.dtype,
        "tf32": settings.tf32,
        "device": given.device.split(":")[0],
        "attention": given.attention,
        "versions": {"sinder": __version__, "torch": torch.__version__, **plugin_versions()},
    }


def _extract_all(
    tasks: Sequence[Mapping[SideName, Stores]],
    given: EvaluationInput,
    settings: EvaluateSettings,
    emit: Emit,
    ranks: Ranks,
) -> None:
    """Extract all features that are not on disk yet, side by side: one module at a time is in memory."""
    workers = worker_count(settings.workers, ranks.local_size)
    loaded: list[nn.Module] = []  # one at most
    for side, backbone in sorted(_passes(given, settings), key=lambda each: each[0] == "repaired"):
        if side == "repaired":
            loaded.clear()
        for extraction in shared(found for stores in tasks for found in stores[side].values()):
            missing = ranks.from_rank0(extraction.missing)
            if not missing:
                continue
            if not loaded:
                loaded.append(load_module(_model_of(side, given), given.device))
            view = extraction.preprocess.view
            observer = Observer.of(
                backbone, loaded[0], view, settings.norm_factor, settings.dtype, settings.tf32, given.device
            )
            sizes = f"at {view.size} pixels and batch size {settings.batch_size}"
            with out_of_memory_reported(sizes, "lower --image-size or --batch-size"):
                label = given.label if side == "repaired" else side
                extraction.run(missing, observer, label, settings.batch_size, workers, given.device, emit, ranks)
            del observer  # it holds the module


def _scored(
    each: _Task,
    stores: Mapping[SideName, Stores],
    given: EvaluationInput,
    settings: EvaluateSettings,
    emit: Emit,
) -> tuple[TaskRecord, Scored]:
    """Score every side of a task and compare them."""
    began = time.monotonic()
    task = each.task
    placed = {side: {place: found.places() for place, found in of.items()} for side, of in stores.items()}
    usable, skipped = _usable(each, placed, emit)
    dataset = _some(each.dataset, usable)
    features = {
        side: _features_of(side, placed, each, usable) for side in sides_of(given, settings, each.patches_matter)
    }
    scores = {}
    for side, own in features.items():
        label = f"{task.name}: {side}"
        emit(Started(label))
        scoring = Scoring(
            side=side,
            features=own,
            dataset=dataset,
            settings=each.settings,
            original=features["original"],
            inpainted=features.get("inpainted"),
            has_cls=given.original.has_cls,
            patch_size=given.original.patch_size,
            seed=settings.seed,
            device=given.device,
            emit=emit,
        )
        with blamed(task):
            scores[side] = task.score(scoring)
        emit(Finished(label))
    with blamed(task):
        figures = _figures(scores, len(usable["test"]), settings)
    notes = {side: found.notes for side, found in scores.items()}
    record = TaskRecord(
        task=task.name,
        protocol=task.protocol,
        data=dataset.note,
        images=len(usable["test"]),
        trained_on=len(usable.get("train", ())),
        classes=dataset.classes,
        settings=each.settings.model_dump(mode="json"),
        figures=figures,
        notes=notes,
        sentences=(*few_images(len(usable["test"])), *sentences_of(figures, given.label)),
        skipped=skipped,
        seconds=time.monotonic() - began,
    )
    return record, Scored(task, dataset, usable["test"], scores)


def few_images(count: int) -> tuple[str, ...]:
    """Return a caution if there are few images."""
    words = f"{count} images are few: intervals from fewer than {FEW_IMAGES} are too narrow."
    return (words,) if count < FEW_IMAGES else ()


def _usable(
    each: _Task, placed: Mapping[SideName, Mapping[tuple[str, str], FeaturePlaces]], emit: Emit
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return the images of each split that could be read, and the others by name; a warning names each of these.

    Raises `BadInputError` if none of a split could be read, or a single image to be scored.
    """
    usable: dict[str, list[int]] = {}
    skipped: dict[str, str] = {}
    for split, source in each.splits():
        problems: dict[int, str] = {}
        for of_side in placed.values():
            for name in each.views:
                problems |= of_side[split, name].problems
        for index, why in sorted(problems.items()):
            name = printable(source.name(index))
            emit(Warned(f"skipped {name}: {why}"))
            skipped[name] = why
        usable[split] = [index for index in range(len(source)) if index not in problems]
        if not usable[split]:
            why = "there is none"
            if problems:
                first, reason = min(problems.items())
                why = f"all {len(problems)} failed, the first, {source.name(first)}, since {reason}"
            raise BadInputError(
                f"no {split} image can be used for {each.task.name}", why, "check --data and --image-size"
            )
    if len(usable["test"]) < LEAST_IMAGES:
        raise _one_image(each.task, each.dataset.test.name(usable["test"][0]))
    return usable, skipped


def _one_image(task: Task, name: str) -> BadInputError:
    why = f"{name} is the only image to test on that can be used, and differences need several"
    return BadInputError(f"cannot evaluate {task.name}", why, "give more images")


def _some(dataset: Dataset, kept: Mapping[str, Sequence[int]]) -> Dataset:
    """Return the dataset with these images of each split, and no others."""
    test = kept["test"]
    dataset = replace(dataset, test=SomeImages(dataset.test, test), truth=[dataset.truth[at] for at in test])
    if dataset.train is None:
        return dataset
    train = kept["train"]
    truth = [dataset.train_truth[at] for at in train]
    return replace(dataset, train=SomeImages(dataset.train, train), train_truth=truth)


def _features_of(
    side: SideName,
    placed: Mapping[SideName, Mapping[tuple[str, str], FeaturePlaces]],
    each: _Task,
    usable: Mapping[str, Sequence[int]],
) -> SideFeatures:
    """Return a side's features; a placebo that changes patches at the end reads the original's."""
    of = placed["original" if side in DERIVED else side]
    by_split: dict[str, dict[str, Features]] = {
        split: {
            name: StoredFeatures(of[split, name], side, usable[split], ALWAYS | set(view.parts))
            for name, view in each.views.items()
        }
        for split, _ in each.splits()
    }
    return SideFeatures(by_split["test"], by_split.get("train", {}))


def _figures(scores: Mapping[SideName, Scores], images: int, settings: EvaluateSettings) -> tuple[FigureRecord, ...]:
    """Return every figure with all sides compared. Raises `ValueError` for two figures of one name."""
    for found in scores.values():
        names = Counter(figure.name for figure in found.figures)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"two figures are called {twice[0]!r}")
    records = []
    for name in dict.fromkeys(figure.name for found in scores.values() for figure in found.figures):
        of_sides = {side: figure for side, found in scores.items() for figure in found.figures if figure.name == name}
        first = next(iter(of_sides.values()))
        values = tuple(
            ValueRecord(
                side=side,
                value=measured.value,
                images=measured.images,
                to_original=measured.to_original,
                to_smoothed=measured.to_smoothed,
                to_inpainted=measured.to_inpainted,
            )
            for side, measured in compared(of_sides, images, settings.resamples, settings.seed).items()
        )
        records.append(
            FigureRecord(
                name=name,
                unit=first.unit,
                better=first.better,
                noise=noise_of(of_sides),
                caution=first.caution,
                values=values,
            )
        )
    return tuple(records)


def _side_records(
    given: EvaluationInput, settings: EvaluateSettings, fingerprints: Mapping[SideName, str]
) -> tuple[SideRecord, ...]:
    records = []
    for side in sides_of(given, settings):
        backbone = _model_of(side, given)
        records.append(
            SideRecord(
                side=side,
                label=given.label if side == "repaired" else side,
                made=MADE[side],
                model=backbone.name,
                weights=printable(backbone.weights.source.label),
                fingerprint=fingerprints[side],
            )
        )
    return tuple(records)
