"""Lists of images as people make them: names with odd letters, NULs, byte order marks, UTF-16."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from sinder_cli.errors import BadInputError, NoInputError
from sinder_cli.images.sources import find_images, listed_paths, read_bytes

NAMES = ["two words.png", "u\u2028x.png", "v\u0085w.png", "größe/猫.png", "form\x0cfeed.png"]
PATHS = [Path(name) for name in NAMES]


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_name_a_line(encoding: str, newline: str) -> None:
    for end in ("", newline):
        assert listed_paths((newline.join(NAMES) + end).encode(encoding)) == PATHS


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_told_by_its_nuls(encoding: str) -> None:
    assert listed_paths("a.png\r\nb c.png\r\n".encode(encoding)) == [Path("a.png"), Path("b c.png")]


def test_names_ended_by_nul_may_hold_anything_else() -> None:
    names = ["new\nline.png", "esc\x1b[31m.png", " ", "\ufeffmark.png", "r\r", *NAMES]
    listed = "".join(f"{name}\0" for name in names)
    assert listed_paths(listed.encode()) == [Path(name) for name in names if name != " "]
    assert listed_paths(b"a\0b\0") == [Path("a"), Path("b")]


def test_empty_lines_count_for_nothing() -> None:
    assert listed_paths(b"\n  \n\r\na.png\n\n") == [Path("a.png")]
    assert listed_paths(b"") == []


def test_a_name_that_is_no_utf_8_names_its_bytes() -> None:
    assert [os.fsencode(path) for path in listed_paths(b"b\xff.png\n")] == [b"b\xff.png"]
    assert [os.fsencode(path) for path in listed_paths(b"\xef\xbb\xbfb\xff.png\n")] == [b"b\xff.png"]


def test_a_stream_of_text_gives_its_original_bytes() -> None:
    content = "a\udcff\u2028.png\r\n".encode("utf-8", "surrogateescape")
    text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors="surrogateescape")
    assert read_bytes(text) == read_bytes(io.BytesIO(content)) == content
    assert read_bytes(io.StringIO("a\n")) == b"a\n"


@pytest.mark.parametrize("suffix", [".txt", ".lst", ".list", ".TXT"])
def test_a_list_that_is_named_is_read_as_one(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"photos{suffix}").write_bytes("\r\n".join(NAMES).encode("utf-16"))
    (tmp_path / "scan.dat").write_bytes(b"")
    places = [str(tmp_path / f"photos{suffix}"), str(tmp_path / "scan.dat")]
    assert find_images(places).paths == (*PATHS, tmp_path / "scan.dat")


def test_a_list_that_cannot_be_read_is_no_input(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "torn.txt").write_bytes(b"\xff\xfea")
    for name, why in (("pipe", "a list must be a regular file"), ("torn", "byte order mark"), ("gone", "no such file")):
        with pytest.raises(NoInputError, match=why):
            find_images([str(tmp_path / f"{name}.txt")])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_the_bytes_of_an_image_are_no_list(kind: str) -> None:
    written = io.BytesIO()
    Image.new("RGB", (64, 64), "orange").save(written, kind)
    with pytest.raises(BadInputError, match="standard input: this is an image, not a list of images") as refused:
        find_images(["-"], io.BytesIO(written.getvalue()))
    assert refused.value.exit_code == 65


def test_other_data_are_no_list_either(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(bytes(range(1, 255)) * 4)
    with pytest.raises(BadInputError, match=r"list\.txt: this is no text, not a list of images"):
        find_images([str(tmp_path / "list.txt")])


def test_a_name_may_begin_like_an_image_and_hold_a_control_character() -> None:
    listed = b"BMW.jpg\nGIF.png\nII*.png\n\x1b[2J.png\n"
    assert len(find_images(["-"], io.BytesIO(listed)).paths) == 4
    assert len(find_images(["-"], io.BytesIO(listed.replace(b"\n", b"\0"))).paths) == 4
