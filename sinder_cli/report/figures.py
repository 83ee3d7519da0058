"""Patch tokens and images as RGB pictures: pure functions, arrays in and arrays out.

Shapes: K images, h × w patches, N the width of the model; a picture is `[H, W, 3]` in uint8.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Picture = NDArray[np.uint8]

COLOUR_MAP = "inferno"  # perceptually uniform
CLIP_PERCENTILES = (1.0, 99.0)  # of a principal component, over both sides: beyond them a colour saturates
MAP_PIXELS = 512  # side that a map of patches is enlarged to, at most


def norm_map(norms: Tensor, low: float, high: float) -> Picture:
    """Norms `[h, w]` → `[h, w, 3]`; colours run logarithmically from `low` to `high` and saturate beyond them."""
    from matplotlib import colormaps

    colours: Picture = colormaps[COLOUR_MAP](_log_position(norms, low, high), bytes=True)
    return colours[..., :3]


def norm_range(*sides: Tensor) -> tuple[float, float]:
    """The smallest positive and the largest norm of all sides: one scale for all of them."""
    import torch

    norms = torch.cat([side.flatten() for side in sides])
    positive = norms[norms > 0]
    if not len(positive):
        return 1.0, 1.0
    return positive.min().item(), positive.max().item()


def colour_bar(width: int = 256, height: int = 12) -> Picture:
    """The colour map from its lowest to its highest colour, `[height, width, 3]`."""
    import numpy as np
    from matplotlib import colormaps

    row = colormaps[COLOUR_MAP](np.linspace(0, 1, width), bytes=True)[:, :3]
    bar: Picture = np.repeat(row[None], height, axis=0)
    return bar


def pca_maps(before: Tensor, after: Tensor) -> tuple[Picture, Picture]:
    """Patch tokens `[K, h, w, N]` of both sides → RGB `[K, h, w, 3]` each, in one shared basis and colour range.

    Red, green and blue are principal components 1–3 of the tokens of all images and both sides together.
    """
    import numpy as np

    mean, basis = principal_components([*before.flatten(1, 2), *after.flatten(1, 2)])
    projected = [((side.double() - mean) @ basis).numpy() for side in (before, after)]  # [K, h, w, 3]
    pooled = np.concatenate([side.reshape(-1, 3) for side in projected])
    low, high = np.percentile(pooled, CLIP_PERCENTILES, axis=0)
    pictures = [_to_bytes(_linear_position(side, low, high)) for side in projected]
    return pictures[0], pictures[1]


def principal_components(groups: list[Tensor], count: int = 3) -> tuple[Tensor, Tensor]:
    """Mean `[N]` and the leading eigenvectors `[N, count]` of the covariance of all tokens in `groups` of `[M, N]`.

    Deterministic: a full symmetric eigendecomposition in float64, and of the two signs of a vector the one that
    makes its largest entry positive. Fewer than `count` dimensions are filled up with zeros.
    """
    import torch
    from torch.nn.functional import pad

    mean = torch.stack([group.double().sum(0) for group in groups]).sum(0) / sum(len(group) for group in groups)
    scatter = mean.new_zeros(len(mean), len(mean))
    for group in groups:  # one image at a time: ViT-g's pooled tokens would be 200 MB in float64
        centred = group.double() - mean
        scatter += centred.T @ centred
    vectors = torch.linalg.eigh(scatter).eigenvectors.flip(1)[:, :count]  # [N, count], largest eigenvalue first
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return mean, pad(vectors * largest.sign(), (0, count - vectors.shape[1]))


def picture(pixels: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Picture:
    """A normalized input `[3, H, W]` as the image it was, `[H, W, 3]`."""
    values = pixels.float() * pixels.new_tensor(std).view(3, 1, 1) + pixels.new_tensor(mean).view(3, 1, 1)
    return _to_bytes(values.permute(1, 2, 0).numpy().clip(0, 1))


def enlarged(rgb: Picture, side: int = MAP_PIXELS) -> Picture:
    """Every patch as a square of whole pixels, as large as fits into `side` × `side`; no smoothing."""
    factor = max(1, side // max(rgb.shape[:2]))
    return rgb.repeat(factor, axis=0).repeat(factor, axis=1)


def encoded(rgb: Picture, kind: Literal["png", "jpeg"] = "png") -> bytes:
    """The bytes of an image file: PNG for maps, which keep every colour; JPEG for photographs."""
    from PIL import Image

    file = io.BytesIO()
    options = {"optimize": True} if kind == "png" else {"quality": 88}
    Image.fromarray(rgb).save(file, kind, **options)
    return file.getvalue()


def data_uri(rgb: Picture, kind: Literal["png", "jpeg"] = "png") -> str:
    """The picture as a `data:` URI, so that a page needs no second file."""
    return f"data:image/{kind};base64,{base64.b64encode(encoded(rgb, kind)).decode('ascii')}"


def _log_position(norms: Tensor, low: float, high: float) -> NDArray[Any]:
    """Where norms lie between `low` (0) and `high` (1) on a logarithmic scale; 0.5 where there is no range."""
    import numpy as np

    values = norms.double().numpy().clip(low, high)
    return _linear_position(np.log(values), np.log(low), np.log(high))


def _linear_position(values: NDArray[Any], low: Any, high: Any) -> NDArray[Any]:
    import numpy as np

    span = np.asarray(high - low)
    degenerate = span <= 0
    return np.where(degenerate, 0.5, (values - low) / np.where(degenerate, 1, span)).clip(0, 1)


def _to_bytes(values: NDArray[Any]) -> Picture:
    """Values in 0…1 → 0…255."""
    rounded: Picture = (values * 255).round().astype("uint8")
    return rounded
