"""Inputs by the names that users give them: models, run directories, images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.hooks import ModelRequest
from sinder_cli.backbone.opening import open_backbone
from sinder_cli.backbone.registry import hooks_for
from sinder_cli.errors import NoInputError, UsageError
from sinder_cli.events import Emit, Noted
from sinder_cli.images.drawn import DrawnPictures
from sinder_cli.images.preprocessing import MIN_PATCHES, Preprocessing, Resize
from sinder_cli.images.sources import DrawnImages, ImageSource, JoinedImages, find_images, read_bytes

if TYPE_CHECKING:
    from sinder_cli.evaluation.contract import Places
    from sinder_cli.repairing.folder import RunFolder
    from sinder_cli.requests import EvaluateRequest, Process

DRAWN_IMAGES = 64  # drawn by a backbone that brings its own
TO_TRAIN_ON = 32  # images of a repair, where some have to be drawn
MOST_SQUARES = 4  # tokens of a long image at most, in squares of the model's size: up to 4:1 nothing is scaled down
MOST_CHEAP = 2048  # tokens that are allowed in any case: attention costs less than the rest under 6 × width tokens


def open_model(request: ModelRequest) -> Backbone:
    """Return the checked description of a model by the plugin that offers it; of a run directory, the repaired model.

    An adapter, or a file of changed tensors, is applied to its weights. Raises `UsageError` for a run directory with
    weights or heads.
    """
    if run := run_named(request):
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


def run_named(request: ModelRequest) -> RunFolder | None:
    """Return the run directory that is named in the place of a model; it may lack a run yet."""
    from sinder_cli.repairing.folder import RunFolder

    run = RunFolder(Path(request.model))
    return run if run.is_run or request.model.startswith(("/", "./", "../")) else None


def named_images(places: Sequence[str], process: Process) -> ImageSource | None:
    """Find the images that the user named; rank 0 reads a list on standard input, once for all ranks."""
    if not places:
        return None
    ranks = process.ranks
    if "-" in places and ranks.size > 1:
        return find_images(
            places, BytesIO(ranks.from_rank0(lambda: read_bytes(process.stdin or sys.stdin))), process.emit
        )
    return find_images(places, process.stdin, process.emit)


def drawn_images(backbone: Backbone, seed: int) -> ImageSource:
    """Return the images that a backbone draws itself. Raises `NoInputError` for one that draws none."""
    if backbone.sample_images is None:
        raise NoInputError(f"no images for {backbone.name}", "it brings none of its own", "name a folder with --data")
    return DrawnImages(tuple(backbone.sample_images(DRAWN_IMAGES, seed)), backbone.name)


def images_of_repair(
    backbone: Backbone, named: ImageSource | None, enough: int, size: int, seed: int, emit: Emit
) -> ImageSource:
    """Return the images of a repair: the named ones, followed by drawn images where there are fewer than `enough`.

    Where none are named, a backbone that draws images itself gets its own.
    """
    if named is None and backbone.sample_images is not None:
        return drawn_images(backbone, seed)
    count = len(named) if named else 0
    if named is not None and count >= enough:
        return named
    drawn = DrawnPictures(TO_TRAIN_ON - count, size, seed)
    given = {0: "no image was", 1: "1 image was"}.get(count, f"{count} images were")
    emit(Noted(f"{given} given: drawing {len(drawn)} pictures of {size} × {size} pixels to train on"))
    return JoinedImages((named, drawn)) if named else drawn


def preprocessing(
    backbone: Backbone, image_size: int | None, resize: Resize = "square", max_tokens: int | None = None
) -> Preprocessing:
    """Return the model's normalization, and a size rounded down to whole patches.

    `max_tokens` bounds the tokens of an image that keeps its shape. Raises `UsageError` for under 5 × 5 patches.
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


def shared_images(backbone: Backbone, seed: int, process: Process) -> Callable[[tuple[str, ...]], ImageSource]:
    """Return how to find images by their places, each once: standard input can be read only once.

    Without a place, they are those that the backbone draws.
    """

    @cache
    def found(places: tuple[str, ...]) -> ImageSource:
        return named_images(places, process) or drawn_images(backbone, seed)

    return found


def places_of_task(
    task: str, request: EvaluateRequest, emit: Emit, images: Callable[[tuple[str, ...]], ImageSource]
) -> Places:
    """Return where the data of one task lie: what is named for it, and what is named for all."""
    from sinder_cli.evaluation.contract import Places

    data, train = (_of_task(task, places, request.tasks) for places in (request.data, request.train))
    return Places(data, train, request.settings.seed, emit, lambda: images(data))


def _of_task(task: str, places: Sequence[str | Path], tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the places that are for a task; `TASK=PATH` is for that task alone."""
    named = [(str(place).partition("="), str(place)) for place in places]
    return tuple(
        parts[2] if parts[1] and parts[0] in tasks else place
        for parts, place in named
        if not parts[1] or parts[0] not in tasks or parts[0] == task
    )


def require_places(request: EvaluateRequest) -> None:
    """Raise an error for a place that does not exist, or that is for a task that is not run."""
    from sinder_cli.evaluation.registry import installed_tasks

    others = [name for name in installed_tasks() if name not in request.tasks]
    for option, places in (("--data", request.data), ("--train", request.train)):
        for place in map(str, places):
            name, equals, rest = place.partition("=")
            if equals and name in others and not _exists(place):
                raise UsageError(f"cannot use {option} {place}", f"task {name!r} is not run", "name the task, too")
            path = rest if equals and name in request.tasks else place
            if not path:
                raise UsageError(f"cannot use {option} {place}", "it names no place", f"give {name}=PATH")
            if path != "-" and not _exists(path):
                raise NoInputError(f"cannot read {path}", "there is no such file or folder", f"check {option}")


def _exists(place: str) -> bool:
    try:
        return Path(place).exists()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False
