"""`sinder backbones`, and plugins of others: found like ours, and harmless when they are broken."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Sinder = Callable[..., subprocess.CompletedProcess[str]]

GOOD = """
from sinder_cli import Listing, hookimpl
print("LOADED {module}", file=__import__("sys").stderr)

@hookimpl
def sinder_listing():
    return [Listing("{name}_tiny", "a model of somebody else's", 1000, 8, 1)]
"""
BREAKAGES = {
    "a library that is not there": ("import no_such_library", "No module named 'no_such_library'"),
    "a mistake in its text": ("def broken(:", "SyntaxError"),
    "an exit while it is imported": ("raise SystemExit(3)", "SystemExit"),
    "brackets in its complaint": ("raise ImportError('needs [bold]extra[/] [/x]')", "needs [bold]extra[/] [/x]"),
    "another version of the interface": ("SINDER_API = 99", "SINDER_API 99"),
    "a hook that nobody calls": (
        "from sinder_cli import hookimpl\n@hookimpl\ndef sinder_lsting(): return []",
        "sinder_lsting",
    ),
    "a listing that fails": (
        "from sinder_cli import hookimpl\n@hookimpl\ndef sinder_listing(): return 1 / 0",
        "division by zero",
    ),
    "a listing of something else": (
        "from sinder_cli import hookimpl\n@hookimpl\ndef sinder_listing(): return ['broken_tiny']",
        "'broken_tiny' is no Listing",
    ),
}


def install(folder: Path, distribution: str, plugin: str, text: str) -> None:
    """Lay out a distribution of one module with an entry point, as an installer leaves it."""
    module = f"{distribution.replace('-', '_')}_module"
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sinder.backbones]\n{plugin} = {module}\n")
    (folder / f"{module}.py").write_text(text.replace("{module}", module).replace("{name}", plugin))


def test_the_document_lists_every_model(sinder: Sinder) -> None:
    rows = json.loads(sinder("backbones").stdout)
    assert {row["plugin"] for row in rows} >= {"demo", "dinov2"}
    by_name = {row["name"]: row for row in rows}
    assert by_name["dinov2_vitg14_reg"]["prefix_tokens"] == 5
    assert by_name["dinov2_vitl14"]["parameters"] == 304368640
    assert by_name["demo_vit"] == {
        "name": "demo_vit",
        "summary": by_name["demo_vit"]["summary"],
        "parameters": 5529024,
        "patch_size": 14,
        "prefix_tokens": 1,
        "requires": [],
        "revisions": False,
        "plugin": "demo",
        "distribution": "sinder-cli",
        "available": True,
        "missing": [],
        "problem": None,
    }


def test_the_table_has_a_line_a_model_within_80_columns(sinder: Sinder) -> None:
    run = sinder("backbones", "--format", "table")
    lines = run.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in run.stdout
    assert "\x1b" not in run.stdout
    row = next(line.split() for line in lines if "dinov2_vits14_reg" in line)
    assert row == ["dinov2_vits14_reg", "dinov2", "sinder-cli", "22.1", "M", "14", "5", "there"]


def test_a_plugin_of_somebody_else_is_found_by_its_entry_point(sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "other-vits", "other", GOOD)
    rows = json.loads(sinder("backbones", PYTHONPATH=str(tmp_path)).stdout)
    row = next(row for row in rows if row["name"] == "other_tiny")
    assert (row["plugin"], row["distribution"], row["available"]) == ("other", "other-vits", True)


def test_a_model_whose_library_is_missing_is_listed_as_such(sinder: Sinder, tmp_path: Path) -> None:
    needy = GOOD.replace("8, 1)", "8, 1, requires=('json', 'no_such_library', 'no_such_package.part'))")
    install(tmp_path, "needy-vits", "needy", needy)
    rows = json.loads(sinder("backbones", PYTHONPATH=str(tmp_path)).stdout)
    row = next(row for row in rows if row["name"] == "needy_tiny")
    assert (row["available"], row["missing"]) == (False, ["no_such_library", "no_such_package.part"])
    assert (row["requires"], row["problem"]) == (["json", "no_such_library", "no_such_package.part"], None)
    table = sinder("backbones", "--format", "table", PYTHONPATH=str(tmp_path)).stdout
    told = "".join(table[table.index("needy_tiny") :].split())
    assert "missing:no_such_library,no_such_package.part" in told
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(("text", "word"), BREAKAGES.values(), ids=BREAKAGES)
def test_a_broken_plugin_is_named_with_its_problem_and_spoils_no_other(
    text: str, word: str, sinder: Sinder, tmp_path: Path
) -> None:
    install(tmp_path, "broken-vits", "broken", text)
    run = sinder("backbones", PYTHONPATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    broken = [row for row in rows if row["plugin"] == "broken"]
    assert len(broken) == 1
    assert (broken[0]["available"], broken[0]["name"], broken[0]["distribution"]) == (False, None, "broken-vits")
    assert word in broken[0]["problem"]
    assert "broken-vits" in broken[0]["problem"]
    assert any(row["name"] == "demo_vit" and row["available"] for row in rows)


def test_the_table_shows_a_problem_letter_by_letter(sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "broken-vits", "broken", BREAKAGES["brackets in its complaint"][0])
    run = sinder("backbones", "--format", "table", PYTHONPATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    told = "".join(line[-30:] for line in run.stdout.splitlines()).replace(" ", "")
    assert "[bold]extra[/][/x]" in told


def test_the_models_of_a_broken_plugin_are_unavailable(sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "broken-vits", "broken", "import no_such_library")
    run = sinder("predict-defects", "broken_tiny", PYTHONPATH=str(tmp_path))
    assert run.returncode == 69
    assert run.stderr.startswith("sinder: error: cannot load plugin 'broken' of broken-vits: ")
    assert len(run.stderr.splitlines()) == 1


def test_only_the_plugin_that_is_named_is_imported(sinder: Sinder, tmp_path: Path, small: Path) -> None:
    install(tmp_path, "other-vits", "other", GOOD)
    install(tmp_path, "broken-vits", "broken", "raise SystemExit(3)")
    mine = ("predict-defects", "dinov2_custom", "--weights", small, "--stage", "attention")
    run = sinder(*mine, PYTHONPATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "LOADED" not in run.stderr
    theirs = sinder("predict-defects", "other_tiny", PYTHONPATH=str(tmp_path))
    assert "LOADED other_vits_module" in theirs.stderr


def test_two_plugins_of_one_name_are_a_conflict_that_names_both(sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "first-vits", "other", GOOD)
    install(tmp_path, "second-vits", "other", GOOD)
    run = sinder("backbones", PYTHONPATH=str(tmp_path))
    assert run.returncode == 78
    assert "first-vits" in run.stderr
    assert "second-vits" in run.stderr
    assert run.stderr.startswith("sinder: error: two plugins are called 'other': ")
    assert (len(run.stderr.splitlines()), run.stdout) == (1, "")


def test_the_longest_plugin_name_owns_a_model(sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "longer-vits", "demo_vit", GOOD)
    run = sinder("predict-defects", "demo_vit_tiny", PYTHONPATH=str(tmp_path))
    assert "LOADED longer_vits_module" in run.stderr
    assert run.returncode != 0
