"""The notebook runs from its first cell to its last, and what is stored is what is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra docs is not installed")
sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
import tour  # noqa: E402

pytestmark = pytest.mark.slow


def test_the_stored_notebook_has_the_cells_that_are_written() -> None:
    stored = nbformat.read(tour.NOTEBOOK, 4)
    assert [cell.source for cell in stored.cells] == [cell.source for cell in tour.tour().cells], "run `make tour`"


def test_it_runs_and_every_record_is_shown_as_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cells = tour.executed(tour.tour(), tmp_path).cells
    shown = ["".join(out.data["text/html"] for out in cell.outputs) for cell in cells if cell.cell_type == "code"][1:]
    expected = ("σ₁/σ₂", "stand out", "Repaired", "(run run)", "shift retrieval", "verified")
    for words, html in zip(expected, shown, strict=True):
        assert words in html
    assert 'src="data:image/png;base64,' in shown[1]
    assert "sinder: guard, after step" in shown[2]  # the display of progress
    assert (tmp_path / "repaired.safetensors").exists()
