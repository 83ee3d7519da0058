"""One picture made of rows of labelled pictures, with a colour scale below them: a file that explains itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sinder_cli.report.drawing.canvas import FAINT, INK, SOFT
from sinder_cli.report.drawing.pictures import LabelledPicture
from sinder_cli.report.drawing.scales import ColourScale

if TYPE_CHECKING:
    from sinder_cli.report.drawing.pictures import Picture

SIDE = 256  # pixels of a picture's longer side, about
COLUMNS = 6  # pictures in a row, at most
GAP, LINE, TEXT = 14, 24, 15  # pixels: between pictures, a line of text, its letters
BAR = (320, 12)  # pixels of a colour scale


class Row(NamedTuple):
    """Pictures side by side under a heading, which may be empty."""

    heading: str
    pictures: Sequence[LabelledPicture]


def draw_rows(rows: Sequence[Row], scale: ColourScale | None = None) -> Picture:
    """Draw all rows below each other on white, with the colour scale at the bottom; return `[H, W, 3]`."""
    import numpy as np
    from PIL import Image, ImageDraw

    rows = [part for row in rows for part in _wrapped(row)]
    height, width = _size([each.picture for row in rows for each in row.pictures if each.picture is not None])
    columns = max(len(row.pictures) for row in rows)
    across = max(columns * (width + GAP) + GAP, BAR[0] + 4 * GAP)
    down = GAP + sum((LINE if row.heading else 0) + LINE + height + GAP for row in rows)
    canvas = Image.new("RGB", (across, down + (BAR[1] + 2 * LINE + GAP if scale else 0)), "white")
    draw = ImageDraw.Draw(canvas)
    y = GAP
    for row in rows:
        if row.heading:
            _write(draw, (GAP, y), row.heading, across - 2 * GAP, INK)
            y += LINE
        for column, each in enumerate(row.pictures):
            x = GAP + column * (width + GAP)
            _write(draw, (x, y), each.label, width, SOFT)
            canvas.paste(_fitted(each.picture, height, width), (x, y + LINE))
        y += LINE + height + GAP
    if scale:
        _draw_scale(canvas, draw, y, scale)
    return np.asarray(canvas)


def below_each_other(pictures: Sequence[Picture]) -> Picture:
    """Return pictures `[H, W, 3]` of any sizes in one column, on white."""
    import numpy as np

    width = max(picture.shape[1] for picture in pictures)
    padded = [
        np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255) for picture in pictures
    ]
    column: Picture = np.concatenate(padded)
    return column


def _wrapped(row: Row) -> list[Row]:
    starts = range(0, len(row.pictures), COLUMNS)
    return [Row("" if start else row.heading, row.pictures[start : start + COLUMNS]) for start in starts]


def _size(pictures: Sequence[Picture]) -> tuple[int, int]:
    """Return height and width of every picture: those of the smallest, a map, times whole pixels per patch."""
    h, w = min((picture.shape[:2] for picture in pictures), default=(1, 1))
    factor = max(1, SIDE // max(h, w))
    return h * factor, w * factor


def _fitted(picture: Picture | None, height: int, width: int) -> Any:
    """Return a map with patches as squares, or a photograph smoothly resized; grey if there is no picture."""
    from PIL import Image

    if picture is None:
        return Image.new("RGB", (width, height), FAINT)
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
    """Write one line, shortened in its middle if it does not fit."""
    font = _font(TEXT)
    shown = text
    for kept in range(len(text) // 2, 0, -1):
        if draw.textlength(shown, font=font) <= width:
            break
        shown = f"{text[:kept]}…{text[-kept:]}"
    draw.text(place, shown, fill=colour, font=font)


@cache
def _font(size: int) -> Any:
    """Return the font that comes with matplotlib, which includes Greek letters."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
