"""What is printed says the names as they are."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.table import Table

from sinder_cli.cli.output import show
from sinder_cli.files import write_json


def test_brackets_in_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title="runs[bold]/[/x]")
    table.add_column("model[red]")
    table.add_row("[/]vit")
    show("table", lambda: table, dict)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("runs[bold]/[/x]", "model[red]", "[/]vit"))


def test_a_document_is_printed_where_no_terminal_reads(capsys: pytest.CaptureFixture[str]) -> None:
    show(None, lambda: "a table", lambda: {"σ": 1.5})
    assert capsys.readouterr().out == '{\n  "σ": 1.5\n}\n'


def test_a_document_is_the_same_in_files_and_on_stdout(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    document = {"model": "σ₁ “ü” 猫", "share": 0.1, "none": None, "list": [1, 2]}
    write_json(tmp_path / "report.json", document)
    show("json", lambda: "a table", lambda: document)
    assert capsysbinary.readouterr().out == (tmp_path / "report.json").read_bytes()
    assert "猫".encode() in (tmp_path / "report.json").read_bytes()


def test_a_name_that_is_no_text_is_still_json(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    show("json", lambda: "a table", lambda: {"name": "a\udcff.png"})
    assert json.loads(capsysbinary.readouterr().out) == {"name": "a\udcff.png"}


def test_a_number_that_json_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(ValueError, match="not JSON compliant"):
        show("json", lambda: "", lambda: {"loss": float("nan")})


def test_control_characters_in_names_reach_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("model")
    table.add_row("esc\x1b]0;title\x07\x9b31m")
    show("table", lambda: table, dict)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert r"esc\x1b]0;title" in shown
    assert r"\x9b31m" in shown
