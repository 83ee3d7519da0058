"""Escaping of text from outside, such as file names, for a terminal, a report or a card.

This module imports no other module of the package, since even errors escape the names that they contain.
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress

# C0 and C1 controls, among them ESC and newline; line and paragraph separators; controls of the writing direction;
# surrogates, which represent bytes that are not UTF-8
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return the text on one line, with unprintable characters escaped as Python writes them: `\n`, `\x1b`."""
    return _UNPRINTABLE.sub(_escape, text)


def printable_lines(text: str) -> str:
    """Return the text with unprintable characters escaped, except newlines and tabs."""
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in "\n\t" else _escape(found), text)


def json_escaped(text: str) -> str:
    r"""Return an equivalent JSON document, with escapes such as `\u001b` for unprintable characters in its strings."""
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in "\n\t" else f"\\u{ord(found[0]):04x}", text)


def say(text: str) -> None:
    """Print a line on standard error; if that is closed, go on, since a missing reader is no reason to stop.

    Control characters in the line, which names of files may contain, are escaped.
    """
    with suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
