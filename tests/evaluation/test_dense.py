"""Task `dense`: its measures against slow ones, and what they say of good, ruined and smoothed features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from kept_features import KeptFeatures
from sinder_plugins.tasks.dense import (
    SHIFTED,
    TASK,
    WHOLE,
    DenseSettings,
    boundary_contrast,
    effective_rank,
    gram_drift,
)
from torch import Tensor

from sinder_cli.evaluation.contract import Dataset, Scores, Scoring, SideFeatures
from sinder_cli.images.sources import DrawnImages

CELLS = 2


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_boundary_contrast_is_that_of_a_loop_over_neighbours() -> None:
    patches, colours = drawn(6, 5, 8), drawn(6, 5, 3, seed=1).sigmoid()
    tokens = (patches - patches.mean(dim=(0, 1))).numpy()
    pairs = []
    for row in range(6):
        for column in range(5):
            for down, right in ((1, 0), (0, 1)):
                if row + down < 6 and column + right < 5:
                    one, other = tokens[row, column], tokens[row + down, column + right]
                    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
                    difference = (colours[row, column] - colours[row + down, column + right]).norm().item()
                    pairs.append((difference, cosine))
    low, high = np.quantile([pair[0] for pair in pairs], [0.25, 0.75])
    alike = [cosine for difference, cosine in pairs if difference <= low]
    apart = [cosine for difference, cosine in pairs if difference >= high]
    found, _ = boundary_contrast(patches, colours, 0.25, 0.75, seed=0)
    assert found == pytest.approx(np.mean(alike) - np.mean(apart), abs=1e-5)


def test_features_that_follow_colours_have_contrast_beyond_the_null() -> None:
    colours = torch.zeros(12, 12, 3)
    colours[:, 6:] = 1
    colours[6:] += 0.5
    colours += 0.01 * drawn(12, 12, 3)
    contrast, shuffled = boundary_contrast(colours @ drawn(3, 16, seed=2), colours, 0.25, 0.9, seed=0)
    assert contrast > 0.2
    assert abs(shuffled) < 0.15


def test_an_image_of_one_colour_has_no_contrast() -> None:
    assert math.isnan(boundary_contrast(drawn(6, 6, 4), torch.zeros(6, 6, 3), 0.25, 0.75, 0)[0])


def test_effective_rank_is_the_exponential_of_an_entropy() -> None:
    patches = drawn(7, 6, 5)
    tokens = (patches - patches.mean(dim=(0, 1))).flatten(0, 1).double()
    shares = torch.linalg.svdvals(tokens)
    shares = shares / shares.sum()
    assert effective_rank(patches) == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares.tolist())), rel=1e-4)
    line = torch.arange(42.0).view(7, 6, 1) * drawn(5)
    assert effective_rank(line) == pytest.approx(1, abs=0.05)


def test_gram_drift_ignores_scale_and_rotation() -> None:
    patches = drawn(4, 5, 6)
    rotation = torch.linalg.qr(drawn(6, 6, seed=3)).Q
    assert gram_drift(3 * patches @ rotation, patches) == pytest.approx(0, abs=1e-5)
    other = drawn(4, 5, 6, seed=4)
    cosines = [
        [torch.cosine_similarity(a, b, dim=0).item() for b in each.flatten(0, 1)]
        for each in (patches, other)
        for a in each.flatten(0, 1)
    ]
    one, two = np.array(cosines[:20]), np.array(cosines[20:])
    assert gram_drift(other, patches) == pytest.approx(np.sqrt(np.mean((one - two) ** 2)), rel=1e-4)


def side(patches: Tensor, marked: Tensor, colours: Tensor, cls: Tensor) -> SideFeatures:
    """A side whose second view shows the same tokens, but for some noise."""
    view = patches[CELLS:, CELLS:] + 0.05 * drawn(*patches[CELLS:, CELLS:].shape, seed=5)
    norms = patches.norm(dim=-1)[None]
    whole = {"stream": [patches], "outlying": [marked], "colour": [colours], "stream_cls": [cls], "norms": [norms]}
    whole["outlying_by_block"] = [marked[None]]
    return SideFeatures({WHOLE: KeptFeatures(whole), SHIFTED: KeptFeatures({"stream": [view]})})


def scored(features: SideFeatures, original: SideFeatures, inpainted: SideFeatures | None = None) -> Scores:
    dataset = Dataset(DrawnImages((None,), "drawn"), [None])  # type: ignore[arg-type]  # no image is decoded
    return TASK.score(Scoring(features, dataset, DenseSettings(), original, inpainted))


def value(scores: Scores, name: str) -> float:
    figure = next(figure for figure in scores.figures if figure.name == name)
    return figure.value(figure.statistics.sum(dim=0)).item()


def test_figures_tell_a_repair_from_the_original() -> None:
    good, colours, cls = drawn(10, 10, 16), drawn(10, 10, 3, seed=1).sigmoid(), drawn(16, seed=2)
    marked = torch.zeros(10, 10, dtype=torch.bool)
    marked[4, 4] = marked[6, 7] = True
    spoilt = good.clone()
    spoilt[marked] = 80 * drawn(16, seed=9)
    nothing = torch.zeros_like(marked)
    before, after = side(spoilt, marked, colours, cls), side(good, nothing, colours, cls)
    original, repaired = scored(before, before, after), scored(after, before, after)
    assert value(original, "outlying tokens") == pytest.approx(0.02)
    assert value(repaired, "outlying tokens") == 0
    assert value(repaired, "shift retrieval, marked") == 1
    assert value(original, "shift retrieval, marked") < 1
    assert value(repaired, "good to original") == pytest.approx(1)
    assert value(repaired, "marked to inpainted") == pytest.approx(1)
    assert value(repaired, "marked to original") < 0.9
    assert value(original, "marked to original") == pytest.approx(1)
    assert value(original, "largest norm / median") > 20 > value(repaired, "largest norm / median")
    outlying, by_block = repaired.notes
    assert outlying == "outlying tokens by block: 0 %"
    assert original.notes[0] == "outlying tokens by block: 2 %"
    assert by_block == f"largest norm / median by block: {value(repaired, 'largest norm / median'):.3g}"  # of one block
    assert original.by_image is not None
    assert repaired.by_image is not None
    assert repaired.by_image[0] >= original.by_image[0]
    assert original.picture is not None
    assert original.picture(0).shape == (10, 10, 3)


def test_fewer_outliers_alone_are_no_success() -> None:
    good = drawn(8, 8, 8)
    none = torch.zeros(8, 8, dtype=torch.bool)
    features = side(good, none, drawn(8, 8, 3).sigmoid(), drawn(8))
    figures = {figure.name: figure.better for figure in scored(features, features).figures}
    assert figures["outlying tokens"] == figures["largest norm / median"] == "neither"


def test_tokens_beside_marked_ones_are_not_those_that_are_marked() -> None:
    good = drawn(10, 10, 16)
    marked = torch.zeros(10, 10, dtype=torch.bool)
    marked[5, 5] = True
    spoilt = good.clone()
    spoilt[5, 5] = 0.0  # never found again
    features = side(spoilt, marked, drawn(10, 10, 3).sigmoid(), drawn(16))
    scores = scored(features, features)
    counts = {f.name: f.statistics.sum(dim=0).tolist() for f in scores.figures if f.name.startswith("shift")}
    assert counts["shift retrieval, marked"][1] == 1
    assert counts["shift retrieval, beside marked"] == [8, 8]
    assert counts["shift retrieval, others"][1] == 64 - 9


def test_a_cautious_word_goes_with_figures_that_mislead() -> None:
    features = side(drawn(8, 8, 8), torch.zeros(8, 8, dtype=torch.bool), drawn(8, 8, 3).sigmoid(), drawn(8))
    cautions = {figure.name: figure.caution for figure in scored(features, features).figures}
    assert "ruined model" in cautions["shift retrieval, others"]
    assert cautions["outlying tokens"] == "Fewer of them are no success by themselves."


def test_tokens_that_are_not_finite_end_nothing() -> None:
    patches = drawn(8, 8, 8)
    patches[2, 3] = torch.inf
    features = side(patches, torch.zeros(8, 8, dtype=torch.bool), drawn(8, 8, 3).sigmoid(), drawn(8))
    scores = scored(features, features)
    assert math.isnan(effective_rank(patches))
    assert scores.notes[0] == "1 image has tokens that are not finite: left out where nothing can be measured"
    others = next(figure for figure in scores.figures if figure.name == "shift retrieval, others")
    assert others.statistics[0].tolist() == [35, 36]  # all but that token are found again
    assert scores.picture is not None
    assert scores.picture(0).shape == (8, 8, 3)
