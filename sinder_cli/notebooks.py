"""Records in notebooks: a record asks for its HTML here, and the report, which can draw it, has said how.

The records lie below the report; so they name nobody, and whoever is above fills in the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_WAYS: dict[str, Callable[[Any], str]] = {}  # the qualified name of a record's class → its HTML


def show_as(name: str, html: Callable[[Any], str]) -> None:
    """Show records of the class of this qualified name (`sinder_cli.defects.prediction.Prediction`) like this."""
    _WAYS[name] = html


class Shown:
    """A record that a notebook shows as its command's table instead of as its fields."""

    def _repr_html_(self) -> str | None:
        way = _WAYS.get(f"{type(self).__module__}.{type(self).__qualname__}")
        return None if way is None else way(self)
