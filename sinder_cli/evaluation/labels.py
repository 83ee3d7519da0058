"""Label images: the class of every pixel of an image, as indices in a PNG, TIFF or BMP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sinder_cli.errors import BadInputError, excerpt
from sinder_cli.images.decoding import UnreadableImageError, upright_size
from sinder_cli.memory import is_out_of_memory

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

ClassMap: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"  # [H, W]

IGNORED = -1  # in a map of classes: a pixel that does not count
MOST_CLASSES = 1000  # where nothing says how many there are
MOST_VALUE = 2**16  # of a label image
FORMATS = ("PNG", "TIFF", "BMP")
SUFFIXES = frozenset({".png", ".tif", ".tiff", ".bmp"})
INDEXED = frozenset({"1", "L", "P", "I", "I;16", "I;16B", "I;16L"})  # modes of one number a pixel


@dataclass(frozen=True)
class LabelRule:
    """What the values of label images mean.

    `ignored` is the value of pixels that do not count. With `zero_ignored`, 0 does not count either and the others
    move down by one; None leaves that to the layout. `classes` is None where only the labels say how many there are.
    A `table` gives the class of every value below its length; a class beyond the last is one that may not occur.
    """

    ignored: int | None = 255
    zero_ignored: bool | None = None
    classes: int | None = None
    table: tuple[int, ...] | None = None

    def classes_of(self, count: int) -> ClassMap:
        """Return the class of each of the values 0 … `count` − 1, `[count]`."""
        import numpy as np

        values = np.arange(count)
        if self.table is not None:
            table = np.asarray(self.table)
            known = np.where(values < len(table), table[np.minimum(values, len(table) - 1)], len(table))
        else:
            known = values - 1 if self.zero_ignored else values
        return known if self.ignored is None else np.where(values == self.ignored, IGNORED, known)

    def value(self, of_class: int) -> int:
        """Return the value that stands for a class, where there is no table."""
        return of_class + 1 if self.zero_ignored else of_class


@dataclass(frozen=True)
class LabelImage:
    """A label image, and what its values mean."""

    path: Path
    rule: LabelRule

    def read(self) -> ClassMap:
        """Return the class of each pixel, `[H, W]`, `IGNORED` where it does not count.

        Raises `BadInputError` for a file that cannot be read, one of colours, and a value out of range.
        """
        import numpy as np

        with _opened(self.path) as file:
            values = np.asarray(file).astype(np.int64)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= MOST_VALUE:
            raise self._out_of_range(low if low < 0 else high)
        found = self.rule.classes_of(high + 1)[values]
        strange = values[found >= (self.rule.classes or MOST_CLASSES)]
        if len(strange):
            raise self._out_of_range(int(strange.max()))
        return found

    def require_fitting(self, image: Path) -> None:
        """Compare sizes by the headers of both files. An image that cannot be read is left to its decoding.

        Raises `BadInputError` for labels of another size, of colours, and for a file that cannot be read.
        """
        with _opened(self.path) as file:
            own = file.size
        size = _size_of(image)
        if size is not None and size != own:
            sizes = f"it has {own[0]}×{own[1]} pixels, and {image.name} has {size[0]}×{size[1]}"
            raise BadInputError(f"cannot use {self.path}", sizes, "a label image has the size of its image")

    def _out_of_range(self, value: int) -> BadInputError:
        known = self.rule.classes
        why = f"label {value} is out of range: there are {known or f'at most {MOST_CLASSES}'} classes"
        return BadInputError(f"cannot use {self.path}", why, "see the settings classes and ignore_label of the task")


class _opened:  # noqa: N801  (a context manager, used as a function)
    """Open a label image and report whatever fails inside, naming the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Image:
        from PIL import Image as pillow

        try:
            self.file = pillow.open(self.path, formats=FORMATS)
        except Exception as error:
            self._report(error)
            raise
        if self.file.mode not in INDEXED:
            self.file.close()
            why = f"its pixels are colours ({self.file.mode}), not indices of classes"
            raise BadInputError(f"cannot use {self.path}", why, "write one number a pixel, or a palette")
        return self.file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.file.close()
        if isinstance(error, Exception) and not isinstance(error, BadInputError):
            self._report(error)

    def _report(self, error: Exception) -> None:
        if is_out_of_memory(error):
            return
        why = excerpt(str(error)) or type(error).__name__  # Pillow raises OSError, SyntaxError, struct.error, …
        raise BadInputError(f"cannot read the label image {self.path}", why) from error


def _size_of(image: Path) -> tuple[int, int] | None:
    """Return the width and height of an image once it is upright; None if it cannot be read."""
    try:
        return upright_size(image)
    except UnreadableImageError:
        return None
