"""A few photographs as plain arguments of `sinder analyze`: five lines, and one picture."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import struct
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sinder_cli import AnalyzeRequest, AnalyzeSettings, ModelRequest, api
from sinder_cli.cli.look import how_to_repair, is_look, name_of
from sinder_cli.cli.main import main
from sinder_cli.cli.terminal import QUESTION, may_show_pictures, protocol_of, told_protocol

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
    assert "cls would move by " in gain
    assert advice.startswith(("  Repair: yes", "  Repair: it would help little"))
    assert command.split()[-2:] == ["--data", "."]
    (path,) = Path("sinder-looks").iterdir()
    assert path.name.startswith(f"{Path(here[0]).stem}-demo_vit")
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
    assert "  Repair: no, these photographs show nothing to train on; others may." in printed
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
        (["--figure-formats", "svg"], "cannot write svg: the picture of photographs is a PNG"),
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


def test_through_a_pipe_they_are_answered_the_same(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert called("analyze", "demo_vit", here[0]) == 0  # standard output is no terminal here
    printed = capsys.readouterr().out
    assert printed.startswith("demo_vit, 1 photograph\n")
    assert list(Path("sinder-looks").iterdir())


def test_a_script_that_asks_for_json_gets_it_and_no_picture(
    here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("analyze", "demo_vit", here[0], "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 1
    assert not Path("sinder-looks").exists()


def test_several_processes_share_the_images_out(here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_look(here, None, AnalyzeSettings())
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert not is_look(here, None, AnalyzeSettings())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--format", "table"], "9 photographs: a table; up to 8 get a picture"),
        ([], "9 photographs: a JSON document; up to 8 get a picture"),
        (["--format", "json"], None),
        (["--data", "photo"], None),
    ],
)
def test_more_photographs_than_a_picture_has_are_told(
    here: list[str], given: list[str], told: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [shutil.copy(here[0], f"{number}.png") for number in range(9)]
    Path("photo").mkdir()
    shutil.copy(here[0], "photo")
    assert called("analyze", "demo_vit_clean", *named, *given, "--image-size", "80", "--limit", "1") == 0
    printed = capsys.readouterr().err
    assert (f"sinder: {told}\n" in printed) if told else ("get a picture" not in printed)
    assert not Path("sinder-looks").exists()


@pytest.mark.parametrize("words", [["photo.png"], ["photo.png", "demo_vit"]])
def test_a_photograph_before_the_model_is_told(
    here: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path(here[0]).rename("photo.png")
    assert called("analyze", *words) == 2
    assert "this is a file: the model comes first, as in `sinder analyze dinov2_vits14 photo.png`" in (
        capsys.readouterr().err
    )


def test_a_missing_photograph_is_no_matter_of_data(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert called("analyze", "demo_vit", here[0], "nothing.jpg") == 66
    told = capsys.readouterr().err
    assert "cannot read images from nothing.jpg: there is no such file or folder; check the name" in told


def test_a_skipped_file_gives_no_folder_to_train_on(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("r1").mkdir()
    Path("r1", "README.md").write_text("no image")
    assert called("analyze", "demo_vit", here[0], "r1/README.md") == 0
    printed = capsys.readouterr()
    assert "demo_vit, 1 photograph, 1 skipped" in printed.out
    assert printed.out.splitlines()[-2].endswith(" repair demo_vit --data .")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo, of one step."""
    folder = tmp_path_factory.mktemp("repaired") / "run"
    called("repair", "demo_vit", "--max-steps", "1", "--scan-images", "8", "--out", str(folder))  # improves nothing
    return folder


