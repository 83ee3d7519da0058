"""Help, manual pages and documents say what the commands do, and asking for help costs nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import sinder_cli
from sinder_cli import __version__, errors
from sinder_cli.cli.help import EXAMPLES, METAVARS, OTHERS, PANEL_OF, PANELS, dressed
from sinder_cli.cli.main import SUBCOMMANDS, command, whole_tree
from sinder_cli.cli.manpage import DESCRIPTIONS, EXIT_CODES, FILES, SEE_ALSO, pages

Sinder = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]
COMMANDS = (
    "analyze", "backbones", "check-backbone", "demo", "doctor", "evaluate", "export", "man", "predict-defects",
    "repair", "runs",
)  # fmt: skip
HEAVY = {"torch", "matplotlib", "numpy", "PIL", "transformers", "safetensors", "sinder_plugins"}


def options_of(name: str) -> list[str]:
    """Every long option of a subcommand."""
    tree: Any = whole_tree()
    both = [flag for parameter in tree.commands[name].params for flag in (*parameter.opts, *parameter.secondary_opts)]
    return [flag for flag in both if flag.startswith("--")]


def shown_by(flag: str, name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a subcommand prints for `-h`, `--help` or `--help-all`."""
    tree: Any = whole_tree()
    tree.main(args=[name, flag], prog_name="sinder", standalone_mode=False)
    return capsys.readouterr().out


def test_these_are_the_commands() -> None:
    tree: Any = whole_tree()
    assert sorted(tree.commands) == list(COMMANDS)


def test_a_command_has_the_same_summary_before_it_is_loaded() -> None:
    loaded: Any = whole_tree()
    summaries = {name: each.help.split("\n\n")[0] for name, each in loaded.commands.items()}
    assert {name: each.help for name, each in command().commands.items()} == summaries
    assert list(SUBCOMMANDS) == list(summaries)


def test_help_loads_no_command_and_nothing_of_what_they_need(environment: dict[str, str]) -> None:
    """It has about a tenth of the time that torch takes to load."""
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr))\n"
        "from sinder_cli.cli.main import main\nmain(['--help'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    modules = set(run.stderr.split())
    assert "pydantic" not in modules
    assert {name for name in modules if name.startswith("sinder_cli.cli.")} == {
        "sinder_cli.cli.help",
        "sinder_cli.cli.main",
    }


def test_every_public_name_is_found() -> None:
    found = {name: getattr(sinder_cli, name) for name in sinder_cli.__all__}
    assert not [name for name, value in found.items() if value is None]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        sinder_cli.nothing  # noqa: B018


