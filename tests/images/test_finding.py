"""Which files count as images."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest

from sinder_cli.errors import NoInputError
from sinder_cli.events import Noted, Warned
from sinder_cli.images import sources as finding
from sinder_cli.images.decoding import UnreadableImageError
from sinder_cli.images.sources import find_images


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_folders_are_searched_in_sorted_order_for_images(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.png", "notes.txt", "._a.png", "sub/c.webp", "sub/d.jpeg/e.gif", "a/z.tiff", "f.JFIF")
    (tmp_path / "folder.png").mkdir()
    found = find_images([str(tmp_path)]).paths
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["a/z.tiff", "a.png", "b.JPG", "f.JFIF", "sub/c.webp", "sub/d.jpeg/e.gif"]


def names_in(*places: Path) -> list[str]:
    return [path.relative_to(places[0]).as_posix() for path in find_images([str(place) for place in places]).paths]


def test_a_link_to_a_folder_above_makes_no_loop(tmp_path: Path) -> None:
    touch(tmp_path, "sub/a.png")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    assert names_in(tmp_path) == ["sub/a.png"]


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path: Path) -> None:
    touch(tmp_path, "here/b.png", "elsewhere/a.png", "elsewhere/deep/c.png")
    (tmp_path / "here" / "a").symlink_to(tmp_path / "elsewhere")
    assert names_in(tmp_path / "here") == ["a/a.png", "a/deep/c.png", "b.png"]


def test_a_folder_that_two_links_lead_to_counts_once(tmp_path: Path) -> None:
    touch(tmp_path, "here/b.png", "elsewhere/a.png")
    for link in ("second", "first"):
        (tmp_path / "here" / link).symlink_to(tmp_path / "elsewhere")
    assert names_in(tmp_path / "here") == ["b.png", "first/a.png"]
    assert names_in(tmp_path / "here", tmp_path / "here" / "second") == ["b.png", "first/a.png"]


def test_a_file_goes_by_its_own_path_not_a_links(tmp_path: Path) -> None:
    touch(tmp_path, "z/a.png")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    assert names_in(tmp_path) == ["z/a.png"]


def test_in_a_folder_only_regular_files_count(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "same.png").symlink_to(tmp_path / "a.png")
    assert names_in(tmp_path) == ["a.png", "same.png"]


def test_a_named_pipe_is_left_to_be_told_as_unreadable(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert names_in(tmp_path / "pipe.png") == ["."]


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Folders that cannot be read: by their paths, since the tests may run as root."""
    paths: set[str] = set()
    scandir = os.scandir

    def refusing(path: str) -> object:
        if os.fspath(path) in paths:
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    return paths


def test_a_named_folder_that_cannot_be_read_is_no_input(locked: set[str], tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    locked.add(str(tmp_path))
    with pytest.raises(NoInputError, match=r"cannot read images from .*: Permission denied"):
        find_images([str(tmp_path)])


def test_a_folder_within_that_cannot_be_read_is_passed_over(locked: set[str], tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "lost+found/b.png")
    locked.add(str(tmp_path / "lost+found"))
    told: list[object] = []
    assert find_images([str(tmp_path)], emit=told.append).paths == (tmp_path / "a.png",)
    assert told == [Warned(f"passed over {tmp_path / 'lost+found'}: Permission denied")]


def test_a_place_that_cannot_be_looked_at_is_no_input(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    with pytest.raises(NoInputError, match="Not a directory"):
        find_images([str(tmp_path / "a.png" / "b.png")])


def test_a_named_file_counts_whatever_its_suffix_and_only_once(tmp_path: Path) -> None:
    touch(tmp_path, "scan.dat", "a.png")
    places = [str(tmp_path / "scan.dat"), str(tmp_path), str(tmp_path / "a.png")]
    assert [path.name for path in find_images(places).paths] == ["scan.dat", "a.png"]


def test_a_dash_reads_a_list_from_standard_input() -> None:
    listed = io.StringIO("two words.png\n\n  \nb.jpg\r\n")
    assert find_images(["-"], listed).paths == (Path("two words.png"), Path("b.jpg"))


def test_a_missing_place_is_no_input(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="there is no such file or folder") as caught:
        find_images([str(tmp_path / "gone")])
    assert caught.value.exit_code == 66


@pytest.mark.parametrize("listed", [None, ""])
def test_nothing_found_is_no_input(listed: str | None, tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    with pytest.raises(NoInputError, match="no images in"):
        find_images([str(tmp_path)] if listed is None else ["-"], io.StringIO(listed or ""))


def test_what_sinder_wrote_is_searched_only_if_it_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "sinder-looks/a-model.png", "sinder-runs/m/pictures/image.jpg", "run/pictures/norm.png")
    touch(tmp_path, "run/pictures/words.json", "look/report.html", "look/report.json", "look/figures/b.png")
    touch(tmp_path, "trip/report.html", "trip/c.png")  # somebody else's page
    assert names_in(tmp_path) == ["a.png", "trip/c.png"]
    assert "4 sinder folders" in str(noted_in(tmp_path))
    named = find_images([str(tmp_path / "run" / "pictures")])
    assert [path.name for path in named.paths] == ["norm.png"]


def test_hidden_folders_are_searched_only_if_they_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", ".ipynb_checkpoints/a.png", "@eaDir/a.png", "sub/.git/b.png", "sub/.hidden.png")
    assert names_in(tmp_path) == ["a.png", "sub/.hidden.png"]
    hidden = [tmp_path / ".ipynb_checkpoints", tmp_path / "@eaDir"]
    assert [path.parent for path in find_images([str(folder) for folder in hidden]).paths] == hidden


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "find_spec", lambda _: None)


def noted_in(folder: Path) -> list[object]:
    told: list[object] = []
    find_images([str(folder)], emit=told.append)
    return told


@pytest.mark.usefixtures("without_heif")
def test_what_is_passed_over_is_counted_by_kind(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "x.txt", "y.TXT", "sub/z.txt", "p.heic", "q.HEIC", "._a.png", "Makefile", ".eaDir/b.png")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.png")
    assert noted_in(tmp_path) == [
        Noted(
            "passed over: 3 text files, 2 .heic (pip install 'sinder-cli[heic]' to read them),"
            " 1 dangling link (gone.jpg), 1 hidden folder (.eaDir), 1 macOS companion file (._a.png),"
            " 1 other file (Makefile), 1 special file (pipe.png)"
        )
    ]


def test_of_many_kinds_the_rarest_are_only_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", *(f"{at}.k{kind}" for kind in range(10) for at in range(12 - kind)))
    (told,) = noted_in(tmp_path)
    assert told == Noted("passed over: " + ", ".join(f"{12 - kind} .k{kind}" for kind in range(8)) + ", 7 others")


def test_nothing_is_said_where_nothing_is_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "sub/b.jpg")
    assert noted_in(tmp_path) == []


def test_heic_counts_where_the_extra_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "find_spec", lambda _: object())
    touch(tmp_path, "a.HEIC", "b.heif", "c.png")
    assert names_in(tmp_path) == ["a.HEIC", "b.heif", "c.png"]


def test_a_text_without_a_lists_suffix_is_told_how(tmp_path: Path) -> None:
    (tmp_path / "photos").write_text("a.png\nb.png\n")
    with pytest.raises(UnreadableImageError, match=r"a list of images ends in \.txt, or comes on standard input"):
        find_images([str(tmp_path / "photos")]).load(0)
