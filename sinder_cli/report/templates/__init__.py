"""Compiled templates: those for HTML escape their values, those for Markdown have filters for code and table cells.

The templates are files in this folder, each named after the document that it produces.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sinder_cli.escaping import printable, printable_lines

if TYPE_CHECKING:
    from jinja2 import Environment, Template


def html_template(name: str) -> Template:
    """Return a template that escapes its values for HTML, with the filter `printable`; a missing value is an error."""
    environment = _environment(autoescape=True)
    environment.filters["printable"] = printable
    return environment.get_template(name)


def markdown_template(name: str) -> Template:
    """Return a template with two filters: `code` makes text an inline code span, `cell` fits it into a table cell."""
    environment = _environment(autoescape=False)
    environment.filters["code"] = code_span
    environment.filters["cell"] = table_cell
    return environment.get_template(name)


def code_span(text: object) -> str:
    """Return text as inline code on one line, fenced by one backtick more than its longest run of backticks."""
    line = " ".join(printable(str(text)).split()) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    padding = " " if "`" in (line[0], line[-1]) else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def table_cell(text: object) -> str:
    """Return text on one line, with pipes escaped so that they do not end the cell."""
    return printable(re.sub(r"[ \t\n]+", " ", str(text)).strip()).replace("|", "\\|")


def _without_controls(value: object) -> object:
    """Return plain text with control characters escaped, except line breaks and tabs; our own markup unchanged."""
    return printable_lines(value) if type(value) is str else value


def _environment(autoescape: bool) -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(
        loader=FunctionLoader(_source),
        autoescape=autoescape,
        finalize=_without_controls,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _source(name: str) -> str:
    from importlib.resources import files

    return files("sinder_cli.report.templates").joinpath(name).read_text(encoding="utf-8")
