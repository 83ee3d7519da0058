"""Text from outside, as file names are, made fit for a terminal, a report or a card.

The lowest module of all, since even an error escapes what it names.
"""

from __future__ import annotations

import re

# C0 and C1 controls, among them ESC and newline; line and paragraph separators; what changes the writing direction;
# surrogates, which stand for bytes that are no UTF-8
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return the text on one line, with each character that is none of a text as Python writes it: `\n`, `\x1b`."""
    return _UNPRINTABLE.sub(_escape, text)


def printable_lines(text: str) -> str:
    """Return the same with newlines and tabs left as they are."""
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in "\n\t" else _escape(found), text)


def json_escaped(text: str) -> str:
    r"""Return a JSON document that means the same, with `\u001b` for each such character in its strings."""
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in "\n\t" else f"\\u{ord(found[0]):04x}", text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
