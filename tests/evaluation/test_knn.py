"""Task `knn`: votes by hand, and class folders as people have them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kept_features import KeptFeatures
from PIL import Image
from sinder_plugins.tasks import knn
from sinder_plugins.tasks.knn import TASK, VIEW, KnnSettings, neighbours, votes_of
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from sinder_cli import BadInputError, NoInputError, SinderError
from sinder_cli.evaluation.contract import Dataset, Places, Scoring, SideFeatures
from sinder_cli.images.sources import DrawnImages


def voted(
    test: torch.Tensor, train: torch.Tensor, classes: torch.Tensor, count: int, settings: KnnSettings, at_a_time: int
) -> dict[int, torch.Tensor]:
    test, train = normalize(test, dim=1), normalize(train, dim=1)
    return votes_of(neighbours(test, train.split(at_a_time), max(settings.k)), classes, count, settings)


@pytest.mark.parametrize("at_a_time", [1, 3, 5, 100])
def test_votes_are_those_of_a_loop(at_a_time: int) -> None:
    draw = torch.Generator().manual_seed(0)
    test, train = torch.randn(5, 6, generator=draw), torch.randn(12, 6, generator=draw)
    classes = torch.tensor([index % 3 for index in range(12)])
    found = voted(test, train, classes, 3, KnnSettings(k=(1, 4), temperature=0.2), at_a_time)
    for at, token in enumerate(test):
        cosines = [
            (torch.cosine_similarity(token, other, dim=0).item(), int(classes[i])) for i, other in enumerate(train)
        ]
        cosines.sort(reverse=True)
        for k in (1, 4):
            votes = [0.0] * 3
            for cosine, label in cosines[:k]:
                votes[label] += math.exp(cosine / 0.2)
            shares = torch.tensor(votes)
            torch.testing.assert_close(found[k][at] / found[k][at].sum(), shares / shares.sum(), atol=1e-4, rtol=1e-3)


def test_the_nearest_neighbour_is_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    test, train, classes = draw.normal(size=(30, 8)), draw.normal(size=(50, 8)), draw.integers(0, 4, 50)
    theirs = KNeighborsClassifier(1, metric="cosine").fit(train, classes).predict(test)
    ours = voted(torch.tensor(test), torch.tensor(train), torch.tensor(classes), 4, KnnSettings(k=(1,)), 7)[1]
    assert ours.argmax(dim=1).tolist() == theirs.tolist()


def scoring(test: torch.Tensor, train: torch.Tensor, truth: list[int], known: list[int], classes: int) -> Scoring:
    side = SideFeatures({VIEW: KeptFeatures({"cls": list(test)})}, {VIEW: KeptFeatures({"cls": list(train)})})
    source = DrawnImages((None,) * len(truth), "drawn")  # type: ignore[arg-type]  # no image is decoded
    names = tuple(map(str, range(classes)))
    dataset = Dataset(source, truth, source, known, names)
    return Scoring(side, dataset, KnnSettings.model_validate({"k": "1,3"}), side)


def test_accuracy_counts_images_whose_class_wins() -> None:
    centres = 5 * torch.eye(7)
    noise = 0.1 * torch.randn(14, 7, generator=torch.Generator().manual_seed(0))
    known = [index % 7 for index in range(14)]
    scores = TASK.score(scoring(centres[[0, 1, 2, 3]], centres[known] + noise, [0, 1, 2, 5], known, 7))
    values = {f.name: f.value(f.statistics.sum(dim=0)).item() for f in scores.figures}
    assert values["top-1, k=1"] == values["top-1, k=3"] == 0.75
    assert scores.by_image is not None
    assert scores.by_image[:3].min() > scores.by_image[3]


def test_the_class_is_among_the_five_best() -> None:
    """The image's own class comes third, and then sixth."""
    train = torch.eye(7)
    test = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]] * 2)
    scores = TASK.score(replace(scoring(test, train, [2, 5], list(range(7)), 7), settings=KnnSettings(k=(7,))))
    values = {f.name: f.value(f.statistics.sum(dim=0)).item() for f in scores.figures}
    assert values == {"top-1, k=7": 0, "top-5, k=7": 0.5}


def test_length_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors are normalized, and all parts of both splits are read."""
    monkeypatch.setattr(knn, "KNOWN_AT_A_TIME", 2)
    monkeypatch.setattr(knn, "TESTED_AT_A_TIME", 3)
    train = torch.tensor([[9.0, 9, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 5]])
    test = torch.tensor([[2.0, 0.1, 0], [0, 3, 0.1], [0, 0, 1], [0, 0.2, 7]])
    scores = TASK.score(replace(scoring(test, train, [3, 1, 2, 2], [0, 1, 2, 3, 2], 4), settings=KnnSettings(k=(1,))))
    assert scores.figures[0].statistics[:, 0].tolist() == [1, 1, 1, 1]
    assert scores.notes == ("top-5 is left out: there are no more than five classes",)


def test_the_picture_is_the_nearest_image_to_train_on() -> None:
    colours = tuple(Image.new("RGB", (8, 8), (40 * at, 0, 0)) for at in range(3))
    given = scoring(torch.eye(3)[[2, 0]], torch.eye(3), [2, 0], [0, 1, 2], 3)
    given = replace(given, dataset=replace(given.dataset, train=DrawnImages(colours, "drawn")))
    picture = TASK.score(given).picture
    assert picture is not None
    assert [picture(index)[0, 0, 0] for index in (0, 1)] == [80, 0]


def fill(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.png")


def read(folder: Path, train: Path | None = None, seed: int = 0) -> Dataset:
    places = Places((str(folder),), (str(train),) if train else (), seed)
    return TASK.read(places, KnnSettings())


def test_splits_are_found_by_their_usual_names(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            fill(tmp_path / split / name, count)
    found = read(tmp_path)
    assert found.classes == ("cat", "dog")
    assert (found.train_truth, found.truth) == ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1])
    assert found.train is not None
    assert Path(found.train.name(3)).parent == tmp_path / "train" / "dog"
    assert read(tmp_path / "val", tmp_path / "train").truth == found.truth


def test_a_set_without_splits_is_split_by_the_seed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fill(tmp_path / name, 10)
    first, again, other = read(tmp_path), read(tmp_path), read(tmp_path, seed=1)
    assert (len(first.truth), len(first.train_truth)) == (4, 16)
    assert first.train is not None
    names = [{source.name(i) for i in range(len(source))} for source in (first.test, first.train)]
    assert not names[0] & names[1]
    assert [first.test.name(i) for i in range(4)] == [again.test.name(i) for i in range(4)]
    assert names[0] != {other.test.name(i) for i in range(4)}


def test_malformed_class_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="name it with --data"):
        TASK.read(Places(()), KnnSettings())
    fill(tmp_path / "one" / "cat", 3)
    for build, kind, words in (
        (lambda: None, BadInputError, "there is only cat"),
        (lambda: (tmp_path / "one" / "dog").mkdir(), BadInputError, r"one/dog: the class has no images"),
        (lambda: fill(tmp_path / "one" / "dog" / "x", 1), BadInputError, r"one/dog: the class has one image"),
    ):
        build()
        with pytest.raises(SinderError, match=words) as error:
            read(tmp_path / "one")
        assert isinstance(error.value, kind)
        assert error.value.exit_code == 65
    for split, name in (("train", "cat"), ("train", "dog"), ("val", "cow"), ("val", "cat")):
        fill(tmp_path / "two" / split / name, 1)
    with pytest.raises(BadInputError, match="val/cow: the class is not in"):
        read(tmp_path / "two")
