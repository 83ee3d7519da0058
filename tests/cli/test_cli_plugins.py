"""`sinder backbones`, and plugins of others: found like ours, and harmless when they are broken."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from installed import install

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
    assert row == ["dinov2_vits14_reg", "22.1", "M", "14", "5"]
    assert any(line.split()[0] == "timm/eva02_large_patch14_448.mim_m38m_ft_in22k_in1k" for line in lines)  # whole


def test_a_foreign_plugin_is_found_by_its_entry_point(sinder: Sinder, tmp_path: Path) -> None:
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
    assert "needy needs what is not installed: no_such_library, no_such_package.part" in table
    assert "needy comes from needy-vits" in table
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(("text", "word"), BREAKAGES.values(), ids=BREAKAGES)
def test_a_broken_plugin_is_named_and_spoils_no_other(text: str, word: str, sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "broken-vits", "broken", text)
    run = sinder("backbones", PYTHONPATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    broken = [row for row in rows if row["plugin"] == "broken"]
    assert len(broken) == 1
    assert (broken[0]["available"], broken[0]["name"], broken[0]["distribution"]) == (False, None, "broken-vits")
    assert word in broken[0]["problem"]
    assert "broken-vits" in broken[0]["problem"]
    assert f"sinder: warning: {broken[0]['problem']}\n" in run.stderr
    assert any(row["name"] == "demo_vit" and row["available"] for row in rows)


def test_the_table_shows_a_problem_letter_by_letter(sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "broken-vits", "broken", BREAKAGES["brackets in its complaint"][0])
    run = sinder("backbones", "--format", "table", PYTHONPATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "[bold]extra[/] [/x]" in run.stdout.replace("\n", "")


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


HANGS = "import time\ntime.sleep(600)"


@pytest.mark.slow
def test_a_plugin_that_hangs_is_given_up_after_ten_seconds(sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "hanging-vits", "hanging", HANGS)
    install(tmp_path, "other-vits", "other", GOOD)
    began = time.monotonic()
    run = sinder("backbones", PYTHONPATH=str(tmp_path))
    assert 10 <= time.monotonic() - began < 60
    assert run.returncode == 0, run.stderr
    told = "cannot load plugin 'hanging' of hanging-vits: it hangs: it did not finish within 10 s; install or repair"
    assert told in run.stderr
    rows = json.loads(run.stdout)
    assert {"demo_vit", "dinov2_vits14", "other_tiny"} <= {row["name"] for row in rows if row["available"]}
    asked = sinder("predict-defects", "hanging_tiny", PYTHONPATH=str(tmp_path))
    assert (asked.returncode, asked.stdout, len(asked.stderr.splitlines())) == (69, "", 1)
    assert told in asked.stderr


def test_a_plugin_that_hangs_does_not_delay_other_names(sinder: Sinder, tmp_path: Path, small: Path) -> None:
    install(tmp_path, "hanging-vits", "hanging", HANGS)
    began = time.monotonic()
    run = sinder("predict-defects", "dinov2_custom", "--weights", small, PYTHONPATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    run = sinder("predict-defects", "dinov2_vits41", PYTHONPATH=str(tmp_path))
    assert (run.returncode, "did you mean dinov2_vits14" in run.stderr) == (2, True)
    run = sinder("predict-defects", "unheard_of", PYTHONPATH=str(tmp_path))
    assert (run.returncode, "`sinder backbones` lists the models" in run.stderr) == (2, True)
    assert time.monotonic() - began < 10


def test_what_a_plugin_prints_does_not_spoil_the_document(sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "loud-vits", "loud", GOOD.replace(', file=__import__("sys").stderr', ""))
    run = sinder("backbones", PYTHONPATH=str(tmp_path))
    assert "loud_tiny" in {row["name"] for row in json.loads(run.stdout)}
    assert "LOADED loud_vits_module" in run.stderr


EXITS = """
from sinder_cli import Listing, hookimpl

@hookimpl
def sinder_listing():
    return [Listing("{name}_tiny", "")]

@hookimpl
def sinder_weights(request):
    raise SystemExit(0)
