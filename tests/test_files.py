"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from pathlib import Path

import pytest

from sinder_cli.errors import CannotCreateError, StorageError
from sinder_cli.files import (
    output_error,
    public_model,
    public_source,
    replacing,
    replacing_folder,
    require_creatable_folder,
    require_writable_file,
    require_writable_folder,
    sha256_of,
    write_json,
    write_text,
)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "result.json"
    path.write_text("old")
    return path


def only_the_old_is_there(old: Path) -> bool:
    return list(old.parent.iterdir()) == [old] and old.read_text() == "old"


def test_a_file_is_replaced_only_when_it_is_whole(old: Path) -> None:
    with replacing(old) as temporary:
        assert temporary.parent == old.parent
        temporary.write_text("new")
        assert old.read_text() == "old"
    assert old.read_text() == "new"
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_temporary(old: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with replacing(old) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert only_the_old_is_there(old)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_the_old_file(old: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=os.strerror(code)) as caught:
        write_text(old, "new")
    assert caught.value.exit_code == 74
    assert only_the_old_is_there(old)


def test_every_file_and_its_folder_are_flushed_to_disk(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    genuine = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (flushed.append(os.fstat(handle).st_ino), genuine(handle)))
    write_text(old, "new")
    assert flushed == [old.stat().st_ino, old.parent.stat().st_ino]


def test_a_place_closed_to_new_files_is_its_own_error(old: Path) -> None:
    for place in (old / "below a file.json", old.parent / "absent" / "result.json"):
        with pytest.raises(CannotCreateError) as caught:
            write_text(place, "new")
        assert caught.value.exit_code == 73
        assert str(place) in str(caught.value)
    assert only_the_old_is_there(old)


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CannotCreateError):
        write_text(tmp_path / "folder", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "new", "text")
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_json_is_indented_and_ends_with_a_line_feed(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ν": [1, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"ν": [1, None]}
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_that_no_other_reader_understands_is_not_written(old: Path, value: float) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(old, {"loss": value})
    assert only_the_old_is_there(old)


def test_a_folder_is_created_and_proved_writable(tmp_path: Path) -> None:
    require_writable_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_folders_that_are_made_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    genuine = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (flushed.append(os.fstat(handle).st_ino), genuine(handle)))
    require_writable_folder(tmp_path / "a" / "b")
    assert flushed == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]
    flushed.clear()
    require_writable_folder(tmp_path / "a" / "b")
    assert flushed == []


def test_a_folder_below_a_file_cannot_be_created(old: Path) -> None:
    with pytest.raises(CannotCreateError):
        require_writable_folder(old / "run")


def test_a_file_to_be_written_must_be_in_a_folder(old: Path) -> None:
    require_writable_file(old)
    require_writable_file(old.parent / "new")
    with pytest.raises(CannotCreateError, match="it is a folder"):
        require_writable_file(old.parent)
    with pytest.raises(CannotCreateError, match="there is no folder"):
        require_writable_file(old.parent / "absent" / "new")
    assert only_the_old_is_there(old)


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, StorageError), (errno.EFBIG, StorageError), (errno.EACCES, CannotCreateError)]
)
def test_an_os_error_is_told_by_its_reason(code: int, kind: type[Exception]) -> None:
    assert type(output_error(Path("x"), OSError(code, os.strerror(code)))) is kind


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 8192  # longer than one piece
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_symbolic_link_is_followed_and_stays_a_link(old: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.txt"
    link.symlink_to(old)
    write_text(link, "new")
    assert link.is_symlink()
    assert old.read_text() == "new"


def test_text_with_an_undecodable_file_name_is_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    write_text(tmp_path / "a.txt", f"skipped {name}")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "skipped \\udcff.png"


def test_a_device_is_no_file_to_be_written() -> None:
    with pytest.raises(CannotCreateError, match="it is a device"):
        require_writable_file(Path("/dev/null"))


def test_the_proof_that_a_folder_can_be_made_makes_nothing(tmp_path: Path) -> None:
    require_creatable_folder(tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    with replacing_folder(target) as temporary:
        (temporary / "figures").mkdir()
        (temporary / "figures" / "one.png").touch()
        assert temporary.parent == target.parent
        assert not target.exists()
    assert (target / "figures" / "one.png").exists()
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_of_a_folder(tmp_path: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with replacing_folder(tmp_path / "out") as temporary:
            (temporary / "half").touch()
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_a_filled_one_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with replacing_folder(target) as temporary:
        (temporary / "first").touch()
    with pytest.raises(CannotCreateError, match="it is not empty"), replacing_folder(target):
        pass
    assert [path.name for path in target.iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_there_stays_the_same_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir(mode=0o700)
    before = target.stat()
    with replacing_folder(target) as temporary:
        assert temporary.parent == target  # beside it nothing may be writable
        (temporary / "figures").mkdir()
        (temporary / "page.html").touch()
    assert (target.stat().st_ino, target.stat().st_mode) == (before.st_ino, before.st_mode)
    assert sorted(path.name for path in target.iterdir()) == ["figures", "page.html"]


def test_a_folder_that_was_filled_meanwhile_keeps_its_files(tmp_path: Path) -> None:
    def write() -> None:
        with replacing_folder(tmp_path) as temporary:
            (temporary / "ours").touch()
            (tmp_path / "theirs").touch()

    with pytest.raises(CannotCreateError, match="filled meanwhile"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_folder_that_was_filled_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    writing = replacing_folder(target)
    writing.__enter__()
    target.mkdir()
    (target / "theirs").touch()
    with pytest.raises(CannotCreateError):
        writing.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == [target]
    assert [path.name for path in target.iterdir()] == ["theirs"]


def test_a_folder_does_not_take_the_place_of_a_file(old: Path) -> None:
    for place in (old, old / "below"):
        with pytest.raises(CannotCreateError), replacing_folder(place):
            pass
    assert only_the_old_is_there(old)


def test_all_that_is_in_a_folder_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    genuine = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (flushed.append(os.fstat(handle).st_ino), genuine(handle)))
    before = os.umask(0o027)
    try:
        with replacing_folder(tmp_path / "out") as temporary:
            (temporary / "a").mkdir()
            (temporary / "a" / "b").touch()
    finally:
        os.umask(before)
    places = [tmp_path, tmp_path / "out", tmp_path / "out" / "a", tmp_path / "out" / "a" / "b"]
    assert {place.stat().st_ino for place in places} == set(flushed)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize(
    ("label", "told"),
    [
        ("demo_vit", "demo_vit"),
        ("timm/vit_small_patch14_dinov2.lvd142m", "timm/vit_small_patch14_dinov2.lvd142m"),
        ("/home/me/my files/vit.pth, converted by timm", "vit.pth, converted by timm"),
        ("mine/vit.pth, adapted by runs/secret/adapter.safetensors", "vit.pth, adapted by adapter.safetensors"),
        ("~/vit", "vit"),
    ],
)
def test_a_source_is_told_without_the_folders_of_this_machine(label: str, told: str) -> None:
    assert public_source(label) == told


def test_a_model_in_a_folder_goes_by_its_last_part() -> None:
    assert public_model("hf//home/me/vit") == "hf/vit"
    assert public_model("hf/facebook/dinov2-small") == "hf/facebook/dinov2-small"
    assert public_model("demo_vit") == "demo_vit"
