"""The command tree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from sinder_cli import __version__
from sinder_cli.cli import analyze, backbones, check, export, predict, repair
from sinder_cli.signals import Stop

HELP = """Predict, show and repair the singular defects of pre-trained Vision Transformers.

Results go to standard output, progress and messages to standard error."""


@dataclass
class Invocation:
    """What the global options of one call said; kept outside the parser so that error handling can see it."""

    debug: bool = False
    stop: Stop = field(default_factory=Stop)


def build_app() -> typer.Typer:
    """All subcommands on one application."""
    app = typer.Typer(name="sinder", help=HELP, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.callback()(_global_options)
    app.command("predict-defects")(predict.command)
    app.command("analyze")(analyze.command)
    app.command("repair")(repair.command)
    app.command("export")(export.command)
    app.command("backbones")(backbones.command)
    app.command("check-backbone")(check.command)
    return app


def command() -> Any:
    """The command tree as Typer's parser object."""
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
