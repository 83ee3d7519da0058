"""Task `knn`: k-nearest-neighbour classification of cls, by DINOv2's protocol.

cls after the final norm, normalized; the k nearest training images by cosine s vote for their class with weight
exp(s / T). Images are resized to 256 on the shorter side (scaled with the crop), and cropped to 224.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from sinder_cli import Backbone, hookimpl
from sinder_cli.tasks import Dataset, Places, Scores, Scoring, Task, TaskSettings, View, class_folders, mean_figure

from .classifying import VIEW, crop_view, split_at_commas

if TYPE_CHECKING:
    from torch import Tensor

SINDER_API = 1
AT_A_TIME = 256  # images that are compared with all training images


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

    train, test = scoring.features.train[VIEW].stacked("cls"), scoring.features.test[VIEW].stacked("cls")
    known = torch.tensor(list(scoring.dataset.train_truth))
    truth = torch.tensor(list(scoring.dataset.truth))
    most = min(max(scoring.settings.k), len(train))
    ranked = neighbour_votes(
        test, train, known, len(scoring.dataset.classes), scoring.settings.k, scoring.settings.temperature
    )
    figures, notes = [], []
    for k, votes in ranked.items():
        best = votes.topk(min(5, votes.shape[1]), dim=1).indices
        right = best == truth[:, None]
        figures.append(mean_figure(f"top-1, k={k}", right[:, 0].double()))
        if votes.shape[1] > 5:
            figures.append(mean_figure(f"top-5, k={k}", right.any(dim=1).double()))
        if k > most:
            notes.append(f"k={k}: there are {most} training images")
    first = next(iter(ranked.values()))
    chance = first.gather(1, truth[:, None])[:, 0]
    return Scores(tuple(figures), by_image=chance, notes=tuple(notes))


def neighbour_votes(
    test: Tensor, train: Tensor, classes: Tensor, count: int, ks: tuple[int, ...], temperature: float
) -> dict[int, Tensor]:
    """Return for every k the votes `[images, classes]` of the k nearest training images by cosine."""
    import torch
    from torch.nn.functional import normalize, one_hot

    test, train = (normalize(each.float().nan_to_num(posinf=0, neginf=0), dim=1) for each in (test, train))
    most = min(max(ks), len(train))
    votes: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in test.split(AT_A_TIME):
        near = (part @ train.T).topk(most, dim=1)  # the best first
        weights = (near.values / temperature).softmax(dim=1)[..., None] * one_hot(classes[near.indices], count)
        for k in ks:
            votes[k].append(weights[:, :k].sum(dim=1))
    return {k: torch.cat(parts) for k, parts in votes.items()}


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
