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
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from sinder_cli import __version__
from sinder_cli.cli.help import dressed
from sinder_cli.cores import heed_quota
from sinder_cli.distributed import launched, tell
from sinder_cli.errors import SinderError, StorageError, TryAgainError, UsageError
from sinder_cli.memory import is_out_of_memory
from sinder_cli.signals import Ended, Stop

HELP_FLAGS = ["-h", "--help"]
HELP = """Predict, show and repair the singular defects of pre-trained Vision Transformers.

Results go to standard output, progress and messages to standard error."""


@dataclass
class Invocation:
    """The global options of one call, kept outside the parser so that error handling can read them."""

    debug: bool = False
    stop: Stop = field(default_factory=Stop)


@dataclass(frozen=True)
class Subcommand:
    """A subcommand, whose module is imported when it is called."""

    module: str
    function: str
    summary: str

    def load(self, name: str) -> Any:
        """Return it as Typer's parser object."""
        app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
        app.command(name)(getattr(import_module(f"sinder_cli.cli.{self.module}"), self.function))
        return dressed(typer.main.get_command(app), name)


SUBCOMMANDS = {
    "predict-defects": Subcommand(
        "predict", "command", "Predict the defect directions of every block from the weights alone."
    ),
    "analyze": Subcommand(
        "analyze", "command", "Show token norms, defects, and observed against predicted directions."
    ),
    "repair": Subcommand("repair", "command", "Repair a model's singular defects with unlabelled images."),
    "evaluate": Subcommand(
        "evaluate",
        "command",
        "Evaluate a model, or a run before and after, by tasks, with placebos beside them.",
    ),
    "export": Subcommand(
        "export",
        "command",
        "Write the weights of a run or a model in a format that others load; checked before it gets its name.",
    ),
    "runs": Subcommand(
        "runs", "command", "List the runs below a folder: model, verdict, outlying tokens, fidelity, date."
    ),
    "backbones": Subcommand("backbones", "listing", "List the models that the installed plugins offer."),
    "check-backbone": Subcommand(
        "backbones", "check", "Check that a plugin describes a model as sinder needs it; exit 65 if it does not."
    ),
    "doctor": Subcommand(
        "doctor",
        "command",
        "Show versions, machine, attention kernels, plugins and caches; exit 69 if something needed is missing.",
    ),
    "demo": Subcommand(
        "demo",
        "command",
        "Predict, repair and export a small model with a planted defect: a minute or two, and no download.",
    ),
    "man": Subcommand(
        "manual", "command", "Show a manual page with `man`, or as roff where its output is no terminal."
    ),
}


class Subcommands(TyperGroup):
    """The subcommands by name and summary; the one that is called is loaded."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the subcommand that the arguments name, and the arguments that it gets."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, SUBCOMMANDS[name].load(name) if name else None, rest


def command() -> Any:
    """Return the command tree as Typer's parser object, without its subcommands' options."""
    app = typer.Typer(
        name="sinder",
        help=HELP,
        cls=Subcommands,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": HELP_FLAGS},
    )
    app.callback()(_global_options)
    tree: Any = typer.main.get_command(app)
    for flag in (*tree.params, tree.get_help_option(tree.context_class(tree, help_option_names=HELP_FLAGS))):
        flag.metavar = ""  # none of them has a value
    for name, subcommand in SUBCOMMANDS.items():
        tree.add_command(TyperCommand(name, help=subcommand.summary))
    return tree


def whole_tree() -> Any:
    """Return the command tree with every subcommand loaded, as manual pages are written from."""
    tree = command()
    for name, subcommand in SUBCOMMANDS.items():
        tree.add_command(subcommand.load(name), name)
    return tree


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
    heed_quota()
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
    from pydantic import ValidationError

    from sinder_cli.faults import first_fault

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
