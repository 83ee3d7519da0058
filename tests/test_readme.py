"""README's tables say what the code and the measured evidence say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from sinder_cli.defects.settings import STAGES
from sinder_cli.exporting.targets import TargetName
from sinder_cli.repairing.settings import Recipe
from sinder_cli.repairing.verdict import VerdictWord

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVIDENCE = (ROOT / "tests" / "real" / "EVIDENCE.md").read_text(encoding="utf-8")
# README's words for a row → the plant and the way in EVIDENCE.md
WAYS = {
    ", from 8 photographs": "sinder, 8 photographs",
    ", from drawn pictures alone": "sinder, drawn pictures alone",
    ", `--recipe paper`, 40 steps": "paper",
}


def rows(text: str, head: str) -> list[list[str]]:
    """Return the cells of the table whose first line begins with `head`."""
    table = text[text.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table]


def plant_and_way(words: str) -> tuple[str, str]:
    for ending, way in WAYS.items():
        if words.endswith(ending):
            return words.removesuffix(ending), way
    return words, "sinder"


def test_every_figure_of_the_evidence_table_is_measured() -> None:
    measured = {(row[0], row[1]): row for row in rows(EVIDENCE, "plant")}
    table = rows(README, "defect planted in")
    assert len(table) >= 10
    for words, *cells in table:
        plant, way = plant_and_way(words)
        before, after = measured[plant, "before"], measured[plant, way]
        outliers = f"{float(before[3]):.2f} → {float(after[3]):.2f}"
        assert cells == [outliers, *(f"{before[column]} → {after[column]}" for column in (5, 6, 7))], words


def test_every_plant_of_the_evidence_is_in_the_table() -> None:
    plants = {row[0] for row in rows(EVIDENCE, "plant")} - {"none: as it is"}
    assert {words for words, *_ in rows(README, "defect planted in")} >= plants


def test_every_verdict_is_explained() -> None:
    assert [row[0].strip("`") for row in rows(README, "verdict")] == list(get_args(VerdictWord))


def test_every_format_recipe_and_stage_is_named() -> None:
    formats = README.split("## Where people load models from")[1].split("\n## ")[0]
    assert all(re.search(rf"--to {name} |or {name}:", formats) for name in get_args(TargetName))
    assert all(f"--recipe {name}" in README for name in get_args(Recipe) if name != "sinder")
    assert f"({', '.join(f'`{stage}`' for stage in STAGES)})" in README
