"""Task `clusters`: k-means and match by hand and by slow loops, and clusters that are the classes."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from label_sets import halves, labels
from sinder_plugins.tasks.clusters import (
    TASK,
    ClusterSettings,
    clusters_of,
    counted,
    first_centres,
    matched,
    present_classes,
    score,
    spherical_kmeans,
)
from stub_features import StubFeatures, scoring, values
from torch import Tensor
from torch.nn.functional import normalize

from sinder_cli import BadInputError, ModelRequest, api
from sinder_cli.evaluation.settings import EvaluateSettings
from sinder_cli.requests import EvaluateRequest

SIDE = 84  # pixels: 6 × 6 patches


def tokens(images: int = 3, seed: int = 0) -> list[Tensor]:
    """Unit tokens `[T, 4]` of images of several sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [normalize(torch.randn(20 + 5 * at, 4, generator=generator), dim=1) for at in range(images)]


def slow_kmeans(points: np.ndarray, centres: np.ndarray, passes: int) -> np.ndarray:
    for _ in range(passes):
        members: list[list[np.ndarray]] = [[] for _ in centres]
        for point in points:
            members[int(np.argmax([point @ centre for centre in centres]))].append(point)
        total = [np.sum(each, axis=0) if each else centre for each, centre in zip(members, centres, strict=True)]
        centres = np.array([each / np.linalg.norm(each) for each in total])
    return centres


@pytest.mark.parametrize("passes", [1, 2, 7])
def test_kmeans_is_lloyds_iteration_by_cosine(passes: int) -> None:
    found = tokens()
    starts = torch.stack([found[0][:5], found[1][3:8]])
    settings = ClusterSettings(passes=passes, tolerance=0)
    centres, _ = spherical_kmeans(lambda: iter(found), starts, settings)
    for at in range(2):
        expected = slow_kmeans(torch.cat(found).double().numpy(), starts[at].double().numpy(), passes)
        np.testing.assert_allclose(centres[at].numpy(), expected, atol=1e-5)


def test_centre_without_tokens_stays() -> None:
    ones = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    centres, passes = spherical_kmeans(lambda: iter([ones]), torch.tensor([[[1.0, 0], [-1, 0]]]), ClusterSettings())
    assert centres[0, 1].tolist() == [-1, 0]
    torch.testing.assert_close(centres[0, 0], normalize(ones.sum(0), dim=0))
    assert passes == 3  # the second gains what the first centre moved by, the third nothing


def test_match_by_hand_is_one_to_one() -> None:
    pixels = torch.tensor([[9, 0, 8, 0], [10, 0, 1, 0], [0, 0, 0, 5]])  # class 1 has no pixel
    assert matched(pixels, torch.tensor([0, 2, 3])).tolist() == [2, 0, 3]


@pytest.mark.parametrize("seed", range(3))
def test_match_is_the_best_of_all_permutations(seed: int) -> None:
    pixels = torch.randint(0, 50, (5, 5), generator=torch.Generator().manual_seed(seed))
    best = max(sum(int(pixels[row, column]) for row, column in enumerate(each)) for each in permutations(range(5)))
    assert int(pixels[torch.arange(5), matched(pixels, torch.arange(5))].sum()) == best


def test_pixels_of_clusters_by_hand() -> None:
    maps = torch.tensor([[[0, 1]], [[1, 1]]])
    truth = torch.tensor([[0, 0, 2, 2], [0, -1, -1, 1]])
    assert counted(maps, truth, 2, 3).tolist() == [[[3, 0, 0], [0, 1, 2]], [[0, 0, 0], [3, 1, 2]]]


def quarters(tmp_path: Path, images: int = 4) -> tuple[dict[str, list[Tensor]], list[object]]:
    """Images of 6 × 6 patches whose quarters point along an axis each, and labels 0, 1, 3 (two quarters) of 4 × 4."""
    generator = torch.Generator().manual_seed(0)
    of_patch = torch.tensor([[0, 1], [2, 2]]).repeat_interleave(3, 0).repeat_interleave(3, 1)
    patches = [
        torch.randint(1, 9, (6, 6, 1), generator=generator)
        * (torch.eye(5)[of_patch] + 0.02 * torch.randn(6, 6, 5, generator=generator))
        for _ in range(images)
    ]
    rows = [[0, 0, 1, 1], [0, 0, 1, 255], [3, 3, 3, 3], [3, 3, 3, 3]]
    return {"patches": patches}, [*labels(tmp_path, [rows] * images, 5)]