"""


def test_a_plugin_that_exits_when_it_is_asked_is_unavailable(sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "exit-vits", "exit", EXITS)
    run = sinder("predict-defects", "exit_tiny", PYTHONPATH=str(tmp_path))
    assert (run.returncode, run.stdout) == (69, "")
    assert run.stderr == (
        "sinder: error: plugin 'exit' of exit-vits failed at 'exit_tiny': SystemExit: 0; tell its author\n"
    )


@pytest.mark.parametrize("arguments", ["backbones", "predict-defects other_tiny"])
def test_two_plugins_of_one_name_are_a_conflict_naming_both(arguments: str, sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "first-vits", "other", GOOD)
    install(tmp_path, "second-vits", "other", GOOD)
    run = sinder(*arguments.split(), PYTHONPATH=str(tmp_path))
    assert (run.returncode, run.stdout) == (78, "")
    why = "provided by first-vits and second-vits; uninstall one of them"
    assert run.stderr == f"sinder: error: two plugins are called 'other': {why}\n"


def test_even_where_both_name_one_module(sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "first-vits", "other", GOOD)
    install(tmp_path, "second-vits", "other", GOOD)
    entry_points = tmp_path / "second_vits-1.0.dist-info" / "entry_points.txt"
    entry_points.write_text(entry_points.read_text().replace("second", "first"))
    assert sinder("predict-defects", "other_tiny", PYTHONPATH=str(tmp_path)).returncode == 78


def test_a_conflict_of_others_harms_no_command(sinder: Sinder, tmp_path: Path, small: Path) -> None:
    install(tmp_path, "first-vits", "other", GOOD)
    install(tmp_path, "second-vits", "other", GOOD)
    mine = ("predict-defects", "dinov2_custom", "--weights", small, "--stage", "attention")
    assert sinder(*mine, PYTHONPATH=str(tmp_path)).returncode == 0
    assert sinder("predict-defects", "demo_vitt", PYTHONPATH=str(tmp_path)).returncode == 2


def test_a_plugin_with_a_built_in_name_is_a_conflict(sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "later-vits", "demo", GOOD)
    run = sinder("predict-defects", "demo_vit", PYTHONPATH=str(tmp_path))
    assert run.returncode == 78
    assert "later-vits and sinder-cli" in run.stderr
    assert "LOADED" not in run.stderr


def test_a_longer_name_takes_no_built_in_models(sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "longer-vits", "demo_vit", GOOD)
    run = sinder("predict-defects", "demo_vit", "--stage", "attention", PYTHONPATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    listed = sinder("backbones", PYTHONPATH=str(tmp_path))
    assert "LOADED" not in run.stderr + listed.stderr
    (row,) = [row for row in json.loads(listed.stdout) if row["plugin"] == "demo_vit"]
    assert row["problem"] == (
        "cannot use plugin 'demo_vit' of longer-vits: names that begin with 'demo' belong to plugin 'demo' of"
        " sinder-cli; rename it"
    )


def test_the_longest_plugin_name_owns_a_model(sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "shorter-vits", "other", GOOD)
    install(tmp_path, "longer-vits", "other_vit", GOOD)
    run = sinder("predict-defects", "other_vit_tiny", PYTHONPATH=str(tmp_path))
    assert "LOADED longer_vits_module" in run.stderr
    assert "shorter" not in run.stderr
    assert run.returncode != 0


def test_the_environment_limits_what_may_load(sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "other-vits", "other", GOOD)
    install(tmp_path, "third-vits", "third", GOOD)
    run = sinder("backbones", PYTHONPATH=str(tmp_path), SINDER_PLUGINS="demo, other,")
    assert {row["plugin"] for row in json.loads(run.stdout)} == {"demo", "other"}
    assert "third" not in run.stderr
    run = sinder("predict-defects", "third_tiny", PYTHONPATH=str(tmp_path), SINDER_PLUGINS="demo,other")
    assert run.returncode == 69
    why = "SINDER_PLUGINS does not name it; add it to SINDER_PLUGINS"
    assert run.stderr == f"sinder: error: cannot load plugin 'third' of third-vits: {why}\n"
    everything = json.loads(sinder("backbones", PYTHONPATH=str(tmp_path), SINDER_PLUGINS="").stdout)
    assert {row["plugin"] for row in everything} >= {"demo", "dinov2", "other", "third"}


def test_a_conflict_can_be_left_out(sinder: Sinder, tmp_path: Path) -> None:
    install(tmp_path, "first-vits", "other", GOOD)
    install(tmp_path, "second-vits", "other", GOOD)
    run = sinder("backbones", PYTHONPATH=str(tmp_path), SINDER_PLUGINS="demo,dinov2")
    assert run.returncode == 0, run.stderr


def test_a_plugin_that_the_environment_names_in_vain_is_reported(sinder: Sinder) -> None:
    run = sinder("backbones", SINDER_PLUGINS="demo,dinov3")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(
        "sinder: error: SINDER_PLUGINS names an unknown plugin: no plugin 'dinov3' is installed; there are demo, dinov2"
    )
