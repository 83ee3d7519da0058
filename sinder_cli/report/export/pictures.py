"""The pictures of a run, taken out of its page: a card shows those of the first image."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

_URI = re.compile(r"data:image/(png|jpeg);base64,(.+)", re.DOTALL)


class Picture(NamedTuple):
    """A file of the exported folder, and what it shows."""

    name: str
    words: str
    content: bytes


def run_pictures(page: Path) -> list[Picture]:
    """The pictures of the first image of `report.html`, before and after; none where there is no such page."""
    if not page.is_file():
        return []
    reader = _FirstSample()
    reader.feed(page.read_text(encoding="utf-8", errors="replace"))
    pictures = []
    for number, (uri, words) in enumerate(reader.found, 1):
        if match := _URI.fullmatch(uri):
            suffix = {"png": "png", "jpeg": "jpg"}[match[1]]
            pictures.append(Picture(f"pictures/{number}.{suffix}", words, base64.b64decode(match[2])))
    return pictures


class _FirstSample(HTMLParser):
    """Collects the images of the first section of the class `sample`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.state = "before"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "section" and given.get("class") == "sample" and self.state == "before":
            self.state = "inside"
        elif tag == "img" and self.state == "inside":
            self.found.append((given["src"], given["alt"]))

    def handle_endtag(self, tag: str) -> None:
        if tag == "section" and self.state == "inside":
            self.state = "after"
