"""The identity of a run, checked when it is resumed: its call, its settings, and its images, file by file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sinder_cli.backbone.device import AttentionName
from sinder_cli.backbone.hooks import ModelRequest
from sinder_cli.errors import BadInputError, ConflictError
from sinder_cli.escaping import printable
from sinder_cli.events import Emit, tracked
from sinder_cli.faults import first_fault
from sinder_cli.files import write_text
from sinder_cli.images.sources import FileState, ImageFiles, find_images
from sinder_cli.repairing.settings import WITHOUT_EFFECT, RepairSettings

if TYPE_CHECKING:
    from sinder_cli.repairing.folder import RunFolder


def differences(stored: dict[str, Any], given: dict[str, Any], images: bool = True) -> Iterator[tuple[str, Any, Any]]:
    """Yield differences of two `config.json` that would change the result: name, stored value, given value.

    Both must have the same keys. `images`: compare the images by count and fingerprint, if there is no list of them.
    """
    for name in ("model", "heads", "revision", "attention"):
        if stored[name] != given[name]:
            yield name, stored[name], given[name]
    was, now = (str(config["device"]).partition(":")[0] for config in (stored, given))
    if was != now:
        yield "device", was, now
    for name, kind in (("weights", "fingerprint"), ("images", "count"), ("images", "fingerprint")):
        if (images or name != "images") and stored[name][kind] != given[name][kind]:
            yield f"{kind} of the {name}", stored[name][kind], given[name][kind]
    for name, now in given["settings"].items():
        if name not in WITHOUT_EFFECT and stored["settings"][name] != now:
            yield f"setting {name}", stored["settings"][name], now


def is_of_a_run(config: dict[str, Any]) -> bool:
    """Return True if a `config.json` is that of a run: the folders of Hugging Face models have such a file too."""
    return {"model", "weights", "images", "settings", "versions"} <= config.keys()


def names_in(document: Any) -> Any:
    """Return the names in a JSON document, without the values."""
    return {name: names_in(part) for name, part in document.items()} if isinstance(document, dict) else None


READERS = 8  # threads, which mostly wait for the disk
DIGEST_BYTES = 16


@dataclass(frozen=True)
class ListedImage:
    """One image as it was when the run began: its path, its size, the time of its last change, a hash of its bytes."""

    path: str  # absolute
    bytes: int  # −1 if the file could not be examined
    changed_ns: int
    digest: str  # empty if it could not be read

    def is_at(self, path: Path, state: FileState) -> bool:
        """Return True if path, size and time are the same, which is enough to take the image for unchanged."""
        return (self.path, self.bytes, self.changed_ns) == (str(path.absolute()), *state)


def listed_images(files: ImageFiles, emit: Emit) -> list[ListedImage]:
    """Return the list of images for a new run. Every file is read once."""
    digests = tracked(_digests(files.paths), emit, "listing images", len(files), "images")
    return [
        ListedImage(str(path.absolute()), *state, digest)
        for path, state, digest in zip(files.paths, files.states, digests, strict=True)
    ]


def write_list(path: Path, images: Sequence[ListedImage]) -> None:
    """Write the list of images, one per line."""
    write_text(path, "".join(json.dumps(astuple(image)) + "\n" for image in images))


def read_list(path: Path) -> list[ListedImage]:
    """Read the list of images. Raises `BadInputError` if it is damaged."""
    try:
        return [ListedImage(*json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise BadInputError(f"cannot read {path}", str(error), "start anew with --force") from error


def first_difference(images: Sequence[ListedImage], files: ImageFiles, emit: Emit) -> str | None:
    """Return the first difference between some files and a list, in words; None if all bytes are the same.

    Only files whose path, size or time is not as listed are read.
    """
    pairs = list(zip(images, files.paths, files.states, strict=False))
    doubted = [(image, path, state) for image, path, state in pairs if not image.is_at(path, state)]
    digests = _digests([path for _, path, _ in doubted])
    compared = tracked(zip(doubted, digests, strict=True), emit, "comparing images", len(doubted), "images")
    for (image, path, state), digest in compared:
        if state[0] != image.bytes or digest != image.digest:
            return _difference(image, path, state[0])
    counts = f"there were {len(images)} images and now there are {len(files)}"
    if len(files) > len(images):
        return f"{counts}, {printable(str(files.paths[len(images)]))} is new"
    if len(files) < len(images):
        return f"{counts}, {printable(images[len(files)].path)} is gone"
    return None


def _difference(image: ListedImage, path: Path, size: int) -> str:
    place = str(path.absolute())
    now = printable(place)
    if place != image.path:
        return f"image {printable(image.path)} is now {now}, a different image"
    if size != image.bytes:
        return f"image {now} had {image.bytes} bytes and has {size}"
    return f"image {now} has other contents of the same size"


def _digests(paths: Sequence[Path]) -> Iterator[str]:
    with ThreadPoolExecutor(READERS) as readers:
        yield from readers.map(_digest, paths)


def _digest(path: Path) -> str:
    """Return a hash of a regular file's bytes; empty if unreadable, which is reported when it is decoded."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return ""
    return digest.hexdigest()