def test_clusters_that_are_classes_are_all_right(tmp_path: Path) -> None:
    parts, truth = quarters(tmp_path)
    given = scoring(TASK, "whole", parts, truth, "abcde")
    scores = score(given)
    assert values(scores.figures) == {"mIoU": 1.0, "accuracy": 1.0, "mean class accuracy": 1.0}
    assert scores.notes[0].startswith("3 clusters; ")
    assert scores.notes[1] == "mIoU by seed: 100.0, 100.0, 100.0"
    assert scores.notes[2] == "IoU by class: a 100.0, b 100.0, d 100.0; 2 of 5 occur nowhere"
    assert scores.by_image is not None
    assert scores.picture is not None
    assert TASK.truth is not None
    assert scores.by_image.tolist() == [1.0] * 4
    found, expected = scores.picture(0), TASK.truth(given.dataset, 0)
    assert (found == expected).all(axis=2).tolist() == [[True] * 4, [True] * 3 + [False], [True] * 4, [True] * 4]


def test_figures_are_the_mean_over_seeds(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = {"patches": [torch.randn(6, 6, 5, generator=generator) for _ in range(3)]}
    truth = quarters(tmp_path, 3)[1]
    one = [
        values(score(scoring(TASK, "whole", parts, truth, "abcde", seed=0, seeds=count)).figures) for count in (1, 2)
    ]
    single = score(scoring(TASK, "whole", parts, truth, "abcde", seed=0, seeds=2))
    statistics = single.figures[0].statistics.sum(0).view(2, 3, 5)
    ious = (statistics[:, 0] / statistics.sum(1)).nanmean(1)
    assert one[0]["mIoU"] == pytest.approx(ious[0].item())
    assert one[1]["mIoU"] == pytest.approx(ious.mean().item())


def test_lengths_of_tokens_do_not_matter(tmp_path: Path) -> None:
    parts, truth = quarters(tmp_path)
    scaled = {"patches": [each * 7.5 for each in parts["patches"]]}
    one, other = (score(scoring(TASK, "whole", each, truth, "abcde", passes=2)) for each in (parts, scaled))
    assert torch.equal(one.figures[0].statistics, other.figures[0].statistics)


def test_first_centres_are_tokens_by_the_seed() -> None:
    features = StubFeatures({"patches": [each[:20].view(4, 5, 4) for each in tokens()]})
    given = scoring(TASK, "whole", features.parts, [], "ab")
    centres = first_centres(features, 3, given)
    known = torch.cat([features.part("patches", at).flatten(0, 1) for at in range(3)])
    assert centres.shape == (3, 3, 4)
    assert all((known - each).abs().amax(1).min() < 1e-6 for each in centres.flatten(0, 1))
    assert torch.equal(centres, first_centres(features, 3, given))
    assert not torch.equal(centres[0], centres[1])
    with pytest.raises(BadInputError, match="there are 60 tokens for 61 classes"):
        first_centres(features, 61, given)


def test_nearest_centre_of_each_seed_is_found() -> None:
    features = StubFeatures({"patches": [torch.tensor([[[2.0, 0], [0, 3]]])]})
    centres = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1.0], [1, 0]]])
    assert clusters_of(features, 0, centres).tolist() == [[[0, 1]], [[1, 0]]]


def test_labels_of_one_class_are_refused(tmp_path: Path) -> None:
    truth = labels(tmp_path, [[[2, 2, 255]]] * 2, 4)
    given = scoring(TASK, "whole", {"patches": [torch.ones(2, 2, 3)] * 2}, truth, "abcd")
    with pytest.raises(BadInputError, match="the labels of the test images have 1 of 4 classes"):
        present_classes(given.dataset, given)


@pytest.mark.slow
def test_black_and_white_are_clusters_of_a_backbone(tmp_path: Path, weights: Path) -> None:
    data = halves(tmp_path / "set", 6)
    settings = EvaluateSettings(image_size=SIDE, workers=0, resamples=100)
    task = api.evaluate(
        EvaluateRequest(ModelRequest("dinov2_custom", weights), ["clusters"], [data], settings)
    ).evaluation.tasks[0]
    sides = [each.side for each in task.figures[0].values]
    assert sides == ["original", "inpainted", "smoothed", "blurred"]
    assert (task.images, task.trained_on) == (6, 0)
    assert all(each.value is not None and each.value > 70 for each in task.figures[0].values)
