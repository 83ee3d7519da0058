"""Pictures of what tasks find: principal components of tokens as colours, maps of numbers, boxes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from sinder_cli.evaluation.contract import Pixels

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MAP_COLOURS = "viridis"
MOST_SIDE = 512  # pixels of a picture


def pca_picture(patches: Tensor, reference: Tensor) -> Pixels:
    """Return three components of tokens `[h, w, N]` as RGB `[h, w, 3]`, in the basis and range of reference tokens.

    The same reference for several sides gives them the same colours. Tokens that are not finite are black.
    """
    flat = reference.flatten(0, 1).nan_to_num(posinf=0, neginf=0)
    mean = flat.mean(dim=0)
    basis = torch.linalg.eigh(((flat - mean).T @ (flat - mean)).double()).eigenvectors.flip(1)[:, :3].float()
    signs = basis.gather(0, basis.abs().argmax(dim=0)[None]).sign()  # the same tokens, the same colours
    own = (flat - mean) @ (basis * signs)
    low, high = (torch.quantile(own, at, dim=0) for at in (0.02, 0.98))
    shown = ((patches - mean) @ (basis * signs) - low) / (high - low).clamp_min(1e-12)
    return (shown.nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def map_picture(values: Tensor, low: float, high: float) -> Pixels:
    """Return a map `[h, w]` in the colours of viridis, from dark at `low` to light at `high`; black where it is NaN."""
    import numpy as np
    from matplotlib import colormaps

    at = ((values.double() - low) / max(high - low, 1e-12)).clamp(0, 1).numpy()
    colours = np.round(colormaps[MAP_COLOURS](np.nan_to_num(at))[..., :3] * 255).astype(np.uint8)
    return np.where(np.isnan(at)[..., None], np.uint8(0), colours)


def shrunk(image: Image) -> tuple[Pixels, float]:
    """Return an image as a picture of at most 512 pixels a side, and the factor by which it was made smaller."""
    import numpy as np

    factor = min(1.0, MOST_SIDE / max(image.size))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return np.asarray(image if factor == 1 else image.resize(size)), factor


def enlarged(picture: Pixels) -> tuple[Pixels, int]:
    """Return a picture of patches, each as a square of as many pixels as 512 a side allow, and that number."""
    side = max(1, MOST_SIDE // max(picture.shape[:2]))
    return picture.repeat(side, axis=0).repeat(side, axis=1), side


def with_boxes(picture: Pixels, boxes: Iterable[tuple[float, float, float, float]]) -> Pixels:
    """Return a picture with outlines of boxes (left, top, right, bottom; in its pixels), yellow on black."""
    import numpy as np
    from PIL import Image as pillow
    from PIL import ImageDraw

    image = pillow.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for left, top, right, bottom in boxes:
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        for colour, width in (("black", 4), ("yellow", 2)):
            draw.rectangle(corners, outline=colour, width=width)
    return np.asarray(image)
