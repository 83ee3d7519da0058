"""A process that imports torch once and forks for each command: a start costs milliseconds instead of seconds.

It reads a JSON document a line and answers with the child's process id, and then with how it ended. Nothing is computed
before the fork, so that the children are what new processes would be. A child can be told to kill itself at one of the
changes that it makes to files.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}  # of Python's audit events


def start_children_with_default_handlers() -> None:
    """Let every process that is started from here take SIGINT and SIGHUP as one started from a terminal does.

    `nohup` and a shell's background have them ignored, and what is ignored stays so in a new program. What a handler
    catches does not: it is the default there. This process goes on to do nothing about them.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, or minus the signal that it died by; what it printed, and what it changed."""

    returncode: int
    stdout: str
    stderr: str
    changes: tuple[str, ...]  # in their order, hashes and the random parts of names left out


class Running:
    """A command that has been started."""

    def __init__(self, server: Server, pid: int) -> None:
        self.server, self.pid = server, pid

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    @property
    def errors(self) -> str:
        """Standard error so far."""
        return (self.server.printed / "stderr").read_text()

    def wait(self) -> Ended:
        code, changes = self.server.answer(), self.server.printed / "changes"
        self.server.tell("reap it")
        self.server.running = None
        return Ended(
            code, (self.server.printed / "stdout").read_text(), self.errors, tuple(changes.read_text().splitlines())
        )


class Server:
    """The parent of all commands, which call `module:function` with their arguments; one runs at a time."""

    def __init__(self, function: str, environment: dict[str, str], printed: Path) -> None:
        command = [sys.executable, __file__, function, str(printed)]
        self.process = Popen(command, stdin=PIPE, stdout=PIPE, text=True, bufsize=1, env=environment)
        self.printed = printed
        self.running: Running | None = None

    def start(self, *arguments: str | Path, cwd: Path, kill_before: str = "") -> Running:
        """Start a command; it kills itself just before a change to a file, if one is named."""
        line = {"arguments": [*map(str, arguments)], "cwd": str(cwd), "kill_before": kill_before}
        if self.running is not None:  # a test has failed before its end
            self.running.send(signal.SIGKILL)
            self.running.wait()
        self.tell(json.dumps(line))
        self.running = Running(self, self.answer())
        return self.running

    def run(self, *arguments: str | Path, cwd: Path, kill_before: str = "") -> Ended:
        return self.start(*arguments, cwd=cwd, kill_before=kill_before).wait()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")

    def answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate(timeout=30)


def serve(function: str, printed: str) -> None:
    """Fork for each line of standard input."""
    module, _, name = function.partition(":")
    called = getattr(importlib.import_module(module), name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            be_command(called, Path(printed), **json.loads(line))
        print(pid, flush=True)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # its number stays its own while it may be signalled
        assert ended is not None
        import_all((Path(printed) / "modules").read_text().split())
        print(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status, flush=True)
        sys.stdin.readline()
        os.waitpid(pid, 0)


def be_command(
    called: Callable[[list[str]], object], printed: Path, arguments: list[str], cwd: str, kill_before: str
) -> None:
    """Turn this child into the command; never returns."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(printed / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    sys.argv = ["sinder", *arguments]
    changes = os.open(printed / "changes", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    modules = os.open(printed / "modules", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def told(change: str) -> None:
        os.write(changes, f"{change}\n".encode())
        if change == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_changes(told)
    code: Any = 0
    try:
        called(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 70
    finally:
        sys.stdout.flush()
        os.write(modules, "\n".join(sys.modules).encode())
        os._exit(int(code or 0))


def import_all(modules: Sequence[str]) -> None:
    """Import what a child had to import, so that the next need not."""
    for name in modules:
        if name not in sys.modules:
            with suppress(Exception):  # one that is made in no ordinary way
                importlib.import_module(name)


def watch_changes(told: Callable[[str], None]) -> None:
    """Call `told` before a file is opened to be written, renamed, removed or flushed, and a folder made or removed."""

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        opened_to_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
        if (event in CHANGES or opened_to_write) and not str(arguments[0]).startswith("/dev/"):
            told(f"{event} {name_of(arguments[0])}")

    def flush(descriptor: int) -> None:  # and no more: what the kernel was given outlives a process that is killed
        told(f"fsync {name_of(Path(f'/proc/self/fd/{descriptor}').readlink())}")

    os.fsync = flush
    sys.addaudithook(hear)


def name_of(path: Any) -> str:
    """The last two parts of a path, without what is different each time."""
    place = Path(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else Path(str(path))
    name = "/".join(place.parts[-2:])
    return re.sub(r"[0-9a-f]{64}", "HASH", re.sub(r"\.\w{8}\.part", ".part", name))


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
