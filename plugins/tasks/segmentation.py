"""Task `segmentation`: a linear layer on frozen patch tokens, by DINOv2's protocol without augmentation.

Batch norm and a linear layer read the last block's patch tokens after the final norm; AdamW minimizes the cross entropy
of logits that are upsampled to UPSAMPLED points a patch, where labels are read at the nearest pixel. At test, logits
are upsampled to the size of the labels. Features and labels are read one image at a time.
Shapes: h × w patches, N width, C classes, H × W pixels of the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from sinder_cli import Backbone, hookimpl
from sinder_cli.tasks import (
    IGNORED,
    Dataset,
    Features,
    LabelImage,
    Pixels,
    Places,
    Scores,
    Scoring,
    Task,
    View,
    labelled_images,
    tracked,
)

from . import TRAINED
from .labelling import (
    MIOU_NOISE,
    LabelSettings,
    by_image,
    class_picture,
    figures_by_class,
    figures_of,
    nearest,
    overlap,
    truth_picture,
    words_by_class,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

SINDER_API = 1
VIEW = "whole"
MOST_NAMED = 10  # classes in a note
UPSAMPLED = 4  # points along each side of a patch on which the loss is taken
WARM_UP = 1500 / 40000  # share of the steps
WARM_UP_FROM = 1e-6  # of the learning rate
INITIAL_DEVIATION = 0.01  # of the linear layer's weights
KEPT_LABELS = 2048  # label maps at the loss's points that are kept while a head is trained
MOST_LOGITS = 2**24  # upsampled at a time


class SegmentationSettings(LabelSettings):
    """Settings of `segmentation`."""

    steps: int = Field(2000, ge=1)
    images_a_step: int = Field(8, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    window: int | None = Field(None, ge=1)  # pixels; None: the whole image at once
    stride: int | None = Field(None, ge=1)  # pixels; None: windows do not overlap
    train_share: float = Field(0.8, gt=0, lt=1)
    by_class: bool = False  # the IoU of each class as a figure with its interval, too

    @model_validator(mode="after")
    def _covered(self) -> SegmentationSettings:
        if self.stride is not None and (self.window is None or self.stride > self.window):
            raise ValueError("a stride needs a window that is at least as large")
        return self


def read(places: Places, settings: SegmentationSettings) -> Dataset:
    """Read images with label images, in two splits."""
    return labelled_images(places, settings.rule, settings.train_share)


def views(backbone: Backbone, size: int | None, settings: SegmentationSettings) -> Mapping[str, View]:
    """Show whole images, through windows if that is asked for."""
    side = size or backbone.image_size
    return {VIEW: View(("patches",), side, window=settings.window, stride=settings.stride)}


def score(scoring: Scoring) -> Scores:
    """Return mIoU and accuracies of the head that is trained on this side's features."""
    import torch

    settings, dataset = scoring.settings, scoring.dataset
    classes, test = dataset.classes, scoring.features.test[VIEW]
    head, seen = trained_head(scoring)

    def found(index: int, size: tuple[int, int]) -> Tensor:
        return predicted(grid_logits(head, _patches(test, index, scoring.device)), size)

    counted = torch.zeros(len(test), 1, 3, len(classes), dtype=torch.int64)  # small tensors would pin freed memory
    for index, label in enumerate(tracked(dataset.truth, scoring.emit, "segmentation: test", len(test), "images")):
        truth = torch.from_numpy(label.read())
        counted[index, 0] = overlap(truth, found(index, (truth.shape[0], truth.shape[1])), len(classes))

    def picture(index: int) -> Pixels:
        height, width = dataset.truth[index].read().shape
        return class_picture(found(index, (height, width)).numpy())

    figures = figures_of(counted, MIOU_NOISE, TRAINED) + (
        figures_by_class(counted, classes) if settings.by_class else ()
    )
    notes = [words_by_class(counted, classes)]
    if unseen := [name for name, is_seen in zip(classes, seen.tolist(), strict=True) if not is_seen]:
        names = ", ".join(unseen[:MOST_NAMED]) + (", …" if len(unseen) > MOST_NAMED else "")
        notes.append(f"{len(unseen)} of {len(classes)} classes were never trained on: {names}")
    return Scores(figures, by_image=by_image(counted), picture=picture, notes=tuple(notes))


