"""The manual page of the JSON document names every member of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
from made_analysis import Made

from sinder_cli.analysis.records import Analysis, BlockRecord, Distribution
from sinder_cli.report.documents import finite
from sinder_cli.report.manual import records_of, schema_page, type_words


def members(value: Any) -> set[str]:
    """The names of all members of objects that records make."""
    if isinstance(value, list | tuple):
        return {name for part in value for name in members(part)}
    if not hasattr(value, "model_fields_set"):
        return set()
    fields = set(type(value).model_fields)
    return fields.union(*(members(getattr(value, field)) for field in fields))


def test_every_member_of_a_document_is_on_the_page() -> None:
    analysis = Made(compared=True, drawn=0).result().analysis
    assert finite(analysis.model_dump(mode="json"))
    told = set(re.findall(r"^\.B (\S+)$", schema_page(), re.MULTILINE))
    assert members(analysis) >= {"patch_norm", "patch_cosine", "sentence"}
    assert members(analysis) <= told


def test_every_record_has_one_section() -> None:
    sections = re.findall(r"^\.SH (.+)$", schema_page(), re.MULTILINE)
    assert len(sections) == len(set(sections))
    assert {record.__name__.upper() for record in records_of(Analysis)} - {"ANALYSIS"} <= set(sections)
    assert records_of(Analysis)[0] is Analysis


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "integer"),
        (float | None, "number or null"),
        (tuple[int, int], "list of 2 integer"),
        (tuple[BlockRecord, ...], "list of BlockRecord"),
        (dict[str, Distribution | None], "object: string → Distribution or null"),
        (Literal["a", "b"], '"a" | "b"'),
    ],
)
def test_types_are_told_as_json_has_them(annotation: Any, words: str) -> None:
    assert type_words(annotation) == words


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_renders_the_page_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "page.5").write_text(schema_page(), "utf-8")
    command = ["groff", "-man", "-Tutf8", "-ww", "-K", "utf8", "-b", str(tmp_path / "page.5")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "spread_within_deg" in re.sub(r"\x1b\[[0-9;]*m|.\x08", "", run.stdout)
