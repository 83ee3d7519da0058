"""Manual pages: helpers that write roff, and the page that describes the JSON document of an analysis."""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from sinder_cli import __version__
from sinder_cli.analysis.records import Analysis

DATE = "2026-11-26"  # of this version of the pages


def head(name: str, section: int, summary: str, manual: str) -> list[str]:
    """Return the header of a page: its title, and the NAME section that `apropos` reads."""
    return [
        f'.TH {escape(name).upper()} {section} "{DATE}" "sinder {__version__}" "{manual}"',
        ".SH NAME",
        f"{escape(name)} \\- {escape(summary.rstrip('.'))}",
    ]


WIDTH = 78  # bytes of a line of source


def wrapped(lines: Iterable[str]) -> list[str]:
    """Return lines of roff with texts broken at spaces; requests, which begin with a dot, stay whole."""
    broken: list[str] = []
    for line in lines:
        if line.startswith((".", "'")):
            broken.append(line)
            continue
        parts = [""]
        for word in line.split(" "):
            longer = f"{parts[-1]} {word}" if parts[-1] else word
            fits = not parts[-1] or _bytes(longer) <= WIDTH
            parts = [*parts[:-1], longer] if fits else [*parts, word]
        broken += [f"\\&{part}" if part.startswith((".", "'")) else part for part in parts]
    return broken


def _bytes(text: str) -> int:
    """Return the length of a text as roff reads it: other letters than ASCII are written as `\\[u2026]`."""
    return sum(1 if letter.isascii() else len("\\[u2026]") for letter in text)


def escape(text: str) -> str:
    """Return text escaped for roff: no control character at its start, and hyphens stay minus signs."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


NAME = "sinder-analysis.5"
INTRODUCTION = (
    "sinder analyze \\-\\-format json prints one JSON document, and \\-\\-out DIR writes it as DIR/report.json, beside"
    " report.html, figures/ and directions.safetensors."
    f" This is version {Analysis.model_fields['schema_version'].default} of its schema;"
    " a change that breaks programs that read it raises this number. Numbers that are not finite are null."
    " Every object has exactly the members listed."
)
TENSORS = (
    "Float32 tensors [blocks, width], rows of unit norm: predicted.attention, predicted.mlp, predicted.block and"
    " predicted.cumulative, the directions that the weights predict, and observed, the direction that outlying tokens"
    " share (zeros in a block without any). In a comparison, names of the second backbone's tensors begin with other."
)
FEATURES = (
    "One file per image, written by --features DIR and named after the image: float32 tensors patches [rows, columns,"
    " width] and, if the model has a cls token, cls [width], after the last block and the final norm; with --method"
    " inpaint, from the pass in which outlying tokens are replaced. The metadata hold model, fingerprint and image."
)
PLAIN = {str: "string", int: "integer", float: "number", bool: "true or false", Any: "any value"}


def schema_page() -> str:
    """Return the page in roff: one section per object, the document first, each member with type and meaning."""
    lines = [*head("sinder-analysis", 5, "what sinder analyze reports, as JSON", "File Formats")]
    lines += [".SH DESCRIPTION", INTRODUCTION]
    for model in records_of(Analysis):
        name = "THE DOCUMENT" if model is Analysis else model.__name__.upper()
        lines += [f".SH {name}", escape((model.__doc__ or "").strip())]
        for field, about in model.model_fields.items():
            lines += [".TP", f".B {escape(field)}", escape(_member(about.annotation, about.description))]
    lines += [".SH FILES", ".TP", ".B directions.safetensors", escape(TENSORS)]
    lines += [".TP", ".B IMAGE.safetensors", escape(FEATURES)]
    return "\n".join(wrapped([*lines, ".SH SEE ALSO", ".BR sinder\\-analyze (1)"])) + "\n"


def records_of(model: type[BaseModel]) -> list[type[BaseModel]]:
    """Return `model` and all records that it contains, each once, in the order in which a reader meets them."""
    found = [model]
    for record in found:  # the list grows during this loop
        for about in record.model_fields.values():
            found += [each for each in _records_in(about.annotation) if each not in found]
    return found


def type_words(annotation: Any) -> str:
    """Return the name of a type in terms of JSON."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        named = [type_words(part) for part in parts if part is not NoneType]
        return " or ".join([*named, "null"] if NoneType in parts else named)
    if origin is Literal:
        return " | ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in parts)
    if origin is dict:
        return f"object: {type_words(parts[0])} → {type_words(parts[1])}"
    if origin in (tuple, list):
        length = "" if parts[-1] is Ellipsis or origin is list else f"{len(parts)} "
        return f"list of {length}{type_words(parts[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__
    return PLAIN[annotation]


def _records_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [record for part in get_args(annotation) for record in _records_in(part)]


def _member(annotation: Any, description: str | None) -> str:
    return f"({type_words(annotation)}) {description}" if description else f"({type_words(annotation)})"