def new_head(width: int, classes: int, seed: int) -> nn.Module:
    """Return batch norm and a linear layer, initialized by the seed as mmsegmentation does."""
    import torch
    from torch import nn

    linear, generator = nn.Linear(width, classes), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear.weight.copy_(INITIAL_DEVIATION * torch.randn(classes, width, generator=generator))
        linear.bias.zero_()
    return nn.Sequential(nn.BatchNorm1d(width), linear)


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Return the rate of a step, from 0 on: linear to 0 at the end ("poly" of power 1), with a linear warm-up."""
    rate = highest * (1 - step / steps)
    warm_up = WARM_UP * steps
    return rate * (1 - (1 - step / warm_up) * (1 - WARM_UP_FROM)) if step < warm_up else rate


def trained_head(scoring: Scoring) -> tuple[nn.Module, Tensor]:
    """Return the head trained on one side's features, and which classes it has seen, bool `[C]`."""
    import torch

    settings, features, labels = scoring.settings, scoring.features.train[VIEW], scoring.dataset.train_truth
    classes = len(scoring.dataset.classes)
    head = new_head(features.part("patches", 0).shape[-1], classes, scoring.seed).to(scoring.device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    seen = torch.zeros(classes, dtype=torch.bool)
    small = _small_labels(labels)
    order = batches(len(features), settings.images_a_step, settings.steps, scoring.seed)
    for step, indices in enumerate(tracked(order, scoring.emit, "segmentation: training", settings.steps, "steps")):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.learning_rate)
        patches = [_patches(features, index, scoring.device) for index in indices]
        truth = [small(index, each.shape[0], each.shape[1]) for index, each in zip(indices, patches, strict=True)]
        for each in truth:
            seen[each[each != IGNORED].unique().long()] = True
        loss = loss_of(head, patches, [each.to(scoring.device) for each in truth])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval(), seen


def _patches(features: Features, index: int, device: str) -> Tensor:
    """Return the patches of an image, `[h, w, N]`; values that are not finite become 0."""
    return features.part("patches", index).to(device).nan_to_num(nan=0, posinf=0, neginf=0)


def batches(images: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield the images of every step: all in random order by the seed, then all anew; at most all in one step."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        if len(waiting) < min(size, images):
            waiting += torch.randperm(images, generator=generator).tolist()
        batch, waiting = waiting[: min(size, images)], waiting[min(size, images) :]
        yield batch


def _small_labels(labels: Sequence[LabelImage]) -> Callable[[int, int, int], Tensor]:
    """Return a function of index and grid: the labels of an image at the loss's points, `[4h, 4w]`; some are kept."""
    import torch

    @lru_cache(maxsize=KEPT_LABELS)
    def read(index: int, height: int, width: int) -> Tensor:
        return nearest(torch.from_numpy(labels[index].read()), (UPSAMPLED * height, UPSAMPLED * width)).short()

    return read


def loss_of(head: nn.Module, patches: Sequence[Tensor], truth: Sequence[Tensor]) -> Tensor:
    """Return the mean cross entropy over all points that count, of images `[h, w, N]` and labels `[4h, 4w]`."""
    import torch
    from torch.nn.functional import cross_entropy, interpolate

    logits = head(torch.cat([each.flatten(0, 1) for each in patches])).split([each[..., 0].numel() for each in patches])
    total, count = logits[0].new_zeros(()), 0
    for of_image, each, labels in zip(logits, patches, truth, strict=True):
        grid = of_image.unflatten(0, each.shape[:2]).permute(2, 0, 1)[None]
        larger = interpolate(grid, size=labels.shape, mode="bilinear", align_corners=False)
        total = total + cross_entropy(larger, labels[None].long(), ignore_index=IGNORED, reduction="sum")
        count += int((labels != IGNORED).sum())
    return total / max(count, 1)


def grid_logits(head: nn.Module, patches: Tensor) -> Tensor:
    """Return the logits of an image's patches `[h, w, N]` as `[C, h, w]`."""
    import torch

    with torch.no_grad():
        return head(patches.flatten(0, 1)).unflatten(0, patches.shape[:2]).permute(2, 0, 1)


def predicted(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the class of every pixel `[H, W]`, on the CPU: the largest of the logits `[C, h, w]`, upsampled.

    Classes are upsampled a few at a time.
    """
    import torch
    from torch.nn.functional import interpolate

    best, found = torch.empty(0), torch.empty(0)
    first = 0
    for some in logits.split(max(1, MOST_LOGITS // (size[0] * size[1]))):
        larger = interpolate(some[None], size=size, mode="bilinear", align_corners=False)[0]
        values, indices = larger.max(dim=0)
        if first == 0:
            best, found = values, indices
        else:
            better = values > best
            best, found = torch.where(better, values, best), torch.where(better, indices + first, found)
        first += len(some)
    return found.cpu()


TASK = Task(
    name="segmentation",
    summary="linear segmentation of patch tokens, mIoU; images and label images",
    protocol="DINOv2's linear segmentation: batch norm and a linear layer on the last block's patch tokens after the"
    " final norm, AdamW 1e-3, weight decay 1e-4, linear decay with warm-up; logits are upsampled (bilinear) to the size"
    " of the labels at test, and to 4 × 4 points a patch for the loss. Published: 40,000 steps of 16 images, with"
    " scaling, crops, flips and colour jitter; here 2,000 steps of 8 whole images without augmentation, unless set"
    " otherwise. With windows, tokens are averaged where windows overlap; published: logits.",
    read=read,
    views=views,
    score=score,
    settings=SegmentationSettings,
    truth=truth_picture,
)


@hookimpl
def sinder_task() -> Task:
    """Return the task."""
    return TASK