def test_the_look_of_a_run_is_its_own(here: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, "sinder-runs/demo_vit")
    assert called("analyze", "demo_vit", here[0]) == 0
    capsys.readouterr()
    for _ in range(2):  # the second replaces the picture of the first
        assert called("analyze", "sinder-runs/demo_vit", here[0]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "demo_vit (run demo_vit), 1 photograph"
    stem = Path(here[0]).stem
    names = sorted(re.sub(r"-[0-9a-f]{8}\.", ".", path.name) for path in Path("sinder-looks").iterdir())
    assert names == [f"{stem}-demo_vit-run.png", f"{stem}-demo_vit.png"]


def test_runs_of_one_name_are_told_by_their_folders(here: list[str], run: Path) -> None:
    for place in ("a", "b"):
        shutil.copytree(run, f"{place}/r")
    look = api.look([AnalyzeRequest(f"{place}/r", [here[0]]) for place in ("a", "b")])
    assert [answer.title.split(",")[0] for answer in look.answers] == ["demo_vit (run a/r)", "demo_vit (run b/r)"]


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


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({"TERM": "foot"}, True),
        ({"TERM": "xterm-kitty"}, True),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, True),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, True),  # over ssh
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "230800"}, True),
        ({"TERM": "xterm-256color", "SINDER_PICTURES": "1"}, True),
        ({"TERM": "tmux-256color", "SINDER_PICTURES": "1"}, True),
        ({"TERM": "foot", "SINDER_PICTURES": "0"}, False),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, False),
        ({"TERM": "xterm-256color"}, False),
        ({"TERM": "dumb", "KITTY_WINDOW_ID": "1", "SINDER_PICTURES": "1"}, False),
        ({"KITTY_WINDOW_ID": "1"}, False),
    ],
)
def test_a_terminal_is_asked_that_is_known_to_show_pictures(variables: dict[str, str], asked: bool) -> None:
    assert may_show_pictures(variables) == asked


