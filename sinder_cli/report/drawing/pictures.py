"""Patch tokens and images as RGB pictures: pure functions, arrays in and arrays out.

Shapes: K images, h × w patches, N the width of the model; a picture is `[H, W, 3]` in uint8.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sinder_cli.report.drawing.canvas import ABSENT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Picture = NDArray[np.uint8]
    Span = tuple[NDArray[Any], NDArray[Any]]  # the values [3] shown as 0 and as full red, green and blue

CLIP_PERCENTILES = (1.0, 99.0)  # of a principal component, over all maps: beyond them a colour saturates
MAP_PIXELS = 512  # largest side to which a map of patches is enlarged


Kind = Literal["png", "jpeg"]


class ImageFile(NamedTuple):
    """The bytes of an image file."""

    kind: Kind
    content: bytes

    @property
    def suffix(self) -> str:
        """The suffix of the file's name."""
        return ".jpg" if self.kind == "jpeg" else ".png"

    @property
    def uri(self) -> str:
        """The image as a `data:` URI, so that a page needs no second file."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.content).decode('ascii')}"


class Panel(NamedTuple):
    """One picture of a page: its caption, a description for readers who cannot see it, and the image or None."""

    caption: str
    alt: str
    image: ImageFile | None
    sharp: bool = False  # the browser enlarges it without smoothing: every patch is a square


class LabelledPicture(NamedTuple):
    """One picture: its label, a description for readers who cannot see it, and its colours or None."""

    label: str
    alt: str
    picture: Picture | None


def pca_maps(before: Tensor, after: Tensor) -> tuple[Picture, Picture]:
    """Return patch tokens `[K, h, w, N]` of both sides as RGB `[K, h, w, 3]`, in one shared basis and colour range.

    Red, green and blue are principal components 1–3 of the tokens of all images and both sides together.
    """
    from sinder_cli.analysis.directions import Moments

    moments = Moments(before.shape[-1])
    for image in (*before, *after):  # one at a time: ViT-g's pooled tokens would be 200 MB in float64
        moments.add(image.flatten(0, 1))
    basis = moments.basis()
    one, two = basis.project(before), basis.project(after)  # [K, h, w, 3]
    span = clip_range([one, two])
    return pca_map(one, span), pca_map(two, span)


def clip_range(components: Sequence[Tensor]) -> Span:
    """Return the 1st and the 99th percentile of each principal component, over the finite tokens `[…, 3]`."""
    import numpy as np

    nothing = np.zeros((1, 3))
    pooled = np.concatenate([part.reshape(-1, 3).numpy() for part in components] or [nothing])
    finite = pooled[np.isfinite(pooled).all(axis=1)]
    low, high = np.percentile(finite if len(finite) else nothing, CLIP_PERCENTILES, axis=0)
    return low, high


def pca_map(components: Tensor, span: Span) -> Picture:
    """Return three principal components `[…, 3]` as red, green and blue; a token that is not finite is grey."""
    colours = to_bytes(linear_position(components.nan_to_num(0, 0, 0).numpy(), *span))
    colours[~components.isfinite().all(dim=-1).numpy()] = ABSENT
    return colours


def picture(pixels: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Picture:
    """Return the image `[H, W, 3]` of a normalized input `[3, H, W]`."""
    values = pixels.float() * pixels.new_tensor(std).view(3, 1, 1) + pixels.new_tensor(mean).view(3, 1, 1)
    return to_bytes(values.permute(1, 2, 0).numpy().clip(0, 1))


def enlarged(rgb: Picture, side: int = MAP_PIXELS) -> Picture:
    """Enlarge every patch to a square of whole pixels, as large as fits into `side` × `side`, without smoothing."""
    factor = max(1, side // max(rgb.shape[:2]))
    return rgb.repeat(factor, axis=0).repeat(factor, axis=1)


def reduced(rgb: Picture, side: int = MAP_PIXELS) -> Picture:
    """Return a photograph `[H, W, 3]` whose longer side is at most `side`."""
    factor = side / max(rgb.shape[:2])
    return resized(rgb, round(rgb.shape[0] * factor), round(rgb.shape[1] * factor)) if factor < 1 else rgb


def resized(rgb: Picture, height: int, width: int) -> Picture:
    """Return a photograph in another size, smoothly resampled."""
    import numpy as np
    from PIL import Image

    size = (max(1, width), max(1, height))
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS))


def encoded(rgb: Picture, kind: Kind = "png", texts: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of an image file: PNG for maps, which keeps every colour; JPEG for photographs.

    `texts` are stored inside a PNG, each under its keyword: as `tEXt`, or as `iTXt` if Latin-1 lacks a letter.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    file = io.BytesIO()
    if kind == "jpeg":
        Image.fromarray(rgb).save(file, kind, quality=88)
    else:
        information = PngInfo()
        for keyword, text in (texts or {}).items():
            information.add_text(keyword, text)
        Image.fromarray(rgb).save(file, kind, pnginfo=information)
    return file.getvalue()


def image_file(rgb: Picture, kind: Kind = "png") -> ImageFile:
    """Encode a picture, to be shown inside a page or written as a file."""
    return ImageFile(kind, encoded(rgb, kind))


def log_position(norms: Tensor, low: float, high: float) -> NDArray[Any]:
    """Return where norms lie between `low` (0) and `high` (1) on a log scale; 0.5 if the range is empty."""
    import numpy as np

    values = norms.double().numpy().clip(low, high)
    return linear_position(np.log(values), np.log(low), np.log(high))


def linear_position(values: NDArray[Any], low: Any, high: Any) -> NDArray[Any]:
    import numpy as np

    span = np.asarray(high - low)
    degenerate = span <= 0
    return np.where(degenerate, 0.5, (values - low) / np.where(degenerate, 1, span)).clip(0, 1)


def to_bytes(values: NDArray[Any]) -> Picture:
    """Return values in 0…1 as bytes in 0…255."""
    rounded: Picture = (values * 255).round().astype("uint8")
    return rounded
