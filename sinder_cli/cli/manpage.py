"""Manual pages from the command tree: `python -m sinder_cli.cli.manpage FOLDER` writes all of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sinder_cli.cli.help import EXAMPLES
from sinder_cli.cli.main import HELP, whole_tree
from sinder_cli.files import write_text
from sinder_cli.report.manual import NAME, escape, head, schema_page, wrapped

EXIT_CODES = {
    0: "success; skipped inputs, if any, were reported",
    1: "negative result: --fail-on-defects found some, or a repair did not improve the model",
    2: "usage",
    65: "bad input data: checkpoint, image, or a plugin's layer map",
    66: "no input: a missing file or an empty folder",
    69: "a plugin or its library is unavailable, or a download failed",
    70: "internal error",
    73: "the output cannot be created",
    74: "input or output failed, or the disk is full",
    75: "try again: out of memory, another process holds the folder, or a process that helped has died",
    78: "settings or plugins contradict each other",
    130: "interrupted (143: terminated, 141: closed pipe)",
}


FILES = {
    "sinder-runs/": "where repair puts runs without --out; a run directory can be named wherever a model is",
    "sinder-looks/": "where analyze keeps the pictures of photographs given as plain arguments",
    "~/.cache/torch/hub/checkpoints/": "official checkpoints that were downloaded",
}
ENVIRONMENT = {
    "SINDER_PLUGINS": "names of the plugins that may load, separated by commas; all, if it is unset",
    "TORCH_HOME, XDG_CACHE_HOME, HF_HOME": "where downloads are kept",
    "OMP_NUM_THREADS": "threads of the matrix products; by default as many as the container has cores",
    "NO_COLOR": "no colours on a terminal",
}


def pages() -> dict[str, str]:
    """Return the roff text of each page by file name: `sinder`, every subcommand and the format of an analysis."""
    tree = whole_tree()
    rendered = {"sinder.1": _main_page(tree)}
    for name, subcommand in sorted(tree.commands.items()):
        rendered[f"sinder-{name}.1"] = _page(f"sinder {name}", subcommand)
    return rendered | {NAME: schema_page()}


def _main_page(tree: Any) -> str:
    lines = [*_head("sinder", HELP.split("\n")[0]), ".SH SYNOPSIS", ".B sinder", "[\\-\\-debug] COMMAND [ARGS]"]
    lines += [".SH DESCRIPTION", *(escape(line) for line in HELP.split("\n") if line)]
    lines += [".SH COMMANDS"]
    for name, subcommand in sorted(tree.commands.items()):
        lines += [".TP", f".BR sinder\\-{escape(name)} (1)", escape(_summary(subcommand))]
    lines += [".SH OPTIONS", *_options(tree), *_surroundings()]
    return "\n".join(wrapped(lines)) + "\n"


def _page(name: str, subcommand: Any) -> str:
    arguments = [p for p in subcommand.params if p.param_type_name == "argument"]
    synopsis = " ".join(["[OPTIONS]", *(escape(argument.metavar) for argument in arguments)])
    lines = [*_head(name.replace(" ", "-"), _summary(subcommand)), ".SH SYNOPSIS", f".B {escape(name)}", synopsis]
    lines += [".SH DESCRIPTION", escape(_summary(subcommand))]
    if arguments:
        lines += [".SH ARGUMENTS"]
    for argument in arguments:
        lines += [".TP", f".I {escape(argument.metavar)}", escape(argument.help or "")]
    lines += [".SH OPTIONS", *_options(subcommand)]
    for words, example in EXAMPLES[name.removeprefix("sinder ")]:
        lines += [
            *([] if ".SH EXAMPLES" in lines else [".SH EXAMPLES"]),
            ".TP",
            escape(f"{words[0].upper()}{words[1:]}:"),
        ]
        lines += [f".B {escape(example)}"]
    also = [".BR sinder (1),", ".BR sinder\\-analysis (5)"] if name == "sinder analyze" else [".BR sinder (1)"]
    return "\n".join(wrapped([*lines, *_surroundings(), ".SH SEE ALSO", *also])) + "\n"


def _surroundings() -> list[str]:
    """Return the sections that all pages share: files, environment, exit status."""
    lines = []
    for heading, entries in ((".SH FILES", FILES), (".SH ENVIRONMENT", ENVIRONMENT)):
        lines.append(heading)
        for name, meaning in entries.items():
            lines += [".TP", f".I {escape(name)}", escape(meaning)]
    return [*lines, ".SH EXIT STATUS", *_exit_status()]


def _exit_status() -> list[str]:
    return [line for code, meaning in EXIT_CODES.items() for line in (".TP", f".B {code}", escape(meaning))]


def _options(subcommand: Any) -> list[str]:
    lines = []
    for option in subcommand.params:
        record = option.get_help_record(_context(subcommand)) if option.param_type_name == "option" else None
        if record:
            flags, text = record
            lines += [".TP", f".B {escape(flags)}", escape(text)]
    return [*lines, ".TP", ".B \\-h, \\-\\-help", "Show this message and exit."]


def _context(subcommand: Any) -> Any:
    return subcommand.context_class(subcommand)


def _head(name: str, summary: str) -> list[str]:
    return head(name, 1, summary, "User Commands")


def _summary(subcommand: Any) -> str:
    return (subcommand.help or "").split("\n")[0]


def write_pages(folder: Path) -> None:
    """Write all pages into `folder`."""
    for name, text in pages().items():
        write_text(folder / name, text)


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
