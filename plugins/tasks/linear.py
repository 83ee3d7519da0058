"""Task `linear`: logistic regression on frozen features of whole images.

Features are standardized by mean and deviation of the images trained on. L-BFGS minimizes the mean cross entropy plus
λ / 2 · ‖W‖² (the bias is free). λ is the one that is right most often on a part of the training images that is held
out, class by class, by the seed; the largest of equals. Then all training images are used. n images, d features.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from sinder_cli import Backbone, BadInputError, hookimpl
from sinder_cli.tasks import (
    Dataset,
    Features,
    Places,
    Scores,
    Scoring,
    Task,
    TaskSettings,
    View,
    class_folders,
    mean_figure,
    tracked,
)

from .classifying import VIEW, crop_view, split_at_commas

if TYPE_CHECKING:
    from torch import Tensor

SINDER_API = 1
MEANS = "It sees cls, and the mean of all patches, in which a few defective ones hardly count."
ON_PATCHES = ("smoothed", "blurred")  # sides that leave cls as it is
FEATURE_SETS = {"cls": ("cls",), "cls + mean patch": ("cls", "mean")}


class LinearSettings(TaskSettings):
    """Settings of `linear`."""

    lambdas: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    held_out: float = Field(0.2, gt=0, lt=1)  # share of the training images on which λ is chosen
    iterations: int = Field(1000, ge=1)
    train_share: float = Field(0.8, gt=0, lt=1)

    @field_validator("lambdas", mode="before")
    @classmethod
    def _several(cls, value: object) -> object:
        return split_at_commas(value)

    @field_validator("lambdas")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) <= 0:
            raise ValueError("give positive numbers, such as 1e-4,1e-2")
        return tuple(sorted(set(value)))


def read(places: Places, settings: LinearSettings) -> Dataset:
    """Read class folders."""
    return class_folders(places, settings.train_share)


def views(backbone: Backbone, size: int | None, settings: LinearSettings) -> Mapping[str, View]:  # noqa: ARG001
    """Keep cls and the mean of the patches."""
    return {VIEW: crop_view(backbone, size, ("cls", "mean"))}


def score(scoring: Scoring) -> Scores:
    """Return top-1 of both feature sets; images are ranked by the second."""
    import torch

    known, truth = (torch.tensor(list(each)) for each in (scoring.dataset.train_truth, scoring.dataset.truth))
    if len(known.unique()) < 2:
        raise BadInputError("cannot train a classifier", "the images to train on are of one class", "use more of them")
    fit, held_out = held_out_split(known.tolist(), scoring.settings.held_out, scoring.seed)
    figures, notes = [], []
    sets = {name: parts for name, parts in FEATURE_SETS.items() if "mean" in parts or scoring.side not in ON_PATCHES}
    for name, parts in tracked(sets.items(), scoring.emit, "linear: fits", len(sets)):
        train, test = (_gathered(side[VIEW], parts) for side in (scoring.features.train, scoring.features.test))
        chosen = chosen_lambda(train, known, fit, held_out, scoring.settings)
        chances, converged = probabilities(train, known, test, chosen, scoring.settings.iterations)
        figures.append(mean_figure(f"top-1, {name}", (chances.argmax(dim=1) == truth).double(), caution=MEANS))
        notes.append(f"{name}: λ = {chosen:g}" + ("" if converged else "; L-BFGS did not converge"))
    if not held_out:
        notes.append("λ could not be chosen: every class has one image to train on")
    reached = truth < chances.shape[1]  # the last classes may have no image to train on
    chance = chances.gather(1, truth.where(reached, 0)[:, None])[:, 0].where(reached, 0)
    return Scores(tuple(figures), by_image=chance, notes=tuple(notes))


def _gathered(features: Features, parts: Sequence[Any]) -> Tensor:
    """Return parts of all images beside one another, `[n, d]` float64; values that are not finite become 0."""
    import torch

    joined = torch.cat([features.stacked(part) for part in parts], dim=1).double()
    return joined.nan_to_num(nan=0, posinf=0, neginf=0)


def held_out_split(classes: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the training images to fit on, and those to choose λ on: of every class at most all but one."""
    of_class: dict[int, list[int]] = {}
    for index, of in enumerate(classes):
        of_class.setdefault(of, []).append(index)
    held_out: list[int] = []
    for of, indices in sorted(of_class.items()):
        count = min(max(1, round(share * len(indices))), len(indices) - 1)
        held_out += random.Random(f"{seed} {of}").sample(indices, count)
    return sorted(set(range(len(classes))) - set(held_out)), sorted(held_out)


def chosen_lambda(
    train: Tensor, classes: Tensor, fit: Sequence[int], held_out: Sequence[int], settings: LinearSettings
) -> float:
    """Return the λ that is right most often on the held-out training images; without any, the middle one."""
    if not held_out:
        return settings.lambdas[len(settings.lambdas) // 2]
    fit, held_out = list(fit), list(held_out)

    def right(value: float) -> int:
        chances, _ = probabilities(train[fit], classes[fit], train[held_out], value, settings.iterations)
        return int((chances.argmax(dim=1) == classes[held_out]).sum())

    return max((right(value), value) for value in settings.lambdas)[1]


def probabilities(
    train: Tensor, classes: Tensor, test: Tensor, regularization: float, iterations: int
) -> tuple[Tensor, bool]:
    """Return the probability of every class for test features, `[n, C]`, and whether L-BFGS converged.

    C is one more than the largest class trained on; a class without training images has probability 0.
    """
    import torch
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0)
    scale = deviation.where(deviation > 0, 1)
    model = LogisticRegression(C=1 / (regularization * len(train)), max_iter=iterations, solver="lbfgs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(((train - mean) / scale).numpy(), classes.numpy())
    found = torch.zeros(len(test), int(classes.max()) + 1, dtype=torch.float64)
    found[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.predict_proba(((test - mean) / scale).numpy()))
    return found, bool(model.n_iter_.max() < iterations)


TASK = Task(
    name="linear",
    summary="logistic regression on cls, and on cls and the mean patch; class folders",
    protocol="Logistic regression by L-BFGS, of cls and of cls + mean patch after the final norm, each feature"
    " standardized over the training images; λ is chosen on a part of the training images, never on the test images,"
    " and then all of them are used. Images are resized to 256 (bicubic) and cropped to 224, without augmentation;"
    " DINOv2's linear evaluation trains by SGD with augmentation and reports its best learning rate.",
    read=read,
    views=views,
    score=score,
    settings=LinearSettings,
    requires=("sklearn",),
)


@hookimpl
def sinder_task() -> Task:
    """Return the task."""
    return TASK
