"""Charts drawn once and written twice: as a PNG on white, and as an SVG that takes its colours from the page."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from sinder_cli.report.formatting import csv_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK, SOFT, RULE, FAINT, LINE, ACCENT = "#1d1c1a", "#5f5b55", "#dedad3", "#ebe8e2", "#2b5c8a", "#c2500f"
GOOD = "#1c6b45"
# The page's colours in light mode. An SVG uses CSS variables of these names, which have values for dark mode too.
COLOURS = {"ink": INK, "soft": SOFT, "rule": RULE, "faint": FAINT, "line": LINE, "accent": ACCENT, "good": GOOD}
ABSENT = (138, 138, 138)  # on a map, where there is no value: a grey that no colour map contains
BRIGHT = "inferno"  # matplotlib's name of a perceptually uniform colour map, on which high values are bright
WIDTH = 4.6  # inches: text of 9.5 points has 10 pixels on a phone
STYLE = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same letters everywhere
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # a model's name may hold dollar signs
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "image.interpolation": "nearest",
    "svg.fonttype": "none",
}
PNG_DPI = 200
TAG = re.compile(r"<[a-zA-Z/][^>]*>")
COORDINATES = re.compile(r' (?:d|x|y|width|height|points)="[^"]*"|(?:rotate|translate)\([^)]*\)')  # of a tag


ChartKind = Literal["png", "svg", "pdf", "csv"]


@dataclass(frozen=True)
class Chart:
    """A chart: the name of its file, what it shows in a few words, how it was made, and how to draw it."""

    name: str
    title: str
    caption: str
    height: float  # inches
    draw: Callable[[Figure], None]
    rows: Sequence[Mapping[str, object]] = ()  # the numbers that it shows, a row each with the same columns

    def written(self, kind: ChartKind) -> bytes:
        """Return the chart as a file: `png`, `svg` and `pdf` on white, `csv` with its numbers."""
        if kind == "png":
            return self.png()
        if kind == "csv":
            return csv_text(self.rows).encode()
        nothing = {"svg": ("Date", "Creator"), "pdf": ("CreationDate", "Creator", "Producer")}[kind]
        metadata = {"Title": self.title, **dict.fromkeys(nothing)}
        return self._drawn(kind, dpi=PNG_DPI, facecolor="white", metadata=metadata)

    def png(self) -> bytes:
        """Return a PNG file on white that contains title and caption."""
        texts = {"Title": self.title, "Description": self.caption, "Software": None}
        return self._drawn("png", dpi=PNG_DPI, facecolor="white", metadata=texts)

    def svg(self) -> str:
        """Return an `<svg>` element whose colours are variables of the page that contains it."""
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        text = self._drawn("svg", dpi=PNG_DPI, transparent=True, metadata=nothing).decode("utf-8")
        return themed(text, self.title)

    def _drawn(self, kind: str, **options: Any) -> bytes:
        file = io.BytesIO()
        with _style(self.name):
            self._figure.savefig(file, format=kind, **options)
            self._figure.set_layout_engine("none")  # every further file has the places found for the first
        return file.getvalue()

    @cached_property
    def _figure(self) -> Figure:
        """The figure, drawn once for all files; its parts are placed when the first one is saved."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, self.height), layout="constrained")
        self.draw(figure)
        return figure


def block_axis(axes: Axes, depth: int) -> None:
    """Set up the axis of blocks, from left to right and numbered from 0, as everywhere."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.6, depth - 0.4)
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=min(depth, 10), integer=True, min_n_ticks=1))


def themed(svg: str, title: str) -> str:
    """Return matplotlib's SVG as an element of a page, with the page's size, colours and font, without URLs.

    Only tags are changed: texts between them, such as names and the numbers of an axis, stay as they are.
    """
    from html import escape

    view = re.search(r'viewBox="[^"]+"', svg)
    assert view is not None
    body = svg[svg.index("<defs>") :]
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)  # it would apply to the whole page
    used = {name for tag in TAG.findall(body) for name in re.findall(r"#([\w-]+)", tag)}
    body = TAG.sub(lambda found: _themed_tag(found[0], used), body)
    return f'<svg {view[0]} role="img" aria-label="{escape(title)}">\n{body.strip()}'


def _themed_tag(tag: str, used: set[str]) -> str:
    """Return a tag with the page's font and colours, coordinates cut to 0.01 points, and the id only if it is used."""
    tag = re.sub(r"font: (?:\w+ )*([\d.]+)px [^;\"]+", r"font-size: \1px", tag)
    tag = re.sub(r"font-family: [^;\"]+;? ?", "", tag)
    tag = COORDINATES.sub(lambda found: re.sub(r"(\d\.\d\d)\d+", r"\1", found[0]), tag)
    tag = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", tag)
    for name, colour in COLOURS.items():
        tag = tag.replace(colour, f"var(--{name})")
    return tag


@contextlib.contextmanager
def _style(salt: str) -> Iterator[None]:
    """Apply our style instead of the user's, with ids that depend on the chart alone."""
    from matplotlib import style

    with warnings.catch_warnings(), style.context(["default", {**STYLE, "svg.hashsalt": salt}]):
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a model's name may be in any script
        yield
