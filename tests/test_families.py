"""The tables of families in the docs name every family that the tests know, and what was seen of each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from families import BEGIN, END, EXPORTED, MATRIX, TABLE, TARGETS, cases


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], list[str]]:
    """The cells of the documents' table by library and family."""
    table = TABLE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {(cells[1], cells[0]): cells[2:] for cells in lines[2:]}


def test_just_the_tested_families_have_a_row(rows: dict[tuple[str, str], list[str]]) -> None:
    assert set(rows) == {(case.library, case.family) for case in cases()}


def test_every_row_says_what_was_checked(rows: dict[tuple[str, str], list[str]]) -> None:
    for family, (_, conforms, repaired, differs) in rows.items():
        assert re.fullmatch(r"(\d+) of \1", conforms), family
        assert re.fullmatch(r"[1-9]\d* weights", repaired), family
        assert differs == "0" or float(differs) <= 1e-5, family


def test_the_export_matrix_has_every_target_and_every_source() -> None:
    lines = Path(MATRIX).read_text(encoding="utf-8").splitlines()
    header = next(line for line in lines if line.startswith("| from"))
    assert [cell.strip() for cell in header.strip("|").split("|")][1:] == list(TARGETS)
    sources = {tuple(reversed(found)) for line in lines for found in re.findall(r"^\| (.+?) \((\w+)\) \|", line)}
    assert sources == EXPORTED
