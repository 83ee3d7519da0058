"""README's tables say what the code and the measured evidence say."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from sinder_plugins.demo.drawing import draw_images

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
    scripts = (ROOT / "docs" / "scripts.md").read_text(encoding="utf-8")
    assert f"({', '.join(f'`{stage}`' for stage in STAGES)})" in scripts


def consoles() -> list[tuple[str, str]]:
    """Every block of the documents that shows a command and what it prints, with the name of its document."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        (path.name, block)
        for path in documents
        for block in re.findall(r"```console\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "block"), consoles())
def test_a_command_that_is_shown_prints_what_is_shown(
    name: str, block: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    """`…` stands for anything; a terminal is asked for, since without one a document is printed."""
    draw_images(1, seed=5)[0].save(tmp_path / "photo.jpg", quality=95)
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        words = [sys.executable, "-m", "sinder_cli", *shlex.split(command)[1:]]
        run = subprocess.run(
            [*words, *([] if "--format" in words else ["--format", "table"])],
            capture_output=True, text=True, cwd=tmp_path, env=environment, check=False, timeout=300,
        )  # fmt: skip
        printed = run.stdout.replace(f"{sys.executable} -m sinder_cli", "sinder")
        pattern = re.escape(expected.strip()).replace("…", ".*")
        assert re.fullmatch(pattern, printed.strip(), re.DOTALL), f"{name}: {command}\n{printed}{run.stderr}"


def test_the_first_session_is_shown() -> None:
    assert {name for name, _ in consoles()} >= {"README.md", "analyze.md"}


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path, environment: dict[str, str]) -> None:
    assert python_blocks()
    for block in python_blocks():
        run = subprocess.run(
            [sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )
        assert (run.returncode, run.stdout) == (0, "repaired\n"), run.stderr


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=str)
def test_every_file_that_is_linked_is_there(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith(("http:", "https:"))]
    assert [link for link in local if not (path.parent / link).exists()] == []