def call_of(request: ModelRequest, places: Sequence[str], is_run: bool) -> dict[str, Any]:
    """Return the part of `config.json` about the call, with absolute paths; `is_run`: the model is a run directory."""
    return {
        "model": str(Path(request.model).absolute()) if is_run else request.model,
        "weights": _absolute(request.weights),
        "branch": request.branch,
        "adapter": _absolute(request.adapter),
        "data": [place if place == "-" else str(Path(place).absolute()) for place in places],
    }


def as_called(folder: RunFolder, given: ModelRequest, settings: RepairSettings) -> tuple[ModelRequest, RepairSettings]:
    """Return model and settings of a run, overridden by those that are given now.

    Raises `ConflictError` for a run of another version, and `BadInputError` for a damaged `config.json`.
    """
    stored = _stored(folder)
    request = replace(
        given,
        model=stored.call.model,
        weights=given.weights or _path(stored.call.weights),
        adapter=given.adapter or _path(stored.call.adapter),
        branch=given.branch or stored.call.branch,
        heads=given.heads or stored.heads,
        revision=given.revision or stored.revision,
        attention=stored.attention if given.attention == "auto" else given.attention,
    )
    return request, stored.settings.model_copy(update=settings.model_dump(exclude_unset=True))


class _Call(BaseModel):
    """The call of a run, as returned by `call_of`."""

    model_config = ConfigDict(strict=True)

    model: str
    weights: str | None
    adapter: str | None
    data: list[str]
    branch: str | None = None


class _StoredCall(BaseModel):
    """The parts of a `config.json` that are needed to resume a run."""

    call: _Call
    heads: Annotated[int | None, Field(ge=1)]
    revision: str | None
    attention: AttentionName
    settings: RepairSettings


def _stored(folder: RunFolder) -> _StoredCall:
    """Read these parts. Raises `ConflictError`, naming the part, if one is missing or of another type."""
    config = folder.read_config()
    try:
        return _StoredCall.model_validate(config)
    except ValidationError as error:
        place, why = first_fault(error)
        what = f"its config.json is of another version of sinder, or damaged ({'.'.join(place)}: {why})"
        raise ConflictError(
            f"cannot resume {folder.path}", what, "use that version, or start anew with --force"
        ) from error


def images_of(folder: RunFolder) -> ImageFiles | None:
    """Return the images that a run has listed, at the paths of that time; None if its backbone draws the images.

    For a run that was killed before it listed them, they are collected again from the places of its call.
    """
    if not folder.images.is_file():
        places = _stored(folder).call.data if "call" in folder.read_config() else []
        return find_images(places) if places else None
    return ImageFiles(tuple(Path(image.path) for image in read_list(folder.images)))


def other_options(folder: RunFolder, settings: RepairSettings) -> list[str]:
    """Return the options that differ from the beginning of the run, all without effect on its result, as words."""
    stored = folder.read_config()["settings"]
    now = settings.model_dump(mode="json")
    words: list[str] = []
    for name in sorted(WITHOUT_EFFECT):
        if now[name] != stored[name]:
            values = now[name] if isinstance(now[name], list) else [now[name]]
            flag = f"--{name.replace('_', '-')}"
            for value in values:
                if value is True:
                    words.append(flag)
                elif value is not False and value is not None:  # the default
                    words += [flag, str(value)]
    return words


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _path(stored: str | None) -> Path | None:
    return None if stored is None else Path(stored)
