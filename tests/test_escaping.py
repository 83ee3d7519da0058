"""What no terminal and no report should get raw is escaped, and what JSON says stays exact."""

from __future__ import annotations

import json
import unicodedata

import pytest

from sinder_cli.errors import NoInputError
from sinder_cli.escaping import json_escaped, printable, printable_lines
from sinder_cli.files import json_text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("new\nline.png", r"new\nline.png"),
        ("esc\x1b[31mred.png", r"esc\x1b[31mred.png"),
        ("csi\x9b31m.png", r"csi\x9b31m.png"),
        ("nel\x85.png", r"nel\x85.png"),
        ("line\u2028paragraph\u2029.png", r"line\u2028paragraph\u2029.png"),
        ("gpj.\u202eelif", r"gpj.\u202eelif"),
        ("byte\udcff.png", r"byte\udcff.png"),
        ("größer, 猫  x\\n.png", "größer, 猫  x\\n.png"),
    ],
)
def test_a_name_is_shown_without_control_characters(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert printable(shown) == shown


def test_no_control_character_of_unicode_is_left() -> None:
    every = "".join(map(chr, range(0x110000)))
    assert {unicodedata.category(letter) for letter in printable(every)}.isdisjoint({"Cc", "Cs", "Zl", "Zp"})


def test_a_text_keeps_its_lines() -> None:
    assert printable_lines("a\n\tb\x1b") == "a\n\tb\\x1b"


def test_json_stays_exact_and_steers_no_terminal() -> None:
    document = {"a\x9b\x85\u2028\udcff": "\x1b\n\u202e猫"}
    text = json_text(document)
    assert json.loads(text) == document
    assert printable_lines(text) == text
    assert "猫" in text
    assert json_escaped(text) == text


def test_an_error_is_one_line_that_still_says_the_name() -> None:
    error = NoInputError("cannot read a\nb\x1b  c", "a library says\n   so \x1b", "do \n this")
    assert str(error) == r"cannot read a\nb\x1b  c: a library says so \x1b; do this"
