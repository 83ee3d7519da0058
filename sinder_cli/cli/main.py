"""The command tree, and the entry point: run one command; an error becomes one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from sinder_cli import __version__
from sinder_cli.cli import analyze, backbones, export, predict, repair
from sinder_cli.cli.output import tell
from sinder_cli.distributed import launched
from sinder_cli.errors import SinderError, StorageError, TryAgainError, UsageError
from sinder_cli.faults import first_fault
from sinder_cli.memory import is_out_of_memory
from sinder_cli.signals import Ended, Stop

HELP = """Predict, show and repair the singular defects of pre-trained Vision Transformers.

Results go to standard output, progress and messages to standard error."""


@dataclass
class Invocation:
    """The global options of one call, kept outside the parser so that error handling can read them."""

    debug: bool = False
    stop: Stop = field(default_factory=Stop)


def build_app() -> typer.Typer:
    """Return the application with all subcommands."""
    app = typer.Typer(name="sinder", help=HELP, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.callback()(_global_options)
    app.command("predict-defects")(predict.command)
    app.command("analyze")(analyze.command)
    app.command("repair")(repair.command)
    app.command("export")(export.command)
    app.command("backbones")(backbones.listing)
    app.command("check-backbone")(backbones.check)
    return app


def command() -> Any:
    """Return the command tree as Typer's parser object."""
    return typer.main.get_command(build_app())


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sinder {__version__}")
        raise typer.Exit


def _global_options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if isinstance(context.obj, Invocation):
        context.obj.debug = debug


OLD_OPTIONS = {"--stop-density": "--stop-clean-fraction"}  # still accepted
ENDED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `sinder` with these arguments and end the process with the documented exit code."""
    given = [_present(each) for each in (sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    ranks = launched()
    invocation = Invocation(stop=Stop(once=ranks.size > 1, say=_say_at_once if ranks.writes else _say_nothing))
    for number in ENDED:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, or in a script's background
            signal.signal(number, lambda received, _: invocation.stop.hear(received))
    warnings.filterwarnings("ignore", module="PIL")  # remarks on odd metadata of images that decode all the same
    warnings.filterwarnings("ignore", message="Detected pickle protocol")  # of torch.load; the file is read or refused
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
        _hear_no_more()
        tell(f"sinder: {ENDED[end.number]}")
        _die_by(end.number)
    except Exception as error:
        if invocation.debug:
            traceback.print_exc()
        failure = as_failure(error)
        _hear_no_more()
        tell(f"sinder: error: {failure}")
        sys.exit(failure.exit_code)


def _present(argument: str) -> str:
    """Return an argument with the present name of a renamed option."""
    name, equals, value = argument.partition("=")
    return f"{OLD_OPTIONS.get(name, name)}{equals}{value}"


def as_failure(error: Exception) -> SinderError:
    """Return the documented failure for an exception; one that is a bug of ours has exit code 70."""
    if isinstance(error, SinderError):
        return error
    if isinstance(error, typer.TyperException):
        return UsageError("bad command line", _parser_words(error), "see --help")
    text = str(error).split("\n")[0]
    if is_out_of_memory(error):
        return TryAgainError(
            "out of memory", text or "nothing more could be allocated", "lower --image-size or --batch-size"
        )
    if isinstance(error, OSError):
        return StorageError("input or output failed", str(error), "check the disk and the path")
    return SinderError("internal error", f"{type(error).__name__}: {text}", "run `sinder --debug …` and report it")


def _parser_words(error: typer.TyperException) -> str:
    """Return the parser's message; for a value that is no number, our own words replace pydantic's."""
    words = error.format_message().rstrip(".")
    if isinstance(error.__cause__, ValidationError):
        return words.replace(error.message.rstrip("."), first_fault(error.__cause__).why)
    return words


def _say_at_once(text: str) -> None:
    """Write a line to standard error from within a signal handler, without Python's buffers."""
    with suppress(OSError):
        os.write(2, f"sinder: {text}\n".encode())


def _say_nothing(text: str) -> None:
    """Print nothing: another process of the run prints it."""


def _hear_no_more() -> None:
    """Ignore further signals: this process is ending and prints the reason."""
    for number in ENDED:
        signal.signal(number, signal.SIG_IGN)


def _die_by(number: signal.Signals) -> None:
    """End by the signal itself, so that the shell sees 128 + its number."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to a closed pipe
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
