"""Task `clusters`: do clusters of patch tokens agree with labelled classes, without any training on labels?

Spherical k-means (cosine) of all patch tokens of the set, after the final norm, with as many clusters as the labels
have classes; one match of clusters to classes over all images, which makes most pixels right; everything for several
seeds, side by side. Features and labels are read one image at a time, once for every pass over the images.
Shapes: S seeds, K clusters, C classes, T tokens of an image, N width, h × w patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from sinder_cli import Backbone, BadInputError, hookimpl
from sinder_cli.tasks import (
    IGNORED,
    Dataset,
    Features,
    Pixels,
    Places,
    Scores,
    Scoring,
    Task,
    View,
    labelled_images,
    tracked,
)

from .labelling import (
    LabelSettings,
    by_image,
    class_picture,
    figures_of,
    mean_iou,
    nearest,
    overlap,
    truth_picture,
    words_by_class,
)

if TYPE_CHECKING:
    from torch import Tensor

SINDER_API = 1
GROUPED = "Clusters that are no classes cost a model nothing if they are even: a ruined one can gain."
VIEW = "whole"
SAMPLE = 10_000  # tokens from which the first centres are drawn


class ClusterSettings(LabelSettings):
    """Settings of `clusters`."""

    seeds: int = Field(3, ge=1, le=100)
    passes: int = Field(30, ge=1)  # over all images, at most
    tolerance: float = Field(1e-4, ge=0)  # of the mean cosine: a pass that gains less is the last


def read(places: Places, settings: ClusterSettings) -> Dataset:
    """Read images with label images; of a set with splits, the test split."""
    return labelled_images(places, settings.rule)


def views(backbone: Backbone, size: int | None, settings: ClusterSettings) -> Mapping[str, View]:  # noqa: ARG001
    """Show whole images."""
    return {VIEW: View(("patches",), size or backbone.image_size)}


def score(scoring: Scoring) -> Scores:
    """Return mIoU and accuracies, averaged over the seeds."""
    import torch

    dataset, features = scoring.dataset, scoring.features.test[VIEW]
    classes = present_classes(dataset, scoring)
    centres, passes = spherical_kmeans(
        lambda: _all_tokens(features, scoring), first_centres(features, len(classes), scoring), scoring.settings
    )
    total = torch.zeros(len(centres), len(classes), len(dataset.classes), dtype=torch.int64)
    for index, truth in _truths(scoring, "match"):
        total += counted(clusters_of(features, index, centres), truth, *total.shape[1:])
    matches = torch.stack([matched(each, classes) for each in total])  # [S, K]
    # in one tensor from the beginning: small ones among the large of every image would keep the memory of these
    of_images = torch.zeros(len(features), len(matches), 3, len(dataset.classes), dtype=torch.int64)
    for index, truth in _truths(scoring, "test"):
        maps = clusters_of(features, index, centres)
        shape = (truth.shape[0], truth.shape[1])
        found = [nearest(match[each], shape) for match, each in zip(matches, maps, strict=True)]
        for at, each in enumerate(found):
            of_images[index, at] = overlap(truth, each, len(dataset.classes))

    def picture(index: int) -> Pixels:
        height, width = dataset.truth[index].read().shape
        return class_picture(nearest(matches[0][clusters_of(features, index, centres)[0]], (height, width)).numpy())

    of_seeds = mean_iou(of_images.sum(dim=0).double())
    notes = (
        f"{len(classes)} clusters; {passes} passes" + (" (the most)" if passes == scoring.settings.passes else ""),
        f"mIoU by seed: {', '.join(f'{100 * each:.1f}' for each in of_seeds.tolist())}",
        words_by_class(of_images, dataset.classes),
    )
    deviation = of_seeds.std().item() if len(of_seeds) > 1 else 0.0
    figures = figures_of(of_images, 100 * deviation / math.sqrt(len(of_seeds)), GROUPED)  # standard error
    return Scores(figures, by_image=by_image(of_images), picture=picture, notes=notes)


def _truths(scoring: Scoring, what: str) -> Iterator[tuple[int, Tensor]]:
    """Yield every test image with its labels `[H, W]`."""
    import torch

    labels = scoring.dataset.truth
    for index, label in enumerate(tracked(labels, scoring.emit, f"clusters: {what}", len(labels), "images")):
        yield index, torch.from_numpy(label.read())


def present_classes(dataset: Dataset, scoring: Scoring) -> Tensor:
    """Return the classes that the labels of the test images have. Raises `BadInputError` for fewer than two."""
    import torch

    present = torch.zeros(len(dataset.classes), dtype=torch.bool)
    for _, truth in _truths(scoring, "labels"):
        present[truth[truth != IGNORED]] = True
    if int(present.sum()) < 2:
        why = f"the labels of the test images have {int(present.sum())} of {len(present)} classes"
        raise BadInputError("cannot cluster", why, "use images with two classes or more")
    return present.nonzero()[:, 0]


def unit_tokens(features: Features, index: int) -> Tensor:
    """Return the patch tokens of an image, normalized, `[T, N]`; values that are not finite become 0."""
    from torch.nn.functional import normalize

    patches = features.part("patches", index).flatten(0, 1)
    return normalize(patches.nan_to_num(nan=0, posinf=0, neginf=0), dim=1)


def _all_tokens(features: Features, scoring: Scoring) -> Iterator[Tensor]:
    indices = range(len(features))
    for index in tracked(indices, scoring.emit, "clusters: k-means", len(features), "images"):
        yield unit_tokens(features, index).to(scoring.device)


def first_centres(features: Features, count: int, scoring: Scoring) -> Tensor:
    """Return the first centres by k-means++ on some tokens of the images, `[S, K, N]`.

    The same tokens are drawn for all seeds and all sides. Raises `BadInputError` for fewer tokens than clusters.
    """
    import torch
    from sklearn.cluster import kmeans_plusplus

    generator = torch.Generator().manual_seed(scoring.seed)
    images = range(0, len(features), -(-len(features) // SAMPLE))
    drawn = []
    for index in images:
        tokens = unit_tokens(features, index)
        drawn.append(tokens[torch.randperm(len(tokens), generator=generator)[: max(1, SAMPLE // len(images))]])
    sample = torch.cat(drawn)
    if len(sample) < count:
        raise BadInputError("cannot cluster", f"there are {len(sample)} tokens for {count} classes", "use more images")
    starts = range(scoring.seed, scoring.seed + scoring.settings.seeds)
    found = [kmeans_plusplus(sample.numpy(), count, random_state=seed)[0] for seed in starts]
    return torch.stack([torch.from_numpy(each) for each in found]).to(scoring.device)


def spherical_kmeans(
    tokens: Callable[[], Iterator[Tensor]], centres: Tensor, settings: ClusterSettings
) -> tuple[Tensor, int]:
    """Return the centres `[S, K, N]` of unit tokens after Lloyd's iteration by cosine, and the number of passes.

    `tokens` yields `[T, N]` of each image in turn. A centre is the normalized sum of its tokens; one without tokens
    stays. The iteration ends when the mean cosine of no seed gains more than the tolerance.
    """
    import torch
    from torch.nn.functional import normalize, one_hot

    before = torch.full((len(centres),), -torch.inf, dtype=torch.float64)
    for done in range(1, settings.passes + 1):
        sums = torch.zeros(centres.shape, dtype=torch.float64)
        cosines, count = torch.zeros(len(centres), dtype=torch.float64), 0
        for each in tokens():
            best = (each @ centres.transpose(1, 2)).max(dim=2)  # [S, T]
            owned = one_hot(best.indices, centres.shape[1]).to(each.dtype)  # [S, T, K]
            sums += (owned.transpose(1, 2) @ each).double().cpu()
            cosines += best.values.double().sum(dim=1).cpu()
            count += len(each)
        fresh = normalize(sums, dim=2).to(centres)
        centres = torch.where(sums.norm(dim=2, keepdim=True).to(centres) > 0, fresh, centres)
        if bool((cosines / count - before <= settings.tolerance).all()):
            return centres, done
        before = cosines / count
    return centres, settings.passes


def clusters_of(features: Features, index: int, centres: Tensor) -> Tensor:
    """Return the nearest centre of every patch of an image by cosine, `[S, h, w]`, on the CPU."""
    height, width = features.part("patches", index).shape[:2]
    tokens = unit_tokens(features, index).to(centres)
    return (tokens @ centres.transpose(1, 2)).argmax(dim=2).cpu().unflatten(1, (height, width))


def counted(maps: Tensor, truth: Tensor, clusters: int, classes: int) -> Tensor:
    """Return how many pixels of each class each cluster has, `[S, K, C]`, of maps `[S, h, w]` and labels `[H, W]`."""
    import torch

    size, counts = (truth.shape[0], truth.shape[1]), truth != IGNORED
    pairs = [(nearest(each, size) * classes + truth)[counts] for each in maps]
    return torch.stack([torch.bincount(each, minlength=clusters * classes).view(clusters, classes) for each in pairs])


def matched(pixels: Tensor, present: Tensor) -> Tensor:
    """Return the class of each cluster `[K]`: the one-to-one match of clusters to present classes with most pixels.

    `pixels` `[K, C]` counts the pixels of each class in each cluster.
    """
    import torch
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(pixels[:, present].numpy(), maximize=True)
    return present[torch.from_numpy(columns)]


TASK = Task(
    name="clusters",
    summary="k-means of patch tokens against labelled classes; images and label images",
    protocol="Cosine k-means of all patch tokens of the test images after the final norm, as many clusters as classes"
    " in the labels, one Hungarian match over all images, maps upsampled (nearest) to the size of the labels, averaged"
    " over 3 seeds unless set otherwise. This is not CAUSE, which trains a head and a codebook: its published figures"
    " do not compare. Intervals resample images with"
    " clusters and match as they are; a difference below the standard error over the seeds is within noise.",
    read=read,
    views=views,
    score=score,
    settings=ClusterSettings,
    truth=truth_picture,
    requires=("sklearn", "scipy"),
)


@hookimpl
def sinder_task() -> Task:
    """Return the task."""
    return TASK
