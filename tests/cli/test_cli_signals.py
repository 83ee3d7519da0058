"""Signals under `nohup` and in a shell's background, where SIGHUP and SIGINT are ignored from the start."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from warm import start_children_with_default_handlers

REPAIR = "--recipe paper --keep last --max-steps {steps} --lr 0.05 --eval-images 2 --eval-every 0 --workers 1"
HANDLERS = "import signal; print([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGHUP)])"


def ignored() -> None:
    """As `nohup` leaves SIGHUP, and a shell without job control leaves SIGINT, to what they start."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def started(
    small: Path, photos: Path, environment: dict[str, str], tmp_path: Path
) -> Callable[[int], subprocess.Popen[str]]:
    """Start a repair of so many steps in `run` under these handlers, and wait for its first one."""

    def start(steps: int) -> subprocess.Popen[str]:
        model = ["dinov2_custom", "--weights", str(small), "--data", str(photos)]
        command = [sys.executable, "-m", "sinder_cli", "repair", *model, *REPAIR.format(steps=steps).split()]
        process = subprocess.Popen(
            [*command, "--out", "run"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tmp_path,
            preexec_fn=ignored,
        )
        end = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.005)
        return process

    return start


@pytest.mark.slow
def test_a_run_under_nohup_stops_with_a_checkpoint_on_sigterm(
    started: Callable[[int], subprocess.Popen[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    process = started(10_000)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (-signal.SIGTERM, "")
    *_, wrote, how, last = errors.splitlines()
    assert wrote.startswith("sinder: wrote a checkpoint after step ")
    assert last == "sinder: terminated"
    assert psutil.wait_procs(children, timeout=5)[1] == []
    again = [*shlex.split(how.removeprefix("sinder: to resume, run: ")), "--max-steps", "1"]
    refused = subprocess.run(again, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 78, refused.stderr  # the command is one, and the run is there to go on with
    assert "setting max_steps was 10000 and is 1" in refused.stderr


@pytest.mark.slow
def test_a_run_under_nohup_outlives_its_terminal(
    started: Callable[[int], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = started(6)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)  # of a Ctrl-C in the terminal that it was put into the background of
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (0, 1), errors  # 1: six steps did not improve the model
    assert (tmp_path / "run" / "README.md").exists()
    assert "stopping after this step" not in errors


def test_what_a_suite_under_nohup_starts_has_default_handlers() -> None:
    folder = str(Path(__file__).parents[1] / "support")
    suite = (
        f"import subprocess, sys; sys.path.insert(0, {folder!r})\n"
        "from warm import start_children_with_default_handlers\n"
        "{}\n"
        f"subprocess.run([sys.executable, '-c', {HANDLERS!r}], check=True)"
    )
    helped, alone = (
        subprocess.run(
            [sys.executable, "-c", suite.format(line)], capture_output=True, text=True, check=True, preexec_fn=ignored
        ).stdout
        for line in ("start_children_with_default_handlers()", "")
    )
    assert "SIG_IGN" not in helped
    assert alone.count("SIG_IGN") == 2


def test_a_suite_started_from_a_terminal_keeps_its_own_handlers() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)]
    start_children_with_default_handlers()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)] == before