@pytest.mark.parametrize(
    ("answer", "protocol"),
    [
        (WITH_SIXEL, "sixel"),
        (b"\x1b_Gi=31;OK\x1b\\" + WITH_SIXEL, "sixel"),
        (b"\x1b_Gi=31;OK\x1b\\\x1b[?62;c", "kitty"),
        (b"\x1b_Gi=31;EINVAL:no\x1b\\\x1b[?62;c", None),
        (b"\x1b[?64;1;2c", None),
        (b"", None),
    ],
)
def test_what_a_terminal_answers_is_understood(answer: bytes, protocol: str | None) -> None:
    assert told_protocol(answer) == protocol


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Both ends of a terminal, of which this process is in the foreground: the user's, and the program's."""
    users, programs = pty.openpty()
    monkeypatch.setattr(os, "tcgetpgrp", lambda _: os.getpgrp())
    yield users, programs
    os.close(users)
    os.close(programs)


def left_over(programs: int) -> bool:
    """Return True if anything would be read as typed input: what has no newline too."""
    tty.setcbreak(programs, termios.TCSANOW)
    return bool(select.select([programs], [], [], 0.1)[0])


def test_an_answer_that_comes_late_is_not_left_as_typed_input(line: tuple[int, int]) -> None:
    users, programs = line
    late = threading.Timer(0.4, os.write, (users, b"\x1b_Gi=31;OK\x1b\\" + WITH_SIXEL))
    late.start()
    assert protocol_of(programs, programs) == "sixel"
    late.join()
    assert os.read(users, 100) == QUESTION
    assert not left_over(programs)


def test_a_terminal_that_answers_half_leaves_nothing_and_is_as_before(line: tuple[int, int]) -> None:
    users, programs = line
    before = termios.tcgetattr(programs)
    half = threading.Timer(0.1, os.write, (users, b"\x1b[?62;"))
    half.start()
    assert protocol_of(programs, programs, patience=0.3) is None
    half.join()
    assert termios.tcgetattr(programs) == before
    assert not left_over(programs)


def test_what_was_typed_ahead_is_not_taken_for_an_answer(line: tuple[int, int]) -> None:
    users, programs = line
    os.write(users, b"ls")
    time.sleep(0.1)
    assert protocol_of(programs, programs) is None
    assert left_over(programs)
    assert os.read(programs, 10) == b"ls"


def test_nothing_is_asked_in_the_background(line: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    users, programs = line
    monkeypatch.setattr(os, "tcgetpgrp", lambda _: 1)
    assert protocol_of(programs, programs) is None
    assert not select.select([users], [], [], 0)[0]


@pytest.mark.slow
def test_a_terminal_that_shows_pictures_is_shown_one(here: list[str], environment: dict[str, str]) -> None:
    pytest.importorskip("textual_image", reason="the extra terminal is not installed")
    command = [sys.executable, "-m", "sinder_cli", "analyze", "demo_vit", here[0]]
    printed = spoken(command, environment | {"TERM": "foot"}, {DEVICE_ATTRIBUTES: WITH_SIXEL})
    assert b"\x1bP" in printed  # begins a picture in sixels
    assert printed.count(DEVICE_ATTRIBUTES) == 1  # the library did not ask again
    assert b"Picture: sinder-looks/" in printed


@pytest.mark.slow
def test_a_terminal_that_tells_no_size_is_not_asked_for_it(here: list[str], environment: dict[str, str]) -> None:
    pytest.importorskip("textual_image", reason="the extra terminal is not installed")
    command = [sys.executable, "-m", "sinder_cli", "analyze", "demo_vit", here[0]]
    printed = spoken(command, environment | {"TERM": "foot"}, {DEVICE_ATTRIBUTES: WITH_SIXEL}, size=(40, 100, 0, 0))
    assert b"\x1b[16t" not in printed
    assert b"\x1bP" in printed
    assert b"Picture: sinder-looks/" in printed


@pytest.mark.slow
def test_another_terminal_is_shown_words_alone(here: list[str], environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "sinder_cli", "analyze", "demo_vit", here[0]]
    printed = spoken(command, environment | {"TERM": "dumb"}, {DEVICE_ATTRIBUTES: WITH_SIXEL})
    assert not any(asked in printed for asked in (b"\x1bP", b"\x1b_G", DEVICE_ATTRIBUTES))
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


def named(*given: str, model: str | ModelRequest = "demo_vit", **settings: object) -> str:
    return name_of([AnalyzeRequest(model, given or ["a.jpg"], AnalyzeSettings.model_validate(settings))])


def test_what_a_name_tells_needs_no_hash() -> None:
    assert named() == "a-demo_vit.png"
    assert named(str(Path("a.jpg").absolute())) == "a-demo_vit.png"
    assert named(device="cpu", workers=0) == "a-demo_vit.png"  # they change no picture
    assert named(model="hf/owner/vit").startswith("a-vit-")


def test_files_of_different_things_have_different_names() -> None:
    weights = [ModelRequest("dinov2_custom", Path(path)) for path in ("x.pth", "y/x.pth", "y z.pth")]
    adapters = [ModelRequest("demo_vit", adapter=Path(path)) for path in ("a/r.safetensors", "b/r.safetensors")]
    names = [
        named(),
        named("b/a.jpg"),
        named("c/a.jpg"),
        named("a.png"),
        named("a.jpg", "b.jpg"),
        named("a.jpg", "c.jpg"),
        named(image_size=112),
        named(image_size=224),
        named(model="timm/vit"),
        named(model="hf/owner/vit"),
        named(model=ModelRequest("demo_vit", heads=3)),
        *(named(model=model) for model in (*weights, *adapters)),
        name_of([AnalyzeRequest(model, ["a.jpg"]) for model in ("demo_vit", "demo_vit_clean")]),
        *(
            name_of([AnalyzeRequest(model, ["a.jpg"]) for model in ("demo_vit", "demo_vit", "demo_vit", last)])
            for last in ("demo_vit", "demo_vit_clean")
        ),
    ]
    assert len(set(names)) == len(names)
    assert all(len(name) < 120 for name in names)
    assert named(model=weights[2]).startswith("a-dinov2_custom-y-z-")