@pytest.mark.parametrize("arguments", [["--help"], ["repair", "--help"], ["--version"], []])
def test_asking_for_help_imports_nothing_heavy(arguments: list[str], environment: dict[str, str]) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('LOADED', *sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr))\n"
        "from sinder_cli.cli.main import main\n"
        f"main({arguments!r})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0
    assert run.stderr == "LOADED\n"
    assert "\x1b" not in run.stdout
    assert __version__ in run.stdout if arguments == ["--version"] else "Usage" in run.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option_within_80_columns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = shown_by("--help-all", name, capsys)
    assert max(map(len, shown.splitlines())) <= 80
    assert [option for option in options_of(name) if option not in shown] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_an_option_takes_in_words(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.findall(r"<(?:float|int|str|bool|list|path|file)\b.*", shown_by("--help-all", name, capsys)) == []


def test_every_metavar_is_of_an_option() -> None:
    tree: Any = whole_tree()
    assert METAVARS.keys() <= {parameter.name for each in tree.commands.values() for parameter in each.params}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_one_group_and_help_comes_last(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tree: Any = whole_tree()
    options = [each for each in tree.commands[name].params if each.param_type_name == "option"]
    assert [each.name for each in options if each.rich_help_panel != PANEL_OF.get(each.name)] == []
    groups = re.findall(r"^╭─ (.+?) ─+╮$", shown_by("-h", name, capsys), re.MULTILINE)
    assert groups[-1] == "Help"
    assert "Options" not in groups
    listed = " ".join(names for both in PANELS.values() for names in both).split()
    assert len(listed) == len(set(listed))


def test_an_option_without_a_group_is_among_others() -> None:
    app = typer.Typer(add_completion=False)

    @app.command()
    def command(new: bool = False) -> None: ...

    found: Any = dressed(typer.main.get_command(app), "man")
    assert [(each.name, each.rich_help_panel) for each in found.params] == [
        ("new", OTHERS), ("help", "Help"), ("help_all", "Help"),
    ]  # fmt: skip


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_short_help_shows_common_options_and_names_the_other_one(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = shown_by(flag, "repair", capsys)
    assert {"--data", "--max-steps", "--resume"} <= {*re.findall(r"--[a-z-]+", shown)}
    assert "--momentum" not in shown
    count = len({option for option in options_of("repair") if "help" not in option})
    assert f"Show all {count} options." in shown
    assert len(shown.splitlines()) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_is_a_line_with_its_explanation_above(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(shown_by("-h", name, capsys).split())
    for words, example in EXAMPLES[name]:
        assert f"# {words} {example}" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_on_its_manual_page(name: str) -> None:
    page = pages()[f"sinder-{name}.1"].replace("\\-", "-")
    assert [option for option in options_of(name) if not re.search(rf"^\.B .*{option}\b", page, re.MULTILINE)] == []


def test_the_stored_manual_pages_are_those_of_the_command_tree() -> None:
    stored = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "man").iterdir()}
    assert stored == pages(), "run `make man`"


def test_the_main_page_lists_every_command_and_exit_code() -> None:
    page = pages()["sinder.1"]
    for name in COMMANDS:
        assert f".BR sinder\\-{name.replace('-', chr(92) + '-')} (1)" in page
    for code in EXIT_CODES:
        assert f".B {code}\n" in page


def test_the_documents_have_the_exit_codes_of_the_manual_page() -> None:
    readme = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", readme.split("| exit | means |")[1].split("\n## ")[0], re.MULTILINE)
    assert {int(code): meaning for code, meaning in rows} == EXIT_CODES
    raised = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    assert raised <= EXIT_CODES.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme(name: str) -> None:
    assert f"sinder {name}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_option_that_the_documents_use_exists() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = [line for path in documents for line in path.read_text(encoding="utf-8").splitlines()]
    used = [re.search(r"^(?:    |\$ )sinder ([a-z-]+)(.*)", line.split("  #")[0]) for line in lines]
    found = [(match[1], option) for match in used if match for option in re.findall(r"--[a-z-]+", match[2])]
    assert len(found) >= 50
    assert [(name, option) for name, option in found if option not in options_of(name)] == []


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
def test_mandoc_finds_nothing_wrong_with_any_page() -> None:
    paths = sorted(map(str, (ROOT / "man").iterdir()))
    run = subprocess.run(["mandoc", "-T", "lint", "-W", "style", *paths], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout + run.stderr) == (0, "")


SECTIONS = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "FILES", "ENVIRONMENT"]
SECTIONS += ["EXIT STATUS", "SEE ALSO"]


@pytest.mark.parametrize("name", ["sinder", *COMMANDS])
def test_a_page_has_all_its_sections_in_order(name: str) -> None:
    page = pages()["sinder.1" if name == "sinder" else f"sinder-{name}.1"]
    sections = re.findall(r"^\.SH (.+)$", page, re.MULTILINE)
    named = [each for each in SECTIONS if each != "FILES" or FILES[name]]
    assert [section for section in sections if section in SECTIONS] == named


@pytest.mark.parametrize(
    ("name", "synopsis"),
    [
        ("repair", "[OPTIONS] MODEL [PATH]..."),
        ("evaluate", "[OPTIONS] MODEL|RUN TASK..."),
        ("man", "[OPTIONS] [COMMAND]"),
    ],
)
def test_a_synopsis_has_brackets_and_dots_once(name: str, synopsis: str) -> None:
    assert f".B sinder {name}\n{synopsis}\n" in pages()[f"sinder-{name}.1"]


def test_each_page_has_its_own_description_and_files() -> None:
    tree: Any = whole_tree()
    assert {*DESCRIPTIONS} == {*SEE_ALSO} == {*FILES} - {"sinder"} == {*COMMANDS}
    assert len({*DESCRIPTIONS.values()}) == len(COMMANDS)
    assert [name for name, each in tree.commands.items() if each.help.split("\n")[0] in DESCRIPTIONS[name]] == []
    files = [tuple(each) for each in FILES.values() if each]
    assert len({*files}) == len(files)


def test_the_page_of_repair_and_the_guide_name_the_same_files_of_a_run() -> None:
    guide = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `([^`]+)` \|", guide, re.MULTILINE)
    listed = {name for name in names if "." in name or name.endswith("/")}
    elsewhere = {name for name in FILES["repair"] if name.startswith(("sinder-runs", "~"))}
    assert listed == FILES["repair"].keys() - elsewhere


def test_the_main_page_names_every_other_page_at_its_end() -> None:
    end = pages()["sinder.1"].split(".SH SEE ALSO\n")[1].replace("\\-", "-")
    named = re.findall(r"^\.BR (\S+) \((\d)\)", end, re.MULTILINE)
    assert {f"{name}.{section}" for name, section in named} == pages().keys() - {"sinder.1"}


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("name", ["sinder.1", *(f"sinder-{name}.1" for name in COMMANDS)])
def test_groff_renders_a_page_without_a_warning(name: str) -> None:
    run = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-K", "utf8", "-b", str(ROOT / "man" / name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    plain = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", run.stdout).replace("−", "-").replace("‐", "-")
    options = re.findall(r"^\.B .*?(--[a-z-]+)", pages()[name].replace("\\-", "-"), re.MULTILINE)
    assert "--help" in options
    assert [option for option in options if option not in plain] == []
