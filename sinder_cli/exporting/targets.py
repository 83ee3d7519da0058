"""Definition of a target format, and the lookup of one by name.

To add one: write `sinder_cli/exporting/NAME.py` with a `TARGET`, and put NAME into `TargetName`. `write` gets a path
that is not the final one; if it or `verify` raises, nothing is left behind. A target that another library loads has a
script in `checks/`, which needs that library alone, and compares features with `verifying.verify_features`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from sinder_cli.errors import UsageError
from sinder_cli.exporting.licences import require_licence

if TYPE_CHECKING:
    from sinder_cli.backbone.contract import Backbone
    from sinder_cli.events import Emit
    from sinder_cli.images.sources import ImageSource
    from sinder_cli.repairing.folder import RunFolder
    from sinder_cli.repairing.weight_changes import Change


@dataclass(frozen=True)
class Repaired:
    """The change that led to a backbone, the run that made it if one was named, and the weights before it.

    `open_base` returns None and the reason if these weights cannot be opened.
    """

    change: Change
    run: RunFolder | None
    open_base: Callable[[], tuple[Backbone | None, str]] = field(repr=False)


@dataclass(frozen=True)
class Plan:
    """Everything that a target needs to write: the backbone in the requested dtype, and its origin.

    `repaired` is None for a model that was not repaired. `images` are those that the user named for the check.
    `own_weights` is True if the weights before any repair are those that the plugin itself gets for the model.
    """

    backbone: Backbone
    settings: ExportSettings
    emit: Emit
    repaired: Repaired | None = None
    images: ImageSource | None = None
    own_weights: bool = False

    @property
    def image_size(self) -> int:
        """Pixels along the side of a square input: the requested size, or the model's own, in whole patches."""
        size = self.settings.image_size or self.backbone.image_size
        return size - size % self.backbone.patch_size


