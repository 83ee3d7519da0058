"""Where an export goes: nothing is lost that was not an export, and nothing half written is ever there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sinder_cli import folders as placing
from sinder_cli.errors import CannotCreateError, StorageError, UsageError
from sinder_cli.folders import FORMAT, MANIFEST, placed, require_place


def make_export(folder: Path, **files: str) -> Path:
    """A folder as an export leaves it."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": dict.fromkeys(files)}))
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


# What may be there


def test_a_new_place_is_free_and_nothing_is_made_there(tmp_path: Path) -> None:
    require_place(tmp_path / "new.pth", "file", False, [])
    require_place(tmp_path / "deep" / "new", "folder", False, [])
    (tmp_path / "empty").mkdir()
    require_place(tmp_path / "empty", "folder", False, [])
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_what_is_there_takes_force(tmp_path: Path) -> None:
    (tmp_path / "old.pth").write_text("old")
    make_export(tmp_path / "old", weights="old")
    for place, kind in ((tmp_path / "old.pth", "file"), (tmp_path / "old", "folder")):
        with pytest.raises(CannotCreateError, match="it already exists; --force replaces it") as refusal:
            require_place(place, kind, False, [])  # type: ignore[arg-type]
        assert refusal.value.exit_code == 73
        require_place(place, kind, True, [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("manifest", "why"),
    [
        (None, "it is not empty, and is not an export"),
        ("{", "it is not empty, and is not an export"),
        ("[]", "it is not empty, and is not an export"),
        ('{"files": {}}', "it is not empty, and is not an export"),
        ('{"format": "another-1", "files": {}}', "its format is 'another-1'"),
        (f'{{"format": "{FORMAT}", "files": {{}}}}', "no export wrote notes.txt in it"),
    ],
)
def test_force_replaces_no_folder_with_anything_else_in_it(tmp_path: Path, manifest: str | None, why: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    if manifest is not None:
        (folder / MANIFEST).write_text(manifest)
    with pytest.raises(CannotCreateError, match=why):
        require_place(folder, "folder", True, [])


def test_what_python_leaves_beside_a_module_is_no_stranger(tmp_path: Path) -> None:
    folder = make_export(tmp_path / "hub", **{"hubconf.py": ""})
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "hubconf.pyc").write_text("")
    require_place(folder, "folder", True, [])


def test_no_source_or_folder_around_it_is_written_over(tmp_path: Path) -> None:
    weights = tmp_path / "models" / "weights.pth"
    weights.parent.mkdir()
    weights.write_text("weights")
    for out, kind in ((weights, "file"), (tmp_path / "models", "folder"), (tmp_path, "folder")):
        with pytest.raises(UsageError, match=f"cannot write {out}: {weights} is read from there"):
            require_place(out, kind, True, [weights])  # type: ignore[arg-type]
    (tmp_path / "link.pth").symlink_to(weights)
    with pytest.raises(UsageError):
        require_place(tmp_path / "link.pth", "file", True, [weights])
    require_place(tmp_path / "models" / "out.pth", "file", True, [weights])


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotCreateError, match="it is no folder"):
        require_place(tmp_path / "file", "folder", True, [])
    with pytest.raises(CannotCreateError, match="it is a folder"):
        require_place(tmp_path, "file", True, [])


# How it gets there


@pytest.fixture(params=["exchanged", "renamed"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without a file system that exchanges two folders in one step."""
    kind: str = request.param
    if kind == "renamed":
        monkeypatch.setattr(placing, "_exchange", lambda one, other: False)  # noqa: ARG005
    return kind


def test_a_folder_is_replaced_whole(tmp_path: Path, system: str) -> None:
    out = make_export(tmp_path / "out", weights="old", more="old")
    with placed(out) as draft:
        make_export(draft, weights="new")
        assert contents(out)["weights"] == "old"
    assert contents(out).keys() == {"weights", MANIFEST}
    assert contents(out)["weights"] == "new"
    assert list(tmp_path.iterdir()) == [out], system


def test_a_file_is_replaced_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "old.bin").write_text("old")
    (tmp_path / "out.pth").symlink_to("old.bin")
    with placed(tmp_path / "out.pth") as draft:
        assert draft.suffix == ".pth"
        draft.write_text("new")
    assert (tmp_path / "out.pth").is_symlink()
    assert (tmp_path / "old.bin").read_text() == "new"
    assert (tmp_path / "old.bin").stat().st_mode & 0o777 == 0o666 & ~placing_umask()


def placing_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    out = make_export(tmp_path / "out", weights="old")

    def write() -> None:
        with placed(out) as draft:
            make_export(draft, weights="new")
            raise error

    with pytest.raises(error):
        write()
    assert contents(out)["weights"] == "old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    out = make_export(tmp_path / "out", weights="old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=os.strerror(code)), placed(out) as draft:
        make_export(draft, weights="new")
    assert contents(out)["weights"] == "old"
    assert list(tmp_path.iterdir()) == [out]


KILLED = """
import os, signal, sys
from pathlib import Path
from sinder_cli import folders as placing
out, where = Path(sys.argv[1]), sys.argv[2]
if where == "between":  # the two renames of a file system that exchanges nothing
    placing._exchange = lambda one, other: False
    genuine = Path.rename
    def rename(self, target):
        genuine(self, target)
        if Path(target).name == placing.REPLACED:
            os.kill(os.getpid(), signal.SIGKILL)
    Path.rename = rename
with placing.placed(out) as draft:
    draft.mkdir()
    (draft / "weights").write_text("new")
    if where == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("where", ["writing", "between"])
def test_after_a_kill_the_old_is_there_or_comes_back(tmp_path: Path, where: str) -> None:
    out = make_export(tmp_path / "out", weights="old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), where], timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == (2 if where == "writing" else 1)

    def fail() -> None:
        with placed(out):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert contents(out)["weights"] == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_the_drafts_of_another_living_process_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with placed(out) as first:
        first.write_text("first")
        with placed(out) as second:
            second.write_text("second")
        assert first.read_text() == "first"
    assert out.read_text() == "first"


Exchange = Callable[[Path, Path], bool]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has renameat2")
def test_linux_exchanges_two_folders_in_one_step(tmp_path: Path) -> None:
    one, other = make_export(tmp_path / "one", a="1"), make_export(tmp_path / "other", a="2")
    assert placing._exchange(one, other)
    assert (contents(one)["a"], contents(other)["a"]) == ("2", "1")
    with pytest.raises(FileNotFoundError):
        placing._exchange(one, tmp_path / "none")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "it broke"), KeyboardInterrupt()])
def test_what_breaks_between_two_renames_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(placing, "_exchange", lambda one, other: False)  # noqa: ARG005
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    really = Path.rename

    def breaking(self: Path, target: Path) -> Path:
        if target == out and self.name == "out":  # the draft's, not that of what comes back
            raise error
        return really(self, target)

    monkeypatch.setattr(Path, "rename", breaking)

    def write() -> None:
        with placed(out) as draft:
            draft.mkdir()
            (draft / "new").write_text("new")

    with pytest.raises((StorageError, KeyboardInterrupt)):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "old").read_text() == "old"
