"""Plain words for validation errors of pydantic, whose own texts speak of inputs, schemas and patterns."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pydantic import ValidationError

MOST_LETTERS = 40  # of a value that is quoted

WANTED = {  # what a value must be, by pydantic's type of error; in braces the names of pydantic's limits
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "callable_type": "a function",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or more",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of at most 4300 digits",
    "int_type": "a whole number",
    "is_instance_of": "of type {class}",
    "less_than": "under {lt}",
    "less_than_equal": "{le} or less",
    "list_type": "a list",
    "literal_error": "{expected}",
    "mapping_type": "a table",
    "model_type": "of type {class_name}",
    "none_required": "left out",
    "path_type": "a path",
    "string_type": "text",
    "too_long": "at most {max_length} long",
    "too_short": "at least {min_length} long",
    "tuple_type": "a list",
    "union_tag_invalid": "one of {expected_tags}",
}


class Fault(NamedTuple):
    """The first fault of some values."""

    place: tuple[str, ...]  # the names that lead to the value; empty for a fault of all values together
    why: str


def first_fault(error: ValidationError, names: Collection[str] = ()) -> Fault:
    """Return place and reason of the first fault. `names` are the valid names, to suggest one for a misspelt name."""
    first = error.errors(include_url=False)[0]
    place = tuple(str(part) for part in first["loc"])
    return Fault(place, _why(first["type"], first.get("ctx", {}), first["input"], place, names))


def _why(kind: str, limits: dict[str, Any], value: object, place: tuple[str, ...], names: Collection[str]) -> str:
    if kind in ("value_error", "assertion_error"):  # the message of our own validator
        return str(limits["error"])
    if kind == "missing":
        return "it is missing"
    if kind == "extra_forbidden":
        close = get_close_matches(place[-1], names, 1)
        return "this name is unknown" + (f": did you mean {close[0]}?" if close else "")
    wanted = WANTED.get(kind)
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in limits.items()}
    return f"it must be {wanted.format(**limits)}, not {quoted(value)}" if wanted else f"{quoted(value)} does not fit"


def quoted(value: object) -> str:
    """Return a value on one line, shortened if long; for a container only its kind."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list | tuple | set):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and value.bit_length() > 128:  # longer ones cannot even be written in decimal digits
        return f"a number of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, str) else " ".join(str(value).split())
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 1]}…"
