"""The templates, compiled: HTML escapes what it is given, Markdown marks it as code.

They lie in this folder; each is named after the document that it makes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sinder_cli.escaping import printable, printable_lines

if TYPE_CHECKING:
    from jinja2 import Environment, Template


def html_template(name: str) -> Template:
    """A template whose values are escaped for HTML, with the filter `printable`; a misspelt name is an error."""
    environment = _environment(autoescape=True)
    environment.filters["printable"] = printable
    return environment.get_template(name)


def markdown_template(name: str) -> Template:
    """A template with two filters: `code` makes any text an inline code span, `cell` fits text into a table's row."""
    environment = _environment(autoescape=False)
    environment.filters["code"] = code_span
    environment.filters["cell"] = table_cell
    return environment.get_template(name)


def code_span(text: object) -> str:
    """Text as inline code on one line, fenced by one backtick more than the longest run of them in it."""
    line = " ".join(printable(str(text)).split()) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    padding = " " if "`" in (line[0], line[-1]) else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def table_cell(text: object) -> str:
    """Text on one line whose pipes do not end the cell."""
    return printable(re.sub(r"[ \t\n]+", " ", str(text)).strip()).replace("|", "\\|")


def _without_controls(value: object) -> object:
    """A plain text with its control characters escaped; lines stay, and so does markup that we have made ourselves."""
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