@dataclass(frozen=True)
class ExportCheck:
    """Result of loading the written files again; `verified` is False if this was not possible.

    `difference` and `tolerance` are relative; 0 means bit-identical.
    """

    sentence: str
    verified: bool = True
    difference: float | None = None
    tolerance: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The result on one line, with what was measured."""
        if self.difference is None or self.tolerance is None:
            return self.sentence
        if self.difference == 0:
            return f"{self.sentence}: no difference"
        return f"{self.sentence}: largest relative difference {self.difference:.1e}, tolerance {self.tolerance:.0e}"


def nothing_to_refuse(plan: Plan) -> None:
    """Refuse nothing: for a target that can hold any backbone."""


def nothing_to_finish(plan: Plan, path: Path) -> None:
    """Do nothing more: for a target that is complete with its card."""


@dataclass(frozen=True)
class Loading:
    """Python that loads an export: the imports, the call that makes the model, and lines that a card shows besides."""

    imports: str
    call: str
    more: str = ""

    @property
    def line(self) -> str:
        """One line that can be pasted into Python."""
        return f"{self.imports}; {self.call}"

    @property
    def text(self) -> str:
        """The lines for a card."""
        return f"{self.imports}\n\n{self.call}" + (f"\n{self.more}" if self.more else "")


@dataclass(frozen=True)
class ExportTarget:
    """One format.

    `require` refuses, before anything is written, what the format cannot hold: it raises `UsageError` or
    `BadInputError` with the reason. `verify` loads what was written and raises `BadInputError` if it differs.
    `finish` is called last, when a folder has its card.
    `options` are the options of the command that have an effect on the target. `of_changes` is True if a target holds
    only what a repair changed, not the weights.
    """

    kind: Literal["file", "folder"]
    summary: str
    write: Callable[[Plan, Path], None]
    verify: Callable[[Plan, Path], ExportCheck]
    loading: Callable[[Plan, str], Loading]  # (plan, path of what was written, or its repository) → how it is loaded
    require: Callable[[Plan], None] = nothing_to_refuse
    finish: Callable[[Plan, Path], None] = nothing_to_finish
    suffixes: tuple[str, ...] = ()
    options: frozenset[str] = frozenset()
    of_changes: bool = False
    public: bool = False  # True if the folder is meant for the world: it gets no picture of the user's photographs


def target_of(name: TargetName) -> ExportTarget:
    """Return the target of that name; only its module is imported. Raises `UsageError` for an unknown name."""
    known = get_args(TargetName)
    if name not in known:
        raise UsageError(f"no export format {name!r}", f"there are {', '.join(known)}", "name one of them")
    target: ExportTarget = import_module(f"{__package__}.{name.replace('-', '_')}").TARGET
    return target


def require_suffix(target: ExportTarget, out: Path) -> None:
    """Raise `UsageError` for a file name with the suffix of another format."""
    if target.suffixes and out.suffix not in target.suffixes:
        remedy = f"use {' or '.join(target.suffixes)}"
        raise UsageError(f"cannot export to {out}", f"unknown suffix {out.suffix!r}", remedy)


def require_options(name: str, target: ExportTarget, settings: ExportSettings) -> None:
    """Raise `UsageError` for an option that has no effect on the target."""
    for option, given in settings.given.items():
        if given and option not in target.options:
            raise UsageError(f"cannot use {option} with --to {name}", "it has no effect there", "leave it out")


TargetName = Literal["native", "transformers", "hf-repo", "timm", "dinov2", "torchhub", "onnx", "adapter", "diff"]
OLD_NAMES: dict[str, TargetName] = {"delta": "diff"}  # still accepted
DtypeName = Literal["float32", "float16", "bfloat16"]

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # OWNER/NAME on a hub
LONGEST_REPOSITORY = 96  # characters of OWNER/NAME, as the Hub counts them
CARD_OPTIONS = frozenset({"--license", "--base-model"})  # of targets that are folders, which have a card
SHARD_BYTES = 5 * 10**9  # the largest file that suits a hub
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class ExportSettings:
    """Settings of an export; `to` names the target.

    None stands for the default: the stored dtypes, the model's own image size, shards of `SHARD_BYTES`.
    """

    to: TargetName
    dtype: DtypeName | None = None
    image_size: int | None = None  # pixels
    dynamic_size: bool = False
    max_shard_size: int | None = None  # bytes
    verify: bool = True
    force: bool = False
    license: str | None = None  # of the base model, as cards name it; None: the one that its plugin knows
    base_model: str | None = None  # its repository, `OWNER/NAME`
    repo_id: str | None = None  # the repository that a folder for upload is meant for, `OWNER/NAME`

    def __post_init__(self) -> None:
        object.__setattr__(self, "to", OLD_NAMES.get(self.to, self.to))
        if self.license is not None:
            require_licence(self.license)
        for name, place in (("base model", self.base_model), ("repository", self.repo_id)):
            if place is not None and not is_repository(place):
                raise UsageError(f"bad {name} {place!r}", "it is no repository", "name it OWNER/NAME")

    @property
    def given(self) -> dict[str, bool]:
        """Options that only some targets have: True for each one that was given."""
        return {
            "--dtype": self.dtype is not None,
            "--image-size": self.image_size is not None,
            "--dynamic-size": self.dynamic_size,
            "--max-shard-size": self.max_shard_size is not None,
            "--license": self.license is not None,
            "--base-model": self.base_model is not None,
            "--repo-id": self.repo_id is not None,
        }


def is_repository(text: str) -> bool:
    """Return True for OWNER/NAME as the Hub takes it: no `--` or `..`, no `-` or `.` at an end of either part."""
    parts = text.split("/")
    whole = bool(REPOSITORY.fullmatch(text)) and text.isascii() and len(text) <= LONGEST_REPOSITORY
    return whole and not any(
        "--" in part or ".." in part or part != part.strip("-.") or part.endswith(".git") for part in parts
    )


def parse_size(text: str) -> int:
    """Return the bytes of `500MB`, `2 GiB` or a plain number. Raises `UsageError` for any other text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", text.upper())
    size = round(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise UsageError(f"bad size {text!r}", "it is not a number of bytes", "use for example 5GB or 500MiB")
    return size
