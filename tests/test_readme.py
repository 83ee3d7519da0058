"""README's tables say what the code and the measured evidence say."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
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


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = {"analyze", "backbones", "check-backbone", "evaluate", "export", "predict-defects", "repair", "runs"}
NARROW = "\N{NO-BREAK SPACE}"  # between a number and its unit
WITHOUT_FORMAT = {"man", "demo"}  # they print text alone


def consoles(path: Path) -> list[tuple[str, str]]:
    """Every command that a document shows in a console, with what it prints, in the document's order."""
    blocks = re.findall(r"```console\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    parts = [part for block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(command, expected) for command, _, expected in (part.partition("\n") for part in parts)]


def pattern_of(expected: str) -> str:
    """`…` stands for anything: alone on a line for lines, else for the rest of a line or a part of it."""
    lines = [line.rstrip() for line in expected.strip("\n").split("\n")]
    return "\n".join(".*" if line == "…" else re.escape(line).replace("…", r"[^\n]*") for line in lines)


def test_dots_stand_for_a_part_of_a_line_or_for_lines() -> None:
    assert re.fullmatch(pattern_of("a … c\n…\nd"), "a b c\nx\ny\nd", re.DOTALL)
    assert not re.fullmatch(pattern_of("a … c"), "a b\n c", re.DOTALL)


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run a command as it is shown, each once, in one folder for all documents: later ones use what it wrote."""
    folder = tmp_path_factory.mktemp("shown")
    draw_images(1, seed=5)[0].save(folder / "photo.jpg", quality=95)

    @functools.cache
    def run(command: str) -> subprocess.CompletedProcess[str]:
        _, *words = shlex.split(command)
        given = words[0] in WITHOUT_FORMAT or "--format" in words
        table = [] if given else ["--format", "table"]  # as on a terminal
        return subprocess.run(
            [sys.executable, "-m", "sinder_cli", *words, *table],
            capture_output=True, text=True, cwd=folder, env=environment, check=False, timeout=300,
        )  # fmt: skip

    return run


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if consoles(path)], ids=lambda path: path.name)
def test_a_command_that_is_shown_prints_what_is_shown(
    path: Path, ran: Callable[[str], subprocess.CompletedProcess[str]]
) -> None:
    for command, expected in consoles(path):
        run = ran(command)
        printed = run.stdout.replace(f"{sys.executable} -m sinder_cli", "sinder").replace(NARROW, " ")
        printed = "\n".join(line.rstrip() for line in printed.strip("\n").split("\n"))
        said = f"{path.name}: {command}\n{printed}\n{run.stderr}"
        assert run.returncode == 0, said
        if not re.fullmatch(pattern_of(expected), printed, re.DOTALL):
            pytest.fail(said)


@pytest.mark.parametrize(
    ("name", "commands"),
    [("README.md", SHOWN), ("analyze.md", {"analyze"}), ("first-hour.md", SHOWN - {"backbones", "check-backbone"})],
)
def test_what_the_commands_print_is_shown(name: str, commands: set[str]) -> None:
    (path,) = [path for path in DOCUMENTS if path.name == name]
    assert {command.split()[1] for command, _ in consoles(path)} >= commands


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
