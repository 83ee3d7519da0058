"""The run directory: what a repair leaves behind, by name."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinder_cli.errors import BadInputError, CannotCreateError, ConflictError, NoInputError, TryAgainError
from sinder_cli.events import Emit, Warned, silent
from sinder_cli.files import flush, output_error, remove_leftovers, require_writable_folder, write_json, write_text
from sinder_cli.images.sources import ImageFiles, ImageSource
from sinder_cli.repair.imagelist import ListedImage, first_difference, read_list, write_list
from sinder_cli.repair.settings import WITHOUT_EFFECT

if TYPE_CHECKING:
    from sinder_cli.repair.checkpoints import Checkpoints
    from sinder_cli.repair.evaluation import Evaluation
    from sinder_cli.repair.loop import StepRecord


@dataclass(frozen=True)
class RunFolder:
    """The names inside a run directory."""

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
    def sidecars(self) -> Path:
        return self.path / "sidecars"

    @property
    def checkpoints(self) -> Checkpoints:
        from sinder_cli.repair.checkpoints import Checkpoints

        return Checkpoints(self.path / "checkpoints")

    @property
    def written(self) -> tuple[Path, ...]:
        """What each run writes besides checkpoints and the list of image files; what tells of a run comes last."""
        return (self.summary, self.report, self.card, self.model, self.adapter, self.metrics, self.config)

    @property
    def lines(self) -> tuple[Path, Path]:
        """What grows by a line a step, or a look: each line says its step."""
        return (self.metrics, self.evaluations)

    @property
    def is_run(self) -> bool:
        """Whether a run has begun here. Raises `BadInputError` for a `config.json` that cannot be read."""
        return self.config.is_file() and _is_of_a_run(self.read_config())

    @property
    def finished(self) -> bool:
        """Whether a run has ended here."""
        return self.summary.is_file()

    @property
    def complete(self) -> bool:
        """Whether a run has ended here and nothing that it writes is missing."""
        return all(path.is_file() for path in self.written)

    @property
    def resumable(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return any((self.path / "checkpoints").glob("step-*"))

    def read_summary(self) -> dict[str, Any]:
        """`summary.json` of a finished run. Raises `BadInputError` where it cannot be read."""
        try:
            summary: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInputError(f"cannot read {self.summary}", str(error), "is it a run directory?") from error
        return summary

    def record(self, line: StepRecord | Evaluation) -> None:
        """Append one line to the metrics, or the evaluations. Raises `StorageError` where the disk is full."""
        from sinder_cli.repair.evaluation import Evaluation

        path = self.evaluations if isinstance(line, Evaluation) else self.metrics
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(line)) + "\n")
        except OSError as error:
            raise output_error(path, error) from error

    def forget_after(self, step: int) -> None:
        """Drop the lines that come after a step: a resumed run writes them again."""
        for path in self.lines:
            if path.is_file():
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
                write_text(path, "".join(kept))

    def flush_lines(self) -> None:
        """Have the lines so far on the disk, before a checkpoint that comes after them is."""
        for path in self.lines:
            if path.is_file():
                flush(path)

    @contextmanager
    def held(self, emit: Emit = silent) -> Iterator[None]:
        """Create the folder and keep other processes out of it; what was made and stays empty is removed again.

        Raises `TryAgainError` while another process holds it.
        """
        made = [place for place in (self.path, *self.path.parents) if not place.exists()]
        with ExitStack() as undone:  # a signal may come between any two of these
            undone.callback(_remove_empty, made)
            require_writable_folder(self.path)
            handle = _opened_here_alone(self.path)
            undone.callback(_close_all, handle)  # and with it the lock
            undone.callback(_remove_empty, made)  # before that, or it might be another's by then
            try:
                _lock(handle[0], self.path, emit)
            except TryAgainError:
                made.clear()  # it is the other's
                raise
            self._sweep()
            yield

    def require_free(self, resume: bool, force: bool) -> bool:
        """Whether there is an unfinished run to go on with; nothing is touched yet.

        Raises `CannotCreateError` for a folder that holds anything but a run, or a run without leave to touch it, and
        `BadInputError` for a run whose `config.json` cannot be read.
        """
        if not any(self.path.iterdir()):
            return False
        what = f"cannot create run directory {self.path}"
        if not self.is_run:
            raise CannotCreateError(what, "it is not empty, and holds no run", "choose another --out, or remove it")
        if not resume and not force:
            remedy = "--force starts anew" if self.complete else "--resume goes on with it, --force starts anew"
            raise CannotCreateError(what, f"it holds a {self._state}", remedy)
        return resume

    def begin(self, config: dict[str, Any], images: Sequence[ListedImage] = ()) -> None:
        """Remove what is here of an earlier run, and of nothing else, and write the configuration of a new one."""
        try:
            if self.checkpoints.folder.exists():
                shutil.rmtree(self.checkpoints.folder)  # first: what is half removed must not look like the new run
            for path in (self.evaluations, self.images, *self.written[:-1]):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise output_error(self.path, error) from error
        write_json(self.config, config)
        if images:
            write_list(self.images, images)  # last: without a configuration, it is nobody's

    def write_sidecars(self, sidecars: Mapping[str, str]) -> None:
        """Keep the text files that describing the backbone again takes, and none of an earlier run."""
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
        """The text files by name. Raises `BadInputError` for one that is no text."""
        paths = sorted(path for path in self.sidecars.glob("[!.]*") if path.is_file())  # those that are whole
        try:
            return {path.name: path.read_text(encoding="utf-8") for path in paths}
        except UnicodeDecodeError as error:
            raise BadInputError(f"cannot read {self.sidecars}", str(error), "is it a run directory?") from error

    def _sweep(self) -> None:
        """Remove what a killed process has left under temporary names."""
        for path in (self.evaluations, self.images, *self.written):
            remove_leftovers(path)
        self.checkpoints.sweep()

    def require_same(self, config: dict[str, Any], source: ImageSource | None = None, emit: Emit = silent) -> None:
        """Refuse to go on under other settings, images, weights or on another kind of device, naming the first.

        Other versions, or another number of threads, are told: they may change the last bits. Raises `ConflictError`,
        and `BadInputError` for a `config.json` that cannot be read.
        """
        stored = self.read_config()
        what, remedy = f"cannot resume {self.path}", self._remedy()
        if _shape(stored) != _shape(config):
            why = "its config.json is of another version of sinder"
            raise ConflictError(what, why, "use that version, or start anew with --force")
        listed = source if isinstance(source, ImageFiles) and self.images.is_file() else None
        for name, was, now in differences(stored, config, images=listed is None):
            raise ConflictError(what, f"{name} was {was} and is {now}", remedy)
        if listed and (difference := first_difference(read_list(self.images), listed, emit)):
            raise ConflictError(what, difference, remedy)
        for name in ("threads", "versions"):
            if stored[name] != config[name]:
                emit(Warned(f"{name} were {stored[name]} and are {config[name]}: the last bits may differ"))

    def repaired_model(self) -> tuple[str, int | None]:
        """The name of the model that was repaired here, and the heads that its user gave.

        Raises `BadInputError` for an unreadable `config.json` and `NoInputError` for a run that did not finish.
        """
        if not self.config.is_file():
            raise NoInputError(f"cannot use {self.path}", "it is no run directory of `sinder repair`", "check the path")
        config = self.read_config()
        model, heads = str(config["model"]), config.get("heads")
        if not self.model.is_file():
            why = "there is no model.safetensors: its run did not finish"
            raise NoInputError(f"cannot use {self.path}", why, f"`{self.resuming}` goes on with it")
        return model, heads

    def repaired_weights(self) -> tuple[str, str]:
        """Where the weights that were repaired here came from, and their fingerprint. Raises `BadInputError`."""
        weights = self.read_config()["weights"]
        return str(weights["source"]), str(weights["fingerprint"])

    @property
    def _state(self) -> str:
        """What kind of run has begun here, in words."""
        if self.complete:
            return "finished run"
        return "finished run without all its files" if self.finished else "run that did not finish"

    @property
    def resuming(self) -> str:
        """The command line that goes on with the run, as a shell takes it."""
        return shlex.join(["sinder", "repair", self.argument, "--resume"])

    @property
    def argument(self) -> str:
        """The folder as an argument that is no option."""
        return f"./{self.path}" if str(self.path).startswith("-") else str(self.path)

    def _remedy(self) -> str:
        return f"give what it was, as `{self.resuming}` does, or start anew with --force"

    def read_config(self) -> dict[str, Any]:
        """`config.json`. Raises `BadInputError` where it is torn, or no run's and no model's."""
        try:
            config: dict[str, Any] = json.loads(self.config.read_text(encoding="utf-8"))
            str(config["model"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise BadInputError(f"cannot read {self.config}", why, "is it a run directory?") from error
        return config


def _step_of(line: str) -> float:
    """The step of a line of the metrics; infinity for one that is torn."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, up to one that is not empty."""
    with suppress(OSError):
        while folders:
            folders.pop(0).rmdir()


