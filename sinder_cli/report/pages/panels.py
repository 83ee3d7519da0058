"""A picture as a page holds it."""

from __future__ import annotations

from typing import NamedTuple


class Panel(NamedTuple):
    """One picture: its caption, what a reader who cannot see it is told, and a `data:` URI, empty for none."""

    caption: str
    alt: str
    uri: str
    sharp: bool = False  # enlarged by the browser, every patch a square
