"""Manual pages from the command tree: `python -m sinder_cli.cli.manpage FOLDER` writes one for every command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sinder_cli import __version__
from sinder_cli.cli.app import HELP, command
from sinder_cli.files import write_text

EXIT_CODES = {
    0: "done, reported skips included",
    2: "usage",
    65: "bad input data: checkpoint, image, or a plugin's layer map",
    66: "no input: a missing file or an empty folder",
    69: "a plugin or its library is unavailable, or a download failed",
    70: "internal error",
    73: "the output cannot be created",
    74: "input or output failed, or the disk is full",
    75: "try again: out of memory",
    78: "settings or plugins contradict each other",
    130: "interrupted (143: terminated, 141: closed pipe)",
}


def pages() -> dict[str, str]:
    """File name → roff, for `sinder` and every subcommand."""
    tree = command()
    rendered = {"sinder.1": _main_page(tree)}
    for name, subcommand in sorted(tree.commands.items()):
        rendered[f"sinder-{name}.1"] = _page(f"sinder {name}", subcommand)
    return rendered


def _main_page(tree: Any) -> str:
    lines = [*_head("sinder", HELP.split("\n")[0]), ".SH SYNOPSIS", ".B sinder", "[\\-\\-debug] COMMAND [ARGS]"]
    lines += [".SH DESCRIPTION", *(_escape(line) for line in HELP.split("\n") if line)]
    lines += [".SH COMMANDS"]
    for name, subcommand in sorted(tree.commands.items()):
        lines += [".TP", f".BR sinder\\-{_escape(name)} (1)", _escape(_summary(subcommand))]
    lines += [".SH OPTIONS", *_options(tree), ".SH EXIT STATUS"]
    for code, meaning in EXIT_CODES.items():
        lines += [".TP", f".B {code}", _escape(meaning)]
    return "\n".join(lines) + "\n"


def _page(name: str, subcommand: Any) -> str:
    arguments = [p for p in subcommand.params if p.param_type_name == "argument"]
    synopsis = " ".join(["[OPTIONS]", *(_escape(argument.metavar) for argument in arguments)])
    lines = [*_head(name.replace(" ", "-"), _summary(subcommand)), ".SH SYNOPSIS", f".B {_escape(name)}", synopsis]
    lines += [".SH DESCRIPTION", _escape(_summary(subcommand))]
    if arguments:
        lines += [".SH ARGUMENTS"]
    for argument in arguments:
        lines += [".TP", f".I {_escape(argument.metavar)}", _escape(argument.help or "")]
    lines += [".SH OPTIONS", *_options(subcommand)]
    return "\n".join([*lines, ".SH SEE ALSO", ".BR sinder (1)"]) + "\n"


def _options(subcommand: Any) -> list[str]:
    lines = []
    for option in subcommand.params:
        record = option.get_help_record(_context(subcommand)) if option.param_type_name == "option" else None
        if record:
            flags, text = record
            lines += [".TP", f".B {_escape(flags)}", _escape(text)]
    return [*lines, ".TP", ".B \\-\\-help", "Show this message and exit."]


def _context(subcommand: Any) -> Any:
    return subcommand.context_class(subcommand)


def _head(name: str, summary: str) -> list[str]:
    return [
        f'.TH {_escape(name).upper()} 1 "" "sinder {__version__}" "User Commands"',
        ".SH NAME",
        f"{_escape(name)} \\- {_escape(summary.rstrip('.'))}",
    ]


def _summary(subcommand: Any) -> str:
    return (subcommand.help or "").split("\n")[0]


def _escape(text: str) -> str:
    """Text as roff prints it: no line may begin with a control character, and hyphens stay minus signs."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def write_pages(folder: Path) -> None:
    """Write all pages into `folder`."""
    for name, text in pages().items():
        write_text(folder / name, text)


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
