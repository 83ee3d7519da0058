"""The contract of a task plugin: the hook that it implements, and what it is given and returns.

A task reads its data, says how images are shown to a backbone, and scores the features of one side at a time. The
engine runs the backbones, keeps their features on disk, derives the placebos, and compares the sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import pluggy

from sinder_cli.backbone.hooks import PROJECT
from sinder_cli.evaluation.settings import TaskSettings
from sinder_cli.events import Emit, silent

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from sinder_cli.backbone.contract import Backbone
    from sinder_cli.images.sources import ImageSource


Pixels: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"  # a picture, [H, W, 3]
hookspec = pluggy.HookspecMarker(PROJECT)


@hookspec(firstresult=True)
def sinder_task() -> Task:
    """Return the task that this plugin offers, without importing torch; its entry point has the name of the task."""
    raise AssertionError


Part = Literal[
    "cls",  # [N] after the final norm
    "mean",  # [N]: the mean of the patches after the final norm
    "patches",  # [h, w, N] after the final norm
    "stream",  # [h, w, N]: the last block's patches before the final norm
    "stream_cls",  # [N] before the final norm
    "query",  # [h, w, N']: of a block's attention, all heads, before rotary positions and norms
    "key",
    "value",
    "norms",  # [blocks, h, w]: of the residual stream after each block
    "outlying",  # bool [h, w]: outlying at some block of this side, as defects are
    "outlying_by_block",  # bool [blocks, h, w]
    "colour",  # [h, w, 3]: the mean of each patch's pixels, 0 to 1
]
OF_PATCHES: frozenset[Part] = frozenset({"mean", "patches", "stream", "query", "key", "value"})
SideName = Literal["original", "repaired", "inpainted", "smoothed", "blurred"]


@dataclass(frozen=True)
class View:
    """How images are shown to a backbone, and which parts of its pass are kept.

    `resize`: `fit` scales the shorter side to `size` and both sides to the nearest whole patches, so that nothing is
    cut off; `square` scales the shorter side to `size` and cuts the centre; `none` only cuts to whole patches,
    but scales an image of more than `most_tokens` patches down to at most that many, and cuts nothing off then. With
    `crop`, the centre square of that side is cut after scaling. `shift` patches are then cut off at the top and the
    left. With `window`, the image is seen through overlapping square windows of that side, `stride` pixels apart (both
    whole patches), and tokens are averages over the windows that show them. With `flip`, left and right are exchanged
    at the end. Queries, keys and values are those of `block`, counted from the end; all other parts, of the last block.
    """

    parts: tuple[Part, ...]
    size: int  # pixels
    resize: Literal["fit", "square", "none"] = "fit"
    crop: int | None = None  # pixels
    shift: int = 0  # patches
    window: int | None = None  # pixels
    stride: int | None = None  # pixels
    flip: bool = False
    block: int = -1
    most_tokens: int | None = None


@dataclass(frozen=True)
class Dataset:
    """Images with their truth, in two splits; a task without training has only the second.

    `truth` and `train_truth` are whatever the task needs, one an image: a class, the path of a label image, boxes.
    """

    test: ImageSource
    truth: Sequence[Any]
    train: ImageSource | None = None
    train_truth: Sequence[Any] = ()
    classes: tuple[str, ...] = ()
    note: str = ""  # how the data were read and split, in one line


@dataclass(frozen=True)
class Places:
    """Where the user says that data lie: files, folders or lists; `-` is standard input."""

    data: tuple[str, ...]
    train: tuple[str, ...] = ()
    seed: int = 0
    emit: Emit = silent
    images: Callable[[], ImageSource] = field(repr=False, default=NotImplemented)  # all images in `data`, or drawn ones


class Features(Protocol):
    """The features of one side, of the images of one split in one view."""

    def __len__(self) -> int: ...

    def part(self, name: Part, index: int) -> Tensor:
        """Return one part of one image on the CPU: float32, or bool for `outlying`."""
        ...

    def stacked(self, name: Part) -> Tensor:
        """Return a part of all images, `[images, …]`, which must have one shape."""
        ...


@dataclass(frozen=True)
class SideFeatures:
    """The features of one side by view: of the images to be scored, and of those to train on."""

    test: Mapping[str, Features]
    train: Mapping[str, Features] = field(default_factory=dict)


@dataclass(frozen=True)
class Scoring:
    """What a task gets to score one side; the same for all sides but for `features` and `side`."""

    features: SideFeatures
    dataset: Dataset
    settings: Any  # the task's own
    original: SideFeatures  # of the original, whatever side is scored
    inpainted: SideFeatures | None = None  # of the inpainted original, if it is evaluated
    side: SideName = "original"  # the one that is scored
    has_cls: bool = True
    patch_size: int = 1  # pixels
    seed: int = 0
    device: str = "cpu"
    emit: Emit = silent


@dataclass(frozen=True)
class Figure:
    """One measured figure of one side: statistics of each image, and what their sum over images amounts to.

    Keeping the statistics by image lets the engine resample images. `value` takes sums `[…, d]` to `[…]`, in float64;
    it returns NaN where there is nothing to measure. An image whose statistics are all 0 has nothing to measure: a
    difference between sides leaves it out of both.
    """

    name: str
    statistics: Tensor  # [images, d] float64
    value: Callable[[Tensor], Tensor]
    better: Literal["higher", "lower", "neither"] = "higher"
    unit: Literal["%", ""] = "%"  # %: the value is a fraction, shown × 100
    noise: float = 0.0  # difference, in shown units, that published repetitions of the protocol have
    caution: str = ""  # what the figure cannot see, in one sentence


@dataclass(frozen=True)
class Scores:
    """What a task finds on one side.

    `by_image` `[images]` ranks images by how well the side does, for the pictures (higher is better). `picture` draws
    what the side finds on one image. `notes` say what was chosen on the way, such as a regularization.
    """

    figures: tuple[Figure, ...]
    by_image: Tensor | None = None
    picture: Callable[[int], Pixels] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """One way to evaluate features.

    `read` finds the data and raises `BadInputError`, which names the file, for whatever is malformed. `views` names the
    views that the task needs, for a backbone. `score` scores one side. `truth` draws the truth of one test image.
    `protocol` says in a sentence or two what is done and how it differs from the published way.
    """

    name: str
    summary: str
    protocol: str
    read: Callable[[Places, Any], Dataset]
    views: Callable[[Backbone, int | None, Any], Mapping[str, View]]  # (backbone, image size asked for, settings)
    score: Callable[[Scoring], Scores]
    settings: type[TaskSettings] = TaskSettings
    truth: Callable[[Dataset, int], Pixels] | None = None
    requires: tuple[str, ...] = ()  # modules of the extra `evaluate` that must be installed


def mean_figure(
    name: str,
    values: Tensor,
    better: Literal["higher", "lower", "neither"] = "higher",
    unit: Literal["%", ""] = "%",
    noise: float = 0.0,
    weights: Tensor | None = None,
    caution: str = "",
) -> Figure:
    """Return the figure that is the mean of one value an image, `[images]`; NaN values are left out.

    With `weights` `[images]`, `values` are sums over as many tokens, and the figure is their mean over all tokens.
    """
    import torch

    numbers = values.double()
    counts = torch.ones_like(numbers) if weights is None else weights.double()
    known = numbers.isfinite() & (counts > 0)
    pairs = torch.stack([numbers.where(known, 0), counts.where(known, 0)], dim=1)
    return Figure(name, pairs, _ratio, better, unit, noise, caution)


def _ratio(sums: Tensor) -> Tensor:
    return sums[..., 0] / sums[..., 1]
