"""Every mode that Pillow opens a file in → RGB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Values = np.ndarray[Any, np.dtype[np.float64]]

WHITE_16_BIT = 65535.0


def to_rgb(image: Image) -> Image:
    """The image in mode RGB: deep greyscale scaled to 8 bits, transparency laid over white, the rest by Pillow.

    Raises whatever Pillow does for a mode that it cannot convert.
    """
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.mode == "F":
        return _from_floats(image)
    if image.mode == "La":  # premultiplied; Pillow knows no shorter way
        return _over_white(image.convert("LA"))
    if image.mode in {"RGBA", "LA", "PA", "RGBa"} or "transparency" in image.info:
        return _over_white(image)
    return image.convert("RGB")


def _over_white(image: Image) -> Image:
    from PIL import Image as pillow

    rgba = image.convert("RGBA")
    return pillow.alpha_composite(pillow.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _from_integers(image: Image) -> Image:
    """0 … 65535 → 0 … 255, also in 32 bits: Pillow opens 16-bit PGM, and 16-bit TIFF with a sign, as 32-bit."""
    import numpy as np

    values = np.asarray(image, dtype=np.float64)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # one grey value of a 16-bit PNG
        values = np.where(values == transparent, WHITE_16_BIT, values)
    return _from_greys(values.clip(0, WHITE_16_BIT) * (255 / WHITE_16_BIT))


def _from_floats(image: Image) -> Image:
    """0 … 1 → 0 … 255, or 0 … the largest value if that is more than 1; NaN is black."""
    import numpy as np

    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = np.asarray(image, dtype=np.float64)
    top = max(float(values.max(initial=0.0, where=np.isfinite(values))), 1.0)
    return _from_greys(np.nan_to_num(values, nan=0.0).clip(0, top) * (255 / top))


def _from_greys(values: Values) -> Image:
    import numpy as np
    from PIL import Image as pillow

    return pillow.fromarray(values.round().astype(np.uint8)).convert("RGB")