def _opened_here_alone(folder: Path) -> list[int]:
    """The descriptor of a folder, which no process that is forked later keeps: it would keep the lock as well."""
    handle = [os.open(folder, os.O_RDONLY)]
    os.register_at_fork(after_in_child=lambda: _close_all(handle))  # nothing is left to close once it is closed here
    return handle


def _close_all(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())


def _lock(handle: int, path: Path, emit: Emit) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        why, remedy = "another process is repairing into it", "wait for its end, or choose another --out"
        raise TryAgainError(f"run directory {path} is in use", why, remedy) from error
    except OSError as error:  # a file system, such as some of NFS, that locks no folders
        emit(Warned(f"cannot keep other processes out of {path}: {error.strerror}"))


def differences(stored: dict[str, Any], given: dict[str, Any], images: bool = True) -> Iterator[tuple[str, Any, Any]]:
    """What of two `config.json` of one shape would change the result: name, stored value, given value.

    `images`: by their count and fingerprint, where there is no list of them.
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


def _is_of_a_run(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is ours: the folders of Hugging Face models have one too."""
    return {"model", "weights", "images", "settings", "versions"} <= config.keys()


def _shape(document: Any) -> Any:
    """The names in a JSON document, without the values."""
    return {name: _shape(part) for name, part in document.items()} if isinstance(document, dict) else None
