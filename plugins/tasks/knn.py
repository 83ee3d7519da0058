"""Task `knn`: k-nearest-neighbour classification of cls, by DINOv2's protocol.

cls after the final norm, normalized; the k nearest training images by cosine s vote for their class with weight
exp(s / T). Images are resized to 256 on the shorter side (scaled with the crop), and cropped to 224.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from sinder_cli import Backbone, hookimpl
from sinder_cli.tasks import (
    Dataset,
    Features,
    Pixels,
    Places,
    Scores,
    Scoring,
    Task,
    TaskSettings,
    View,
    class_folders,
    mean_figure,
)

from .classifying import VIEW, crop_view, split_at_commas

if TYPE_CHECKING:
    from torch import Tensor

SINDER_API = 1
SEES = "It sees cls alone: patch tokens may be ruined."
KNOWN_AT_A_TIME = 65_536  # training images whose vectors are in memory
TESTED_AT_A_TIME = 16_384  # test images whose vectors are
AT_A_TIME = 256  # test images that are compared at once


class KnnSettings(TaskSettings):
    """Settings of `knn`."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = Field(0.07, gt=0)
    train_share: float = Field(0.8, gt=0, lt=1)

    @field_validator("k", mode="before")
    @classmethod
    def _several(cls, value: object) -> object:
        return split_at_commas(value)

    @field_validator("k")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1:
            raise ValueError("give numbers of neighbours, such as 10,20")
        return value


def read(places: Places, settings: KnnSettings) -> Dataset:
    """Read class folders."""
    return class_folders(places, settings.train_share)


def views(backbone: Backbone, size: int | None, settings: KnnSettings) -> Mapping[str, View]:  # noqa: ARG001
    """Keep cls alone."""
    return {VIEW: crop_view(backbone, size, ("cls",))}


def score(scoring: Scoring) -> Scores:
    """Return top-1 and top-5 for every k."""
    import torch

    settings, classes = scoring.settings, len(scoring.dataset.classes)
    train, test = scoring.features.train[VIEW], scoring.features.test[VIEW]
    known, truth = (torch.tensor(list(each)) for each in (scoring.dataset.train_truth, scoring.dataset.truth))
    most = min(max(settings.k), len(train))
    right: dict[int, list[Tensor]] = {k: [] for k in settings.k}  # by k: of the five best classes, bool [n, ≤ 5]
    chances, nearest, first = [], [], 0
    for some in _vectors(test, TESTED_AT_A_TIME, scoring.device):
        near = neighbours(some, _vectors(train, KNOWN_AT_A_TIME, scoring.device), most)
        own = truth[first : first + len(some)]
        for k, votes in votes_of(near, known, classes, settings).items():
            right[k].append(votes.topk(min(5, classes), dim=1).indices == own[:, None])
            if k == settings.k[0]:
                chances.append(votes.gather(1, own[:, None])[:, 0])
        nearest.append(near[1][:, 0])
        first += len(some)
    figures, notes = [], []
    for k, parts in right.items():
        found = torch.cat(parts)
        figures.append(mean_figure(f"top-1, k={k}", found[:, 0].double(), caution=SEES))
        if classes > 5:
            figures.append(mean_figure(f"top-5, k={k}", found.any(dim=1).double(), caution=SEES))
    if above := [str(k) for k in settings.k if k > most]:
        notes.append(f"k={', '.join(above)}: there are {most} images to train on, and all of them vote")
    if classes <= 5:
        notes.append("top-5 is left out: there are no more than five classes")
    indices = torch.cat(nearest)

    def picture(index: int) -> Pixels:
        """Show the nearest image to train on."""
        from sinder_cli.tasks import shrunk

        train = scoring.dataset.train
        assert train is not None  # the task reads it
        return shrunk(train.load(int(indices[index])))[0]

    return Scores(tuple(figures), by_image=torch.cat(chances), picture=picture, notes=tuple(notes))


def _vectors(features: Features, at_a_time: int, device: str) -> Iterator[Tensor]:
    """Yield cls of some images at a time, normalized, `[n, N]`; values that are not finite become 0."""
    import torch
    from torch.nn.functional import normalize

    for first in range(0, len(features), at_a_time):
        some = range(first, min(first + at_a_time, len(features)))
        vectors = torch.stack([features.part("cls", index) for index in some]).to(device)
        yield normalize(vectors.nan_to_num(nan=0, posinf=0, neginf=0), dim=1)


def neighbours(test: Tensor, train: Iterable[Tensor], most: int) -> tuple[Tensor, Tensor]:
    """Return the largest cosines of unit vectors `[n, N]` with those of `train`, and their indices, `[n, most]`.

    `train` yields unit vectors `[m, N]`, which are counted on; the nearest come first. Both are returned on the CPU.
    """
    import torch

    values = torch.empty(len(test), 0, device=test.device)
    indices = torch.empty(len(test), 0, dtype=torch.int64, device=test.device)
    first = 0
    for known in train:
        near = [(part @ known.T).topk(min(most, len(known)), dim=1) for part in test.split(AT_A_TIME)]
        values = torch.cat([values, torch.cat([each.values for each in near])], dim=1)
        indices = torch.cat([indices, torch.cat([each.indices for each in near]) + first], dim=1)
        order = values.topk(min(most, values.shape[1]), dim=1)
        values, indices = order.values, indices.gather(1, order.indices)
        first += len(known)
    return values.cpu(), indices.cpu()


def votes_of(near: tuple[Tensor, Tensor], classes: Tensor, count: int, settings: KnnSettings) -> dict[int, Tensor]:
    """Return for every k the votes `[n, count]` of the k nearest, for cosines and indices `[n, most]` of neighbours.

    `classes` has the class of every training image.
    """
    cosines, indices = near
    weights, voted = (cosines / settings.temperature).softmax(dim=1), classes[indices]
    none = weights.new_zeros(len(cosines), count)
    return {k: none.scatter_add(1, voted[:, :k], weights[:, :k]) for k in settings.k}


TASK = Task(
    name="knn",
    summary="k-nearest-neighbour classification of cls; class folders",
    protocol="DINOv2's: cls after the final norm, normalized; k nearest by cosine, votes exp(cosine / T); images"
    " resized to 256 (bicubic) and cropped to 224.",
    read=read,
    views=views,
    score=score,
    settings=KnnSettings,
)


@hookimpl
def sinder_task() -> Task:
    """Return the task."""
    return TASK
