"""Task `linear`: separable classes, a regularization that the test set cannot influence, and sklearn side by side."""

from __future__ import annotations

from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sinder_plugins.tasks.linear import TASK, LinearSettings, chosen_lambda, held_out_split, probabilities, score
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from stub_features import scoring, value, values
from torch import Tensor

from sinder_cli import BadInputError, ModelRequest, api
from sinder_cli.evaluation.settings import EvaluateSettings
from sinder_cli.requests import EvaluateRequest

SIDE = 84  # pixels: 6 × 6 patches
NAMES = ("ant", "bee", "cat")


def drawn(count: int, classes: int = 3, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features `[n, 6]` around a corner per class, and classes in turn."""
    truth = torch.arange(count) % classes
    generator = torch.Generator().manual_seed(seed)
    return torch.eye(6)[truth] + noise * torch.randn(count, 6, generator=generator), truth


def given(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], **settings: Any) -> Any:
    """What `linear` is given, where the mean of the patches says nothing."""
    parts = [{"cls": list(each), "mean": [torch.ones(2)] * len(each)} for each, _ in (train, test)]
    return scoring(TASK, "crop", parts[1], test[1].tolist(), NAMES, parts[0], train[1].tolist(), **settings)


def test_separable_classes_are_all_right() -> None:
    scores = score(given(drawn(60, noise=0.05), drawn(30, noise=0.05, seed=1)))
    assert values(scores.figures) == {"top-1, cls": 1.0, "top-1, cls + mean patch": 1.0}
    assert scores.by_image is not None
    assert scores.by_image.min() > 0.5


def test_mean_patch_helps_where_cls_says_nothing() -> None:
    mean, truth = drawn(60, noise=0.05)
    parts = {"cls": [torch.ones(2)] * 60, "mean": list(mean)}
    scores = score(scoring(TASK, "crop", parts, truth.tolist(), NAMES, parts, truth.tolist()))
    found = values(scores.figures)
    assert found["top-1, cls + mean patch"] == 1
    assert found["top-1, cls"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities_are_those_of_sklearns_pipeline(classes: int) -> None:
    train, truth = drawn(40, classes)
    test, _ = drawn(10, classes, seed=1)
    found, converged = probabilities(train.double(), truth, test.double(), 0.01, 1000)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (0.01 * 40), max_iter=1000))
    expected = pipeline.fit(train.double().numpy(), truth.numpy()).predict_proba(test.double().numpy())
    assert converged
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_solution_minimizes_mean_cross_entropy_and_penalty() -> None:
    train, truth = drawn(40)
    x = (train.double() - train.double().mean(0)) / train.double().std(0, correction=0)
    W, b = torch.zeros(3, 6, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(4000):  # gradient descent, by hand
        wrong = (x @ W.T + b).softmax(1) - torch.nn.functional.one_hot(truth, 3)
        W, b = W - 0.5 * (wrong.T @ x / 40 + 0.1 * W), b - 0.5 * wrong.mean(0)
    found, _ = probabilities(train.double(), truth, train.double(), 0.1, 1000)
    torch.testing.assert_close(found, (x @ W.T + b).softmax(1), atol=2e-3, rtol=0)


def test_regularization_never_depends_on_test_images() -> None:
    train = drawn(60, noise=1.0)
    test, truth = drawn(30, noise=1.0, seed=1)
    notes = {score(given(train, (each, truth))).notes for each in (test, -test, torch.zeros_like(test))}
    assert len(notes) == 1


def test_regularization_is_best_on_held_out_images() -> None:
    train, truth = drawn(90, noise=1.5)
    settings = LinearSettings(lambdas=(1e-6, 1.0, 1e3))
    fit, held_out = held_out_split(truth.tolist(), 0.3, 0)
    right = {}
    for each in settings.lambdas:
        found, _ = probabilities(train[fit].double(), truth[fit], train[held_out].double(), each, 1000)
        right[each] = int((found.argmax(1) == truth[held_out]).sum())
    chosen = chosen_lambda(train.double(), truth, fit, held_out, settings)
    assert len(set(right.values())) > 1
    assert chosen == max(each for each in right if right[each] == max(right.values()))


def test_every_class_keeps_an_image_to_fit_on() -> None:
    classes = [0] * 10 + [1] * 2 + [2]
    fit, held_out = held_out_split(classes, 0.5, 0)
    assert sorted(fit + held_out) == list(range(13))
    assert [classes[at] for at in held_out] == [0] * 5 + [1]
    assert held_out_split(classes, 0.5, 0) == (fit, held_out)
    assert held_out_split(classes, 0.5, 1) != (fit, held_out)


def test_one_image_a_class_takes_the_middle_regularization() -> None:
    scores = score(given(drawn(3, noise=0.01), drawn(6, noise=0.01, seed=1)))
    assert "λ could not be chosen" in scores.notes[-1]
    assert scores.notes[0] == "cls: λ = 0.001"


def test_class_without_training_images_is_always_wrong() -> None:
    train, truth = drawn(40, classes=2, noise=0.05)
    scores = score(given((train, truth), drawn(30, noise=0.05)))
    assert value(scores.figures[0]) == pytest.approx(2 / 3)
    assert scores.by_image is not None
    assert (scores.by_image[2::3] == 0).all()


def test_class_in_the_middle_may_lack_training_images() -> None:
    train, truth = drawn(40, noise=0.05)
    kept = truth != 1
    found, _ = probabilities(train[kept].double(), truth[kept], train.double(), 0.01, 1000)
    assert found.shape == (40, 3)
    assert (found[:, 1] == 0).all()
    assert (found.argmax(dim=1) == truth)[kept].all()


def test_training_images_of_one_class_are_refused() -> None:
    train, _ = drawn(6)
    with pytest.raises(BadInputError, match="the images to train on are of one class"):
        score(given((train, torch.zeros(6, dtype=torch.int64)), drawn(6)))


def test_values_that_are_not_finite_count_as_zero() -> None:
    train, truth = drawn(30)
    train[0, 0], train[1, 1] = torch.nan, torch.inf
    assert value(score(given((train, truth), drawn(9, seed=1))).figures[0]) > 0.8


def test_unfinished_optimization_is_noted() -> None:
    assert "L-BFGS did not converge" in score(given(drawn(60), drawn(9), iterations=1)).notes[0]


@pytest.mark.parametrize("given", ["", "0", "1e-3,-1"])
def test_bad_regularizations_are_refused(given: str) -> None:
    with pytest.raises(ValueError):
        LinearSettings.model_validate({"lambdas": given})
    assert LinearSettings.model_validate({"lambdas": "1,1e-3"}).lambdas == (1e-3, 1)


def write_classes(folder: Path, images: int) -> Path:
    for name, colour in {"dark": 40, "light": 200}.items():
        for index in range(images):
            path = folder / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (80, 80), (colour + index,) * 3).save(path)
    return folder


def requested(weights: Path, data: Path) -> EvaluateRequest:
    settings = EvaluateSettings(image_size=SIDE, workers=0, resamples=100)
    return EvaluateRequest(ModelRequest("dinov2_custom", weights), ["linear"], [data], settings)


MALFORMED = {
    "empty class": (6, lambda data: (data / "empty").mkdir(), "set/empty: the class has no images"),
    "one image": (1, lambda _: None, "set/dark: the class has one image"),
    "one class": (6, lambda data: rmtree(data / "light"), "set: there is only dark"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_classes_end_with_one_line(tmp_path: Path, weights: Path, kind: str) -> None:
    images, spoil, message = MALFORMED[kind]
    data = write_classes(tmp_path / "set", images)
    spoil(data)
    with pytest.raises(BadInputError) as caught:
        api.evaluate(requested(weights, data))
    assert caught.value.exit_code == 65
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_colours_are_told_apart_through_a_backbone(tmp_path: Path, weights: Path) -> None:
    request = requested(weights, write_classes(tmp_path / "set", 6))
    task = api.evaluate(request).evaluation.tasks[0]
    assert [figure.name for figure in task.figures] == ["top-1, cls", "top-1, cls + mean patch"]
    assert [figure.values[0].value for figure in task.figures] == [100, 100]
    assert (task.images, task.trained_on) == (2, 10)
    assert "λ = " in task.notes["original"][0]
