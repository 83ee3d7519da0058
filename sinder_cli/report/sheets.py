"""Several tiles on one picture, with their labels and a colour scale: a file that explains itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sinder_cli.report.scales import ColourScale
from sinder_cli.report.tiles import Tile

if TYPE_CHECKING:
    from sinder_cli.report.figures import Picture

TILE = 256  # pixels of a tile's longer side, about
COLUMNS = 6  # tiles in a row, at most
GAP, LINE, TEXT = 14, 24, 15  # pixels: between tiles, a line of text, its letters
BAR = (320, 12)  # pixels of a colour scale
INK, SOFT, VOID = "#1d1c1a", "#5f5b55", "#ebe8e2"


class Row(NamedTuple):
    """Tiles side by side under a heading, which may be empty."""

    heading: str
    tiles: Sequence[Tile]


def sheet(rows: Sequence[Row], scale: ColourScale | None = None) -> Picture:
    """All rows under each other on white, the colour scale below them, `[H, W, 3]`."""
    import numpy as np
    from PIL import Image, ImageDraw

    rows = [part for row in rows for part in _wrapped(row)]
    height, width = _tile_size([tile.picture for row in rows for tile in row.tiles if tile.picture is not None])
    columns = max(len(row.tiles) for row in rows)
    across = max(columns * (width + GAP) + GAP, BAR[0] + 4 * GAP)
    down = GAP + sum((LINE if row.heading else 0) + LINE + height + GAP for row in rows)
    canvas = Image.new("RGB", (across, down + (BAR[1] + 2 * LINE + GAP if scale else 0)), "white")
    draw = ImageDraw.Draw(canvas)
    y = GAP
    for row in rows:
        if row.heading:
            _write(draw, (GAP, y), row.heading, across - 2 * GAP, INK)
            y += LINE
        for column, tile in enumerate(row.tiles):
            x = GAP + column * (width + GAP)
            _write(draw, (x, y), tile.label, width, SOFT)
            canvas.paste(_fitted(tile.picture, height, width), (x, y + LINE))
        y += LINE + height + GAP
    if scale:
        _draw_scale(canvas, draw, y, scale)
    return np.asarray(canvas)


def _wrapped(row: Row) -> list[Row]:
    starts = range(0, len(row.tiles), COLUMNS)
    return [Row("" if start else row.heading, row.tiles[start : start + COLUMNS]) for start in starts]


def _tile_size(pictures: Sequence[Picture]) -> tuple[int, int]:
    """Whole pixels a patch, of the smallest picture: that of a map."""
    h, w = min((picture.shape[:2] for picture in pictures), default=(1, 1))
    factor = max(1, TILE // max(h, w))
    return h * factor, w * factor


def _fitted(picture: Picture | None, height: int, width: int) -> Any:
    """A map with patches as squares, a photograph smoothly; grey where there is no picture."""
    from PIL import Image

    if picture is None:
        return Image.new("RGB", (width, height), VOID)
    coarse = height % picture.shape[0] == 0 and width % picture.shape[1] == 0
    filter = Image.Resampling.NEAREST if coarse else Image.Resampling.LANCZOS
    return Image.fromarray(picture).resize((width, height), filter)


def _draw_scale(canvas: Any, draw: Any, y: int, scale: ColourScale) -> None:
    from PIL import Image

    left = 2 * GAP
    canvas.paste(Image.fromarray(scale.bar(*BAR)), (left, y))
    for tick in scale.ticks:
        x = left + tick.at * (BAR[0] - 1)
        draw.line([(x, y + BAR[1]), (x, y + BAR[1] + 4)], fill=SOFT)
        draw.text((x, y + BAR[1] + 5), tick.label, fill=SOFT, font=_font(TEXT - 3), anchor="ma")
    _write(draw, (left, y + BAR[1] + LINE), scale.label, canvas.width - left, SOFT)


def _write(draw: Any, place: tuple[int, int], text: str, width: int, colour: str) -> None:
    """One line, shortened in its middle where it does not fit."""
    font = _font(TEXT)
    shown = text
    for kept in range(len(text) // 2, 0, -1):
        if draw.textlength(shown, font=font) <= width:
            break
        shown = f"{text[:kept]}…{text[-kept:]}"
    draw.text(place, shown, fill=colour, font=font)


@cache
def _font(size: int) -> Any:
    """The letters that matplotlib brings, Greek ones among them."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
