"""What the tasks on label images share: their settings, overlap of classes by image, its figures, and colours.

Overlap of one image is `[3, C]`: by class, pixels that truth and prediction both have (true positives), that only the
prediction has, and that only the truth has. Pixels whose truth does not count are left out of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from sinder_cli.tasks import IGNORED, ClassMap, Dataset, Figure, LabelRule, Pixels, TaskSettings

if TYPE_CHECKING:
    from torch import Tensor

MIOU_NOISE = 0.15  # % points between published repetitions
VOID = (224, 224, 192)  # VOC's colour of pixels that do not count
COLOURS = 256


class LabelSettings(TaskSettings):
    """Settings of the tasks on label images."""

    ignore_label: int | None = Field(255, ge=0)
    reduce_zero_label: bool | None = None  # None: as the layout has it
    classes: int | None = Field(None, ge=2, lt=2**15)

    @property
    def rule(self) -> LabelRule:
        """Return what the values of label images mean."""
        return LabelRule(self.ignore_label, self.reduce_zero_label, self.classes)


def overlap(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Return the overlap `[3, C]` int64 of two maps of classes of one shape."""
    import torch

    counts = truth != IGNORED
    truth, predicted = truth[counts], predicted[counts]
    both, of_prediction, of_truth = (
        torch.bincount(each, minlength=classes) for each in (truth[truth == predicted], predicted, truth)
    )
    return torch.stack([both, of_prediction - both, of_truth - both])


def mean_iou(sums: Tensor) -> Tensor:
    """Return the mean IoU of overlaps `[…, 3, C]`; classes that neither truth nor prediction have do not count."""
    return class_ious(sums).nanmean(dim=-1)


def class_ious(sums: Tensor) -> Tensor:
    """Return the IoU of every class `[…, C]` of overlaps `[…, 3, C]`; NaN for a class that nothing has."""
    return sums[..., 0, :] / sums.sum(dim=-2)


def pixel_accuracy(sums: Tensor) -> Tensor:
    """Return the share of pixels that are right, of overlaps `[…, 3, C]`; NaN if no pixel counts."""
    return sums[..., 0, :].sum(dim=-1) / (sums[..., 0, :] + sums[..., 2, :]).sum(dim=-1)


def mean_class_accuracy(sums: Tensor) -> Tensor:
    """Return the mean over the classes of the truth of the share of their pixels that are right."""
    return (sums[..., 0, :] / (sums[..., 0, :] + sums[..., 2, :])).nanmean(dim=-1)


def overlap_figure(
    name: str, overlaps: Tensor, measure: Callable[[Tensor], Tensor], noise: float = 0.0, caution: str = ""
) -> Figure:
    """Return a figure of the summed overlaps `[images, repetitions, 3, C]`, averaged over repetitions."""
    shape = tuple(overlaps.shape[1:])
    value = partial(_measured, shape=shape, measure=measure)
    return Figure(name, overlaps.flatten(1).double(), value, noise=noise, caution=caution)


def _measured(sums: Tensor, shape: tuple[int, ...], measure: Callable[[Tensor], Tensor]) -> Tensor:
    return measure(sums.unflatten(-1, shape)).mean(dim=-1)


def figures_of(overlaps: Tensor, noise: float = 0.0, caution: str = "") -> tuple[Figure, ...]:
    """Return mIoU, with what its repetitions differ by, and accuracies of overlaps `[images, repetitions, 3, C]`.

    `caution` says what they cannot see.
    """
    return (
        overlap_figure("mIoU", overlaps, mean_iou, noise, caution),
        overlap_figure("accuracy", overlaps, pixel_accuracy, caution=caution),
        overlap_figure("mean class accuracy", overlaps, mean_class_accuracy, caution=caution),
    )


def figures_by_class(overlaps: Tensor, classes: Sequence[str]) -> tuple[Figure, ...]:
    """Return the IoU of each class as a figure, of overlaps `[images, repetitions, 3, C]`."""
    names = [name if classes.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(classes)]
    return tuple(overlap_figure(f"IoU, {name}", overlaps[..., at : at + 1], mean_iou) for at, name in enumerate(names))


def words_by_class(overlaps: Tensor, classes: Sequence[str]) -> str:
    """Return the IoU of each class in one line, of overlaps `[images, repetitions, 3, C]`."""
    ious = class_ious(overlaps.double().sum(dim=0)).nanmean(dim=0).tolist()
    found = [f"{name} {100 * iou:.1f}" for name, iou in zip(classes, ious, strict=True) if iou == iou]
    absent = sum(iou != iou for iou in ious)
    return f"IoU by class: {', '.join(found)}" + (f"; {absent} of {len(ious)} occur nowhere" if absent else "")


def by_image(overlaps: Tensor) -> Tensor:
    """Return the accuracy of each image, of overlaps `[images, repetitions, 3, C]`."""
    return pixel_accuracy(overlaps.double()).mean(dim=1)


def nearest(found: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a map `[h, w]` at another size: at each pixel's centre, the value that is there."""
    import torch

    rows, columns = (
        ((torch.arange(to) + 0.5) * (of / to)).long().clamp_max(of - 1)
        for of, to in zip(found.shape, size, strict=True)
    )
    return found[rows[:, None], columns]


def class_picture(found: ClassMap) -> Pixels:
    """Return a map of classes in VOC's colours, `[H, W, 3]`."""
    import numpy as np

    palette = np.array([_colour(at) for at in range(COLOURS)] + [VOID], dtype=np.uint8)
    return palette[np.where(found == IGNORED, COLOURS, found % COLOURS)]


def _colour(of_class: int) -> tuple[int, int, int]:
    """Return VOC's colour of a class: its bits in turn, from the highest bit of red, green and blue on."""
    channels = [0, 0, 0]
    for at in range(8):
        for channel in range(3):
            channels[channel] |= (of_class >> (3 * at + channel) & 1) << (7 - at)
    return channels[0], channels[1], channels[2]


def truth_picture(dataset: Dataset, index: int) -> Pixels:
    """Return the labels of a test image in the colours of `class_picture`."""
    return class_picture(dataset.truth[index].read())
