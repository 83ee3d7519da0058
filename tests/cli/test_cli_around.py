"""What stands around the main commands: runs, doctor, man, demo, filters, groups and examples in the help."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sinder_cli import diagnosis
from sinder_cli.cli.help import EXAMPLES, PANEL_OF
from sinder_cli.cli.main import SUBCOMMANDS, main, whole_tree
from sinder_cli.cli.options import complete_model
from sinder_cli.diagnosis import Finding

Sinder = Callable[..., subprocess.CompletedProcess[str]]


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert called(*arguments, "--format", "json") == 0
    return json.loads(capsys.readouterr().out)


def run_folder(place: Path, verdict: str | None, after: int = 0) -> None:
    """The files of a run that its listing reads."""
    place.mkdir(parents=True)
    config = {"model": "demo_vit", "call": {"model": "demo_vit"}}
    config |= {part: {} for part in ("weights", "images", "settings", "versions")}
    (place / "config.json").write_text(json.dumps(config))
    (place / "metrics.jsonl").write_text("")
    if verdict is None:
        return
    counts = {"before": {"tokens": 36}, "after": {"tokens": after}}
    fidelity = {"to_inpainted": {"after": {"cls": 0.9999}}}
    summary = {"model": "demo_vit", "verdict": verdict, "defects": counts, "fidelity": fidelity, "steps": 8}
    (place / "summary.json").write_text(json.dumps(summary))


def test_runs_are_listed_with_their_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path / "a", "repaired")
    run_folder(tmp_path / "deep" / "b", "improved", after=3)
    run_folder(tmp_path / "c", None)
    run_folder(tmp_path / "d", "repaired")
    (tmp_path / "d" / "summary.json").write_text("{")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "config.json").write_text("{}")  # of something else
    found = {Path(each["path"]).name: each for each in printed(capsys, "runs", str(tmp_path))}
    assert {name: each["verdict"] for name, each in found.items()} == {
        "a": "repaired", "b": "improved", "c": "unfinished", "d": "unreadable",
    }  # fmt: skip
    assert (found["b"]["outliers_before"], found["b"]["outliers_after"]) == (36, 3)
    assert found["a"]["cls_to_inpainted"] == 0.9999
    assert called("runs", str(tmp_path), "--format", "table") == 0
    assert "36 → 3" in capsys.readouterr().out


@pytest.mark.parametrize(("folder", "words"), [("gone", "there is no such folder"), ("empty", "no runs in")])
def test_no_runs_end_with_a_line(folder: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert called("runs", str(tmp_path / folder)) == 66
    assert words in capsys.readouterr().err


def test_a_real_run_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--max-steps", "1", "--eval-images", "2", "--scan-images", "2", "--format", "json"]
    called("repair", "demo_vit", "--out", str(tmp_path / "run"), *few)
    capsys.readouterr()
    (found,) = printed(capsys, "runs", str(tmp_path))
    assert (found["model"], found["steps"]) == ("demo_vit", 1)
    assert found["verdict"] not in ("unfinished", "unreadable")


def test_the_doctor_names_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    found = {(each["subject"], each["name"]): each["found"] for each in printed(capsys, "doctor")}
    assert found["plugins", "dinov2"] == "9 models of sinder-cli"
    assert found["attention", "eager"] == "can be used"
    assert "usable, torch takes" in found["machine", "cores"]
    assert ("versions", "safetensors") in found


def test_the_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(diagnosis, "LIBRARIES", {"not-a-library": "everything", "nor-this": "photographs"})
    found = [each for each in diagnosis.diagnosis() if each.subject == "versions"][3:]
    assert found == [
        Finding("versions", "not-a-library", "not installed: everything", True),
        Finding("versions", "nor-this", "not installed: photographs", False),
    ]
    assert called("doctor", "--format", "table") == 69
    assert "not installed: everything" in capsys.readouterr().out


def test_a_manual_page_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("man", "repair") == 0
    page = capsys.readouterr().out
    for section in ("NAME", "SYNOPSIS", "OPTIONS", "EXAMPLES", "FILES", "ENVIRONMENT", "EXIT STATUS", "SEE ALSO"):
        assert f".SH {section}\n" in page
    assert called("man", "nothing") == 2
    assert "there are analyze, backbones" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_tells_the_story_and_what_comes_next(sinder: Sinder, tmp_path: Path) -> None:
    run = sinder("demo", "--out", str(tmp_path / "demo"))
    assert run.returncode == 0, run.stderr
    assert "outlying tokens 54 → 0" in run.stdout
    assert f"report: {tmp_path / 'demo' / 'report.html'}" in run.stdout
    assert (tmp_path / "demo" / "exported.pth").is_file()
    commands = [shlex.split(line) for line in run.stdout.splitlines() if line.startswith("  ") and "sinder_cli" in line]
    assert [words[3] for words in commands] == ["analyze", "evaluate", "runs", "backbones", "repair"]
    for _, _, _, name, *rest in commands:  # each on a line of its own, to be pasted
        assert name == "evaluate" or sinder(name, *rest, cwd=tmp_path).returncode == 0
    again = sinder("demo", "--out", str(tmp_path / "demo"))
    assert again.returncode == 0, again.stderr
    config = json.loads((tmp_path / "demo" / "config.json").read_text())
    for change in (
        {"images": config["images"] | {"given": 12}},
        {"settings": config["settings"] | {"max_steps": 6}},
        {"call": config["call"] | {"weights": "mine.pth"}},
        {"call": None},
    ):
        (tmp_path / "demo" / "config.json").write_text(json.dumps(config | change))
        refused = sinder("demo", "--out", str(tmp_path / "demo"))
        assert refused.returncode == 73
        assert "it holds a run that is no demo's" in refused.stderr
    assert (tmp_path / "demo" / "exported.pth").is_file()


def test_models_are_filtered_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    names = [each["name"] for each in printed(capsys, "backbones", "--filter", "VITS14", "--filter", "reg")]
    assert names == ["dinov2_vits14_reg"]
    assert called("backbones", "--filter", "no such") == 66
    assert "no model's name holds no such" in capsys.readouterr().err


def test_every_group_of_options_has_options() -> None:
    names = {parameter.name for each in whole_tree().commands.values() for parameter in each.params}
    assert set(PANEL_OF) <= names


@pytest.mark.parametrize("name", list(SUBCOMMANDS))
def test_help_has_groups_examples_and_a_short_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(name, "-h") == 0
    shown = capsys.readouterr().out
    assert len(EXAMPLES[name]) >= 2
    for _, example in EXAMPLES[name]:
        assert example.split(" | ")[0].split()[1] in shown
    assert "<bool>" not in shown


@pytest.mark.parametrize("name", list(SUBCOMMANDS))
def test_examples_have_options_that_there_are(name: str) -> None:
    for _, example in EXAMPLES[name]:
        program, command, *rest = shlex.split(example.split(" | ")[0])
        assert (program, command) == ("sinder", name)
        flags = {flag for parameter in whole_tree().commands[name].params for flag in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= flags


def test_models_and_runs_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run-1", "run-2", ".hidden", "dinov2_mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "run.txt").write_text("")
    assert complete_model("dinov2_vits") == ["dinov2_vits14", "dinov2_vits14_reg"]
    assert complete_model("run") == ["run-1/", "run-2/"]
    assert complete_model("dinov2_m") == ["dinov2_mine/"]
    assert "run-1/" in complete_model("")
    assert ".hidden/" not in complete_model("")
    (tmp_path / "run-1" / "deep").mkdir()
    assert complete_model("run-1/") == ["run-1/deep/"]
    assert complete_model("gone/x") == []


def test_the_shell_is_given_models(environment: dict[str, str]) -> None:
    asked = {"_SINDER_COMPLETE": "complete_bash", "COMP_WORDS": "sinder repair dinov2_vitg", "COMP_CWORD": "2"}
    program = str(Path(sys.executable).with_name("sinder"))
    run = subprocess.run([program], env=environment | asked, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["dinov2_vitg14", "dinov2_vitg14_reg"]


COMPLETING = """
import os, sys
sys.argv[0] = "sinder"
from sinder_cli.cli.main import main
try:
    main([])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("repair demo_vit --recipe p", {"paper", "polyak"}),
        ("repair demo_v", {"demo_vit", "demo_vit_clean"}),
        ("analyze demo_vit --resize s", {"short", "square"}),
        ("export run --to h", {"hf-repo"}),
        ("evaluate run kn", {"knn"}),
        ("predict-defects demo_vit --stage c", {"cumulative"}),
        ("repair demo_vit --tru", {"--trust"}),  # which the short help leaves out
        ("rep", {"repair"}),
    ],
)
def test_words_complete_in_every_shell_without_torch(
    shell: str, words: str, found: set[str], environment: dict[str, str], tmp_path: Path
) -> None:
    asked = {"_SINDER_COMPLETE": f"complete_{shell}", "COMP_WORDS": f"sinder {words}"}
    asked |= {"COMP_CWORD": str(len(words.split())), "_TYPER_COMPLETE_ARGS": f"sinder {words}"}
    asked |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    run = subprocess.run(
        [sys.executable, "-c", COMPLETING],
        capture_output=True, text=True, env=environment | asked, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert found <= set(re.findall(r"[\w-]+", run.stdout))
    assert "sgd" not in run.stdout
