"""The few words of roff that manual pages are made of."""

from __future__ import annotations

from sinder_cli import __version__


def head(name: str, section: int, summary: str, manual: str) -> list[str]:
    """The title of a page and its line in `apropos`."""
    return [
        f'.TH {escape(name).upper()} {section} "" "sinder {__version__}" "{manual}"',
        ".SH NAME",
        f"{escape(name)} \\- {escape(summary.rstrip('.'))}",
    ]


def escape(text: str) -> str:
    """Text as roff prints it: no line may begin with a control character, and hyphens stay minus signs."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped
