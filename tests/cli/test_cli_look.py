"""A few photographs as plain arguments of `sinder analyze`: five lines, and one picture."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import struct
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sinder_cli import AnalyzeRequest, AnalyzeSettings, ModelRequest, api
from sinder_cli.cli.look import how_to_repair, name_of
from sinder_cli.cli.main import main

Size = tuple[int, int, int, int]  # of a terminal: rows, columns, and both in pixels
DEVICE_ATTRIBUTES = b"\x1b[c"  # the question what a terminal can do
WITH_SIXEL = b"\x1b[?62;4;6c"


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


@pytest.fixture
def here(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two photographs in the working directory."""
    monkeypatch.chdir(tmp_path)
    found = sorted(photos.iterdir())[:2]
    return [str(Path(shutil.copy(path, tmp_path)).name) for path in found]


@pytest.fixture
def planted_model(small: Path) -> list[str]:
    return ["dinov2_custom", "--weights", str(small)]


def test_one_photograph_is_answered_in_five_lines_and_a_picture(
    here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("analyze", "demo_vit", here[0], "--format", "table") == 0
    title, what, why, gain, advice, command, picture = capsys.readouterr().out.splitlines()
    assert title == "demo_vit, 1 photograph"
    assert "patch tokens stand out, from block" in what
    assert "× the median, at block" in what
    assert why.startswith("  The weights predict them: ")
    assert gain.startswith("  Without its outlying tokens")
    assert advice.startswith("  Repair: ")
    assert command.split()[-2:] == ["--data", "."]
    path = Path("sinder-looks", f"{Path(here[0]).stem}-demo_vit.png")
    assert picture.startswith(f"Picture: {path} ")
    with Image.open(path) as image:
        assert image.text["Description"].startswith("Each row: the photograph")  # type: ignore[attr-defined]
        assert np.asarray(image).std() > 10


def test_the_command_that_is_advised_is_one(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert called("analyze", "demo_vit", here[0], "--format", "table") == 0
    command = capsys.readouterr().out.splitlines()[-2].split()
    at = command.index("repair")
    assert called(*command[at:], "--dry-run", "--format", "json") == 0
    assert '"model": "demo_vit"' in capsys.readouterr().out


def test_it_names_the_same_weights() -> None:
    model = ModelRequest("dinov2_custom", Path("my vit.pth"), heads=6, branch="teacher")
    command = how_to_repair(AnalyzeRequest(model, ["photos/a.jpg"]))
    options = "--weights 'my vit.pth' --heads 6 --branch teacher --data photos"
    assert command.endswith(f" repair dinov2_custom {options}")


def test_several_models_of_any_sizes_are_answered_one_by_one(
    here: list[str], planted_model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    picture = Path("deep", "both.png")
    given = ["--compare", "demo_vit", "--compare", "demo_vit_clean", "--picture", str(picture), "--format", "table"]
    assert called("analyze", *planted_model, *here, *given) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if "photographs" in line and line[0] != " "]
    assert titles == [f"{name}, 2 photographs" for name in ("dinov2_custom", "demo_vit", "demo_vit_clean")]
    with Image.open(picture) as image:
        assert image.height > 6 * 200  # a row for each photograph and model


def test_a_healthy_model_needs_no_repair(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert called("analyze", "demo_vit_clean", here[0], "--format", "table", "--fail-on-defects") == 0
    printed = capsys.readouterr().out
    assert "Healthy: no token is outlying in any block" in printed
    assert "Repair: these photographs show nothing to train on; others may." in printed
    assert "sinder repair" not in printed


def test_defects_fail_where_asked(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert called("analyze", "demo_vit", here[0], "--format", "table", "--fail-on-defects") == 1
    assert "sinder: error: demo_vit fails: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--picture", "look.jpg", "--format", "table"], "cannot write look.jpg: the picture is a PNG"),
        (["--picture", "look.png", "--format", "json"], "no picture to save"),
        (["--picture", "look.png", "--data", "."], "no picture to save"),
        (["--picture", "look.png", "--out", "look", "--format", "table"], "no picture to save"),
        (["--compare", "demo_vit", "--compare", "demo_vit_clean", "--format", "json"], "cannot compare with several"),
        (
            ["--compare", "demo_vit", "--compare", "demo_vit_clean", "--compare-heads", "3", "--format", "table"],
            "no second",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    here: list[str], given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("analyze", "demo_vit", here[0], *given) == 2
    assert message in capsys.readouterr().err
    assert not Path("look.png").exists()


@pytest.mark.parametrize("places", [["."], ["photographs.txt"]])
def test_a_folder_or_a_list_gets_the_table(
    here: list[str], places: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photographs.txt").write_text("\n".join(here))
    assert called("analyze", "demo_vit", *places, "--format", "table", "--image-size", "112") == 0
    assert "largest norm over blocks, log" in capsys.readouterr().out
    assert not Path("sinder-looks").exists()


def test_the_maps_are_those_of_the_block_that_is_named(here: list[str]) -> None:
    look = api.look([AnalyzeRequest("demo_vit", [here[0]])])
    assert look.answers[0].repair
    assert look.answers[0].fails
    assert look.picture.shape[1] > 5 * 200  # photograph, norm, components, cosine and attention beside each other


@pytest.mark.slow
def test_a_terminal_that_shows_pictures_is_shown_one(here: list[str], environment: dict[str, str]) -> None:
    pytest.importorskip("textual_image", reason="the extra terminal is not installed")
    command = [sys.executable, "-m", "sinder_cli", "analyze", "demo_vit", here[0]]
    printed = spoken(command, environment, {DEVICE_ATTRIBUTES: WITH_SIXEL})
    assert b"\x1bP" in printed  # begins a picture in sixels
    assert b"Picture: sinder-looks/" in printed


@pytest.mark.slow
def test_a_terminal_that_tells_no_size_costs_the_picture_alone(here: list[str], environment: dict[str, str]) -> None:
    pytest.importorskip("textual_image", reason="the extra terminal is not installed")
    command = [sys.executable, "-m", "sinder_cli", "analyze", "demo_vit", here[0]]
    printed = spoken(command, environment, {DEVICE_ATTRIBUTES: WITH_SIXEL}, size=(0, 0, 0, 0))
    assert b"Picture: sinder-looks/" in printed


@pytest.mark.slow
def test_another_terminal_is_shown_words_alone(here: list[str], environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "sinder_cli", "analyze", "demo_vit", here[0]]
    printed = spoken(command, environment, {})
    assert b"\x1bP" not in printed
    assert b"Picture: sinder-looks/" in printed


def spoken(
    command: list[str], environment: dict[str, str], answers: dict[bytes, bytes], size: Size = (40, 100, 1000, 800)
) -> bytes:
    """What a command prints on a terminal of this size that answers these questions."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", *size))
        os.execvpe(command[0], command, environment | {"COLUMNS": "100", "LINES": "40"})
    printed, answered, end = b"", set(), time.monotonic() + 120
    while time.monotonic() < end:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            more = os.read(terminal, 65536)
        except OSError:  # it has ended
            break
        if not more:
            break
        printed += more
        for question in answers.keys() - answered:
            if question in printed:
                os.write(terminal, answers[question])
                answered.add(question)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, printed
    return printed


def test_few_tokens_on_a_photograph_are_enough(here: list[str]) -> None:
    look = api.look([AnalyzeRequest("demo_vit", [here[0]])])
    given = api.look([AnalyzeRequest("demo_vit", [here[0]], AnalyzeSettings(min_tokens=10_000))])
    assert look.answers[0].fails
    assert not given.answers[0].fails  # what was asked for holds


def test_the_pictures_of_a_run_are_no_photographs_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text("{}")
    asked = AnalyzeRequest("demo_vit", [str(tmp_path / "image.jpg"), "photos/a.jpg", "more/b.jpg"])
    assert how_to_repair(asked).endswith(" repair demo_vit --data photos --data more")


def test_two_checkpoints_of_one_model_have_two_pictures() -> None:
    names = [
        name_of([AnalyzeRequest(ModelRequest("dinov2_custom", Path(f"{stem}.pth")), ["a.jpg"])])
        for stem in ("x", "y z")
    ]
    assert names == ["a-dinov2_custom-x.png", "a-dinov2_custom-y-z.png"]
