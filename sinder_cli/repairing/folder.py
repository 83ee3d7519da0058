"""The run directory: the files that a repair writes, by name."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinder_cli.errors import BadInputError, CannotCreateError, ConflictError, NoInputError, excerpt
from sinder_cli.events import Emit, Warned, silent
from sinder_cli.files import flush, output_error, remove_leftovers, require_writable_folder, write_json, write_text
from sinder_cli.folders import held
from sinder_cli.images.sources import ImageSource, files_of
from sinder_cli.notebooks import Shown
from sinder_cli.repairing.run_identity import (
    ListedImage,
    differences,
    first_difference,
    is_of_a_run,
    names_in,
    read_list,
    write_list,
)
from sinder_cli.repairing.settings import present_names

if TYPE_CHECKING:
    from sinder_cli.repairing.checkpoints import Checkpoints
    from sinder_cli.repairing.guard import Evaluation
    from sinder_cli.repairing.loop import StepRecord


# Every file and folder of a run directory, and what it holds; README and the model card list them from here.
RUN_FILES = {
    "model.safetensors": "the repaired weights, in the key order, names and dtypes of the input",
    "adapter.safetensors": "the changes of singular values alone, and the fingerprint of the weights they belong to",
    "report.html": "before and after, side by side, in one offline file",
    "pictures/": "the first image and its maps, before and after, and charts; `words.json` describes each",
    "summary.json": (
        "`verdict`, `defects.before/after` by block (`fraction`, `tokens`, `max_norm`, `median_norm`, …), "
        "`fidelity` to the inpainted original and to the original, `shift_retrieval` (shown, never decided "
        "by), `scan`, `steps`, `stopped_by`, `seconds`, `data`, `settings`, …"
    ),
    "metrics.jsonl": (
        "one line per step: images, first defective block, masked tokens, loss, what was shrunk and its "
        "gain, share of clean images"
    ),
    "evaluations.jsonl": (
        "one line per evaluation of the guard: outlying tokens, cosines to the inpainted original, whether it is "
        "the best state"
    ),
    "outliers.json": "the original: defective tokens of each image by block, and whether the weights predict them",
    "config.json": "how it was called, resolved settings, versions, seed, fingerprints of weights and image list",
    "images.jsonl": "with image files: one line each, its path, size, time and hash when the run began",
    "sidecars/": "with a model that takes more than weights to describe: its small text files, such as `config.json`",
    "README.md": "a model card",
    "checkpoints/": "the newest two states, from which the run can be resumed; kept when it has ended",
}


@dataclass(frozen=True)
class FinishedRun(Shown):
    """A finished repair, as described by its records."""

    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """The paths of the files in a run directory."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def images(self) -> Path:
        return self.path / "images.jsonl"

    @property
    def outliers(self) -> Path:
        return self.path / "outliers.json"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter.safetensors"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    @property
    def sidecars(self) -> Path:
        return self.path / "sidecars"

    @property
    def checkpoints(self) -> Checkpoints:
        from sinder_cli.repairing.checkpoints import Checkpoints

        return Checkpoints(self.path / "checkpoints")

    @property
    def written(self) -> tuple[Path, ...]:
        """Files of each run, besides checkpoints and image list; `config.json`, which marks a run, comes last."""
        return (self.summary, self.report, self.card, self.model, self.adapter, self.metrics, self.config)

    @property
    def lines(self) -> tuple[Path, Path]:
        """Files that grow by one line per step, or per evaluation of the guard; each line contains its step."""
        return (self.metrics, self.evaluations)

    @property
    def is_run(self) -> bool:
        """True if a run has begun here. Raises `BadInputError` for a `config.json` that cannot be read."""
        return self.config.is_file() and is_of_a_run(self.read_config())

    @property
    def finished(self) -> bool:
        """True if a run has ended here."""
        return self.summary.is_file()

    @property
    def complete(self) -> bool:
        """True if a run has ended here and none of its files is missing."""
        return all(path.is_file() for path in self.written)

    @property
    def resumable(self) -> bool:
        """True if there is a checkpoint to resume from."""
        return any((self.path / "checkpoints").glob("step-*"))

    def read_summary(self) -> dict[str, Any]:
        """Read `summary.json` of a finished run. Raises `BadInputError` if it cannot be read."""
        try:
            summary: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInputError(f"cannot read {self.summary}", str(error), "is it a run directory?") from error
        return summary

    def read_finished(self) -> FinishedRun:
        """Read the records of a finished run. Raises `BadInputError` if they cannot be read."""
        return FinishedRun(self.path, self.read_summary(), self.read_config())

    def record(self, line: StepRecord | Evaluation) -> None:
        """Append one line to the metrics, or the evaluations. Raises `StorageError` if the disk is full."""
        from sinder_cli.repairing.guard import Evaluation

        path = self.evaluations if isinstance(line, Evaluation) else self.metrics
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(line)) + "\n")
        except OSError as error:
            raise output_error(path, error) from error

    def forget_after(self, step: int, look: int | None = None) -> None:
        """Drop the lines of the metrics after `step`, and those of the evaluations after `look` (default: `step`).

        A resumed run writes them again.
        """
        for path, last in ((self.metrics, step), (self.evaluations, step if look is None else look)):
            if path.is_file():
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= last]
                write_text(path, "".join(kept))

    def flush_lines(self) -> None:
        """Flush the lines written so far to the disk, before a later checkpoint is written."""
        for path in self.lines:
            if path.is_file():
                flush(path)

    @contextmanager
    def held(self, emit: Emit = silent) -> Iterator[None]:
        """Create the folder and keep other processes out of it; created folders that stay empty are removed again.

        Raises `TryAgainError` while another process holds it.
        """
        with held(self.path, emit):
            self._sweep()
            yield

    def require_free(self, resume: bool, force: bool) -> bool:
        """Return True if there is a run to resume; nothing is changed yet.

        Raises `CannotCreateError` for a folder that holds something other than a run, or a run if neither `resume` nor
        `force` is set, and `BadInputError` for a run whose `config.json` cannot be read.
        """
        if not any(self.path.iterdir()):
            return False
        what = f"cannot create run directory {self.path}"
        if not self.is_run:
            raise CannotCreateError(what, "it is not empty, and holds no run", "choose another --out, or remove it")
        if not resume and not force:
            remedy = "--force starts anew" if self.complete else "--resume continues it, --force starts anew"
            raise CannotCreateError(what, f"it holds a {self._state}", remedy)
        return resume

    def takes_more_steps(self, max_steps: int) -> bool:
        """Return True if a run that has ended is to take more steps than it was to take.

        Raises `ConflictError` for a run that ended for another reason than that.
        """
        if not self.complete:
            return False
        settings = self.read_config().get("settings")
        earlier = settings.get("max_steps") if isinstance(settings, dict) else None
        if not isinstance(earlier, int) or max_steps <= earlier:
            return False
        if (why := self.read_summary().get("stopped_by")) != "max_steps":
            words = f"it ended before its last step ({why})"
            raise ConflictError(f"cannot go on with {self.path}", words, "leave --max-steps out, or start anew")
        return True

    def go_on(self, max_steps: int) -> None:
        """Make an unfinished run of this one, which is to take `max_steps` steps; its weights stay until it ends."""
        config = self.read_config()
        config["settings"]["max_steps"] = max_steps
        write_json(self.config, config)
        try:
            self.summary.unlink(missing_ok=True)
        except OSError as error:
            raise output_error(self.summary, error) from error

    def begin(self, config: dict[str, Any], images: Sequence[ListedImage] = ()) -> None:
        """Remove the files of an earlier run, and no others, and write the configuration of a new run."""
        try:
            if self.checkpoints.folder.exists():
                shutil.rmtree(self.checkpoints.folder)  # first: half-removed ones must not look like the new run's
            if self.pictures.exists():
                shutil.rmtree(self.pictures)
            for path in (self.evaluations, self.images, self.outliers, *self.written[:-1]):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise output_error(self.path, error) from error
        write_json(self.config, config)
        if images:
            write_list(self.images, images)  # last: a list without a configuration belongs to no run

    def write_sidecars(self, sidecars: Mapping[str, str]) -> None:
        """Write the text files that are needed to describe the backbone again; remove those of an earlier run."""
        try:
            if self.sidecars.exists():
                shutil.rmtree(self.sidecars)
        except OSError as error:
            raise output_error(self.sidecars, error) from error
        if sidecars:
            require_writable_folder(self.sidecars)
        for name, text in sidecars.items():
            write_text(self.sidecars / Path(name).name, text)

    def read_sidecars(self) -> dict[str, str]:
        """Read these text files, by name. Raises `BadInputError` for one that is not UTF-8 text."""
        paths = sorted(path for path in self.sidecars.glob("[!.]*") if path.is_file())  # no temporary files
        try:
            return {path.name: path.read_text(encoding="utf-8") for path in paths}
        except UnicodeDecodeError as error:
            raise BadInputError(f"cannot read {self.sidecars}", str(error), "is it a run directory?") from error

    def _sweep(self) -> None:
        """Remove what a killed process has left under temporary names."""
        for path in (self.evaluations, self.images, self.outliers, self.pictures, *self.written):
            remove_leftovers(path)
        self.checkpoints.sweep()

    def require_same(self, config: dict[str, Any], source: ImageSource | None = None, emit: Emit = silent) -> None:
        """Raise `ConflictError` if settings, images, weights or kind of device differ, naming the first difference.

        Other versions, or another number of threads, only cause a warning: they may change the last bits. Raises
        `ConflictError` for a `config.json` of another version of sinder too, and `BadInputError` for an unreadable one.
        """
        stored = self.read_config()
        what, remedy = f"cannot resume {self.path}", self._remedy()
        if names_in(stored) != names_in(config):
            why = "its config.json is of another version of sinder"
            raise ConflictError(what, why, "use that version, or start anew with --force")
        listed = files_of(source) if source is not None and self.images.is_file() else None
        for name, was, now in differences(stored, config, images=listed is None):
            raise ConflictError(what, f"{name} was {was} and is {now}", remedy)
        if listed and (difference := first_difference(read_list(self.images), listed, emit)):
            raise ConflictError(what, difference, remedy)
        for name in ("threads", "versions"):
            if stored[name] != config[name]:
                emit(Warned(f"{name} were {stored[name]} and are {config[name]}: the last bits may differ"))

    @property
    def branch(self) -> str | None:
        """The backbone that was repaired, of several in the file; None if the user did not name one."""
        call = self.read_config().get("call")
        named = call.get("branch") if isinstance(call, dict) else None
        return named if isinstance(named, str) else None

    def repaired_model(self) -> tuple[str, int | None]:
        """Return the name of the model that was repaired here, and the number of heads that the user gave.

        Raises `BadInputError` for an unreadable `config.json`, and `NoInputError` if there is no finished run.
        """
        if not self.config.is_file():
            remedy = (
                "name its model, and the file with --weights or --compare-weights"
                if self.path.is_file()
                else "check the path"
            )
            raise NoInputError(f"cannot use {self.path}", "it is no run directory of `sinder repair`", remedy)
        config = self.read_config()
        model, heads = str(config["model"]), config.get("heads")
        if not self.model.is_file():
            why = "there is no model.safetensors: its run did not finish"
            raise NoInputError(f"cannot use {self.path}", why, f"`{self.resuming}` continues it")
        return model, heads

    def repaired_weights(self) -> tuple[str, str]:
        """Return source and fingerprint of the weights that were repaired. Raises `BadInputError` as `read_config`."""
        weights = self.read_config()["weights"]
        return str(weights["source"]), str(weights["fingerprint"])

    @property
    def _state(self) -> str:
        """Kind of the run that has begun here, in words."""
        if self.complete:
            return "finished run"
        return "finished run without all its files" if self.finished else "run that did not finish"

    @property
    def resuming(self) -> str:
        """The command line that resumes the run, quoted for a shell."""
        return shlex.join(["sinder", "repair", self.argument, "--resume"])

    @property
    def argument(self) -> str:
        """The folder as a command-line argument that is not mistaken for an option."""
        return f"./{self.path}" if str(self.path).startswith("-") else str(self.path)

    def _remedy(self) -> str:
        return f"give what the run began with, as `{self.resuming}` does, or start anew with --force"

    def read_config(self) -> dict[str, Any]:
        """Read `config.json`. Raises `BadInputError` if it is damaged, or belongs to neither a run nor a model."""
        try:
            config: dict[str, Any] = json.loads(self.config.read_text(encoding="utf-8"))
            str(config["model"])
            config |= {"settings": present_names(config["settings"])} if "settings" in config else {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = excerpt(f"{type(error).__name__}: {error}")
            raise BadInputError(f"cannot read {self.config}", why, "is it a run directory?") from error
        return config


def _step_of(line: str) -> float:
    """Return the step of a line of the metrics; infinity for a damaged line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
