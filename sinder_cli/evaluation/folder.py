"""Where an evaluation lies: its folder, and the folder of its features."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sinder_cli.distributed import Ranks
from sinder_cli.errors import CannotCreateError
from sinder_cli.events import Emit, Noted
from sinder_cli.files import make_folder, output_error, require_creatable_folder, require_writable_folder

FEATURES = "features"  # kept, and used again by later calls
PICTURES = "pictures"
PICTURE_NAME = re.compile(r".+-\d{5,}-\d\.(png|jpg)|differences-.+\.(png|svg|pdf|csv)")  # task, image, panel; charts
DOCUMENT, TABLE, PAGE = "evaluation.json", "evaluation.csv", "report.html"
WRITTEN = (DOCUMENT, TABLE, PAGE, PICTURES)


def begin_evaluation(folder: Path) -> None:
    """Create the folder, and remove page and pictures of an earlier evaluation from it, but not its document.

    Pictures are removed by their names. Raises `CannotCreateError` or `StorageError` for what the file system refuses.
    """
    try:
        make_folder(folder / PICTURES)
        for name in (PAGE, TABLE):
            (folder / name).unlink(missing_ok=True)
        for old in (folder / PICTURES).iterdir():
            if PICTURE_NAME.fullmatch(old.name):
                old.unlink()
    except OSError as error:
        raise output_error(folder, error) from error


def require_evaluation_place(folder: Path, force: bool) -> None:
    """Check, before any work, that an evaluation can be written to a folder, which may hold features already.

    Raises `CannotCreateError` for a folder that holds anything else, or an evaluation without `force`.
    """
    if not folder.is_dir():
        require_creatable_folder(folder)
        return
    names = {path.name for path in folder.iterdir()} - {FEATURES}
    if names == {PICTURES} and not any((folder / PICTURES).iterdir()):  # as when the first write failed
        names = set()
    ours = DOCUMENT in names and names <= set(WRITTEN)
    if names and not ours:
        raise CannotCreateError(f"cannot create {folder}", "it holds other files", "choose another --out")
    if (folder / PICTURES).exists() and not (folder / PICTURES).is_dir():
        raise CannotCreateError(f"cannot create {folder}", f"{PICTURES} in it is no folder", "choose another --out")
    if ours and not force and not _unfinished(folder / DOCUMENT):
        raise CannotCreateError(f"cannot create {folder}", "it holds an evaluation", "add --force to replace it")
    require_writable_folder(folder)


def _unfinished(document: Path) -> bool:
    """Return True if a document is of an evaluation that ended before its last task."""
    try:
        return json.loads(document.read_bytes()).get("finished") is False
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def features_folder(named: Path | None, out: Path | None, emit: Emit, ranks: Ranks) -> Iterator[Path]:
    """Yield the folder for features: the named one, or that of the evaluation, or a temporary one, removed at the end.

    Raises `CannotCreateError` or `StorageError` for what the file system refuses.
    """
    kept = named or (out / FEATURES if out is not None else None)
    if kept is not None:
        if ranks.writes:
            try:
                make_folder(kept)
            except OSError as error:
                raise output_error(kept, error) from error
        yield kept
        return
    temporary = tempfile.TemporaryDirectory(prefix="sinder-features-") if ranks.writes else None
    try:
        if temporary is not None:
            emit(Noted(f"features go to {temporary.name}, and are removed at the end; --features DIR keeps them"))
        yield ranks.from_rank0(lambda: Path(temporary.name if temporary else ""))
        ranks.all_gather(None)  # nobody reads any more
    finally:
        if temporary is not None:
            temporary.cleanup()
