"""Task `discovery`: unsupervised object discovery by LOST (Siméoni et al., 2021), on any images with boxes.

Two patches are alike if the dot product of their keys exceeds a threshold, 0 as published. The seed is the patch that
is like the fewest others; the k patches with the fewest, as far as they are like the seed, vote for what belongs to the
object; the connected part with the seed is boxed.
CorLoc: the share of images whose box has IoU ≥ 0.5 with any true one.

Shapes: h × w patches, N width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from sinder_cli import Backbone, hookimpl
from sinder_cli.tasks import (
    Box,
    Boxes,
    Dataset,
    Figure,
    Part,
    Pixels,
    Places,
    Scores,
    Scoring,
    SideFeatures,
    Task,
    TaskSettings,
    View,
    boxed_images,
    mean_figure,
)

if TYPE_CHECKING:
    from torch import Tensor

SINDER_API = 1
SEES = "It sees one box an image, and whether half of it is right: small changes of the features leave it as it is."
Steering = Literal["key", "query", "value"]
PARTS: tuple[Steering, ...] = ("key", "query", "value")
NATIVE, SCALED = "native", "scaled"  # kinds of views: as the images are, or scaled to a size
AT_A_TIME = 1024  # patches that are compared with all others
LEAST_IOU = 0.5


class DiscoverySettings(TaskSettings):
    """Settings of `discovery`."""

    split: str | None = None  # of VOC, such as trainval, or of COCO, such as val2017
    k: int = Field(100, ge=1)  # patches with the fewest alike
    part: Steering = "key"
    bias: float | None = Field(None, ge=0, lt=1)  # threshold as a quantile of an image's dot products; default: 0
    most_tokens: int = Field(8192, ge=25)  # images in their own size with more patches are scaled down
    sweep: bool = False
    sweep_blocks: int = Field(3, ge=1)  # last blocks
    sweep_biases: tuple[float, ...] = (0.25, 0.5, 0.75)  # beside a threshold of 0

    @field_validator("sweep_biases", mode="before")
    @classmethod
    def _several(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("sweep_biases")
    @classmethod
    def _quantiles(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= each < 1 for each in value):
            raise ValueError("give quantiles from 0 to below 1, such as 0.25,0.5")
        return value


@dataclass(frozen=True)
class Choice:
    """One way to compare patches: which part of which block, counted from the end, and which threshold."""

    part: Steering
    block: int = -1
    bias: float | None = None

    def __str__(self) -> str:
        block = "last block" if self.block == -1 else f"block {-self.block} from the end"
        threshold = "0" if self.bias is None else f"quantile {self.bias:g}"
        return f"{self.part} of the {block}, threshold {threshold}"


def read(places: Places, settings: DiscoverySettings) -> Dataset:
    """Read images with boxes."""
    return boxed_images(places, settings.split)


def views(backbone: Backbone, size: int | None, settings: DiscoverySettings) -> Mapping[str, View]:
    """Show images as they are, or scaled to the size asked for: a view for every block that is tried."""
    resize: Literal["fit", "none"] = "none" if size is None else "fit"
    kind = NATIVE if size is None else SCALED
    parts: tuple[Part, ...] = PARTS if settings.sweep else (settings.part,)
    blocks = range(-1, -1 - min(settings.sweep_blocks, backbone.depth), -1) if settings.sweep else (-1,)
    side, most = size or backbone.image_size, settings.most_tokens if size is None else None
    return {f"{kind} {block}": View(parts, side, resize, block=block, most_tokens=most) for block in blocks}


def score(scoring: Scoring) -> Scores:
    """Return CorLoc as published, and, with a sweep, that of the best way to compare patches."""
    import torch

    settings = scoring.settings
    usual = Choice(settings.part, -1, settings.bias)
    overlaps = torch.tensor(_overlaps(scoring, usual), dtype=torch.float64)
    figures = [mean_figure("CorLoc", (overlaps >= LEAST_IOU).double(), caution=SEES)]
    notes = _words_on_scaling(scoring)
    if settings.sweep:
        tried = [usual, *(choice for choice in _choices(scoring) if choice != usual)]
        hits = [overlaps >= LEAST_IOU]
        hits += [torch.tensor(_overlaps(scoring, choice)) >= LEAST_IOU for choice in tried[1:]]
        figures.append(best_figure(f"CorLoc, best of {len(tried)}", torch.stack(hits, dim=1)))
        best = int(torch.stack(hits).sum(dim=1).argmax())  # the first of equals
        notes += (f"best: {tried[best]}; chosen on the images that it is reported on",)
    return Scores(tuple(figures), by_image=overlaps, picture=lambda index: _picture(scoring, usual, index), notes=notes)


def best_figure(name: str, hits: Tensor) -> Figure:
    """Return the figure that is the share of images that the best of several ways gets right, bool `[images, ways]`.

    It chooses anew in every resample of the images.
    """
    import torch

    statistics = torch.cat([hits.double(), torch.ones(len(hits), 1, dtype=torch.float64)], dim=1)
    return Figure(name, statistics, lambda sums: sums[..., :-1].amax(dim=-1) / sums[..., -1])


def _words_on_scaling(scoring: Scoring) -> tuple[str, ...]:
    """Return how many images were too large to be taken in their own size, if any were."""
    if not next(iter(scoring.features.test)).startswith(NATIVE):
        return ()
    most = scoring.settings.most_tokens
    scaled = sum(math.prod(_own_grid(truth, scoring.patch_size)) > most for truth in scoring.dataset.truth)
    return (f"{scaled:,} images scaled down to at most {most:,} patches",) if scaled else ()


def _choices(scoring: Scoring) -> Iterator[Choice]:
    for name in scoring.features.test:
        block = int(name.split()[1])
        for part in PARTS:
            for bias in (None, *scoring.settings.sweep_biases):
                yield Choice(part, block, bias)


def _overlaps(scoring: Scoring, choice: Choice) -> list[float]:
    """Return for every image the IoU of the box that is found with the true box that it fits best."""
    found = [_found(scoring, choice, index)[0] for index in range(len(scoring.dataset.truth))]
    return [
        max(iou(box, true) for true in truth.boxes) for box, truth in zip(found, scoring.dataset.truth, strict=True)
    ]


def _found(scoring: Scoring, choice: Choice, index: int) -> tuple[Box, Box]:
    """Return the box that is found on one image, in its pixels and in patches."""
    name, tokens = _tokens(scoring.features, choice, index)
    box = lost_box(tokens, scoring.settings.k, choice.bias)
    truth: Boxes = scoring.dataset.truth[index]
    grid = (tokens.shape[0], tokens.shape[1])
    in_own_size = name.startswith(NATIVE) and grid == _own_grid(truth, scoring.patch_size)
    return in_pixels(box, grid, (truth.width, truth.height), scoring.patch_size if in_own_size else None), box


def _own_grid(truth: Boxes, patch: int) -> tuple[int, int]:
    """Return the rows and columns of whole patches of an image in its own size; one scaled down has fewer."""
    return truth.height // patch, truth.width // patch


def _tokens(features: SideFeatures, choice: Choice, index: int) -> tuple[str, Tensor]:
    """Return the name of the view of a choice, and its tokens `[h, w, N]` of one image."""
    name = next(name for name in features.test if name.endswith(f" {choice.block}"))
    return name, features.test[name].part(choice.part, index)


def lost_box(tokens: Tensor, k: int, bias: float | None = None) -> Box:
    """Return the box that LOST finds (left, top, right, bottom; in patches), for tokens `[h, w, N]`.

    `bias` is the quantile of the dot products above which two patches are alike; with None, those above 0 are. Of
    patches that are like equally few others, the first is taken, row by row.
    """
    import numpy as np
    import torch
    from scipy.ndimage import label

    grid = (tokens.shape[0], tokens.shape[1])
    flat = tokens.float().flatten(0, 1).nan_to_num(0, 0, 0)
    threshold = 0.0 if bias is None else _quantile(flat, bias)
    order = _alike(flat, threshold).argsort(stable=True)
    seed = int(order[0])
    few = order[:k]
    near = few[flat[few] @ flat[seed] > threshold]
    if seed not in near.tolist():
        near = torch.cat([order[:1], near])
    votes = flat @ flat[near].sum(dim=0) - threshold * len(near)
    mask = votes > 0
    mask[seed] = True
    parts, _ = label(mask.view(grid).numpy())
    rows, columns = np.nonzero(parts == parts.flat[seed])
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def _alike(flat: Tensor, threshold: float) -> Tensor:
    """Return with how many others each token has a dot product above the threshold, `[patches]`."""
    import torch

    counts = [(part @ flat.T > threshold).sum(dim=1) for part in flat.split(AT_A_TIME)]
    return torch.cat(counts) - (flat.square().sum(dim=1) > threshold).long()


def _quantile(flat: Tensor, bias: float) -> float:
    """Return a quantile of the dot products of pairs of tokens, of about 1024 of them where there are more."""
    import torch

    some = flat[:: -(-len(flat) // AT_A_TIME)]
    products = (some @ some.T)[~torch.eye(len(some), dtype=torch.bool)]
    return products.quantile(bias).item()


def in_pixels(box: Box, grid: tuple[int, int], size: tuple[int, int], patch: int | None) -> Box:
    """Return a box in patches of a grid (h, w) as pixels of an image (width, height), within the image.

    With a patch size, the view is the image's centre of whole patches; with None, it is the image scaled.
    """
    (h, w), (width, height) = grid, size
    side_x, side_y = (width / w, height / h) if patch is None else (float(patch), float(patch))
    left, top = (0, 0) if patch is None else ((width - w * patch) // 2, (height - h * patch) // 2)
    x0, y0, x1, y1 = box
    return (
        left + x0 * side_x,
        top + y0 * side_y,
        min(left + x1 * side_x, float(width)),
        min(top + y1 * side_y, float(height)),
    )


def iou(one: Box, other: Box) -> float:
    """Return the area that two boxes share over the area that they cover."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    covered = _area(one) + _area(other) - shared
    return shared / covered if covered > 0 else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _picture(scoring: Scoring, choice: Choice, index: int) -> Pixels:
    """Draw three principal components of the tokens that are compared, and the box that is found."""
    from sinder_cli.tasks import enlarged, pca_picture, with_boxes

    _, tokens = _tokens(scoring.features, choice, index)
    _, reference = _tokens(scoring.original, choice, index)
    picture, side = enlarged(pca_picture(tokens, reference))
    left, top, right, bottom = _found(scoring, choice, index)[1]
    return with_boxes(picture, [(left * side, top * side, right * side, bottom * side)])


def truth_picture(dataset: Dataset, index: int) -> Pixels:
    """Draw one test image with its true boxes."""
    from sinder_cli.tasks import shrunk, with_boxes

    picture, factor = shrunk(dataset.test.load(index))
    boxes: Sequence[Any] = dataset.truth[index].boxes
    return with_boxes(picture, [tuple(side * factor for side in box) for box in boxes])


TASK = Task(
    name="discovery",
    summary="object discovery by LOST; images with boxes",
    protocol="LOST: unless set otherwise, keys of the last block before rotary positions, k 100, alike if the dot"
    " product is above 0; CorLoc at IoU 0.5 with any box. All of VOC's boxes count, difficult ones too; COCO's"
    " crowds do not. Images are taken in their own size, cut to whole patches at the centre (published:"
    " padded), scaled down if they have over 8,192 patches (most_tokens), or scaled with --image-size. A sweep"
    " tries the same features and thresholds on every side and reports the best, chosen on the same images.",
    read=read,
    views=views,
    score=score,
    settings=DiscoverySettings,
    truth=truth_picture,
    requires=("scipy",),
)


@hookimpl
def sinder_task() -> Task:
    """Return the task."""
    return TASK
