"""The entry point: run one command, and turn whatever goes wrong into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import FrameType

import typer

from sinder_cli.cli.app import Invocation, command
from sinder_cli.errors import SinderError, StorageError, TryAgainError, UsageError


class Ended(BaseException):
    """SIGINT or SIGTERM arrived; raised in the main thread so that half-written files are removed on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


ENDED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `sinder` with these arguments and end the process with the documented exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    invocation = Invocation()
    for number in ENDED:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, or in a script's background
            signal.signal(number, _end)
    warnings.filterwarnings("ignore", module="PIL")  # remarks on odd metadata of images that decode all the same
    try:
        code = command().main(args=given, prog_name="sinder", standalone_mode=False, obj=invocation)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except BrokenPipeError:
        _die_by(signal.SIGPIPE)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # the parser turns one into exit code 1
            _die_by(signal.SIGPIPE)
        raise
    except Ended as end:  # no KeyboardInterrupt, which the parser turns into an exit code
        print(f"sinder: {ENDED[end.number]}", file=sys.stderr)
        _die_by(end.number)
    except Exception as error:
        if invocation.debug:
            traceback.print_exc()
        failure = as_failure(error)
        print(f"sinder: error: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)


def as_failure(error: Exception) -> SinderError:
    """The documented failure that an exception amounts to; exit code 70 for one that is a bug of ours."""
    if isinstance(error, SinderError):
        return error
    if isinstance(error, typer.TyperException):
        return UsageError("bad command line", error.format_message().rstrip("."), "see --help")
    text = str(error).split("\n")[0]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return TryAgainError(
            "out of memory", text or "no more to be had", "lower --batch-size, --window or --image-size"
        )
    if isinstance(error, OSError):
        return StorageError("input or output failed", str(error), "check the disk and the path")
    return SinderError("internal error", f"{type(error).__name__}: {text}", "run `sinder --debug …` and report it")


def _end(number: int, _frame: FrameType | None) -> None:
    raise Ended(number)


def _die_by(number: signal.Signals) -> None:
    """End by the signal itself, so that the shell sees 128 + its number."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to a closed pipe
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
