"""`api.analyze`: from names of models and folders of photographs to a document, a verdict and portraits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from sinder_plugins.demo.planting import BLOCK, NEURON, demo_weights
from torch import Tensor

from sinder_cli import BadInputError, ModelRequest, UsageError, api, inputs
from sinder_cli.analysis.records import Analysis, Rule
from sinder_cli.analysis.run import AnalysisResult
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.analysis.tokens import Subject
from sinder_cli.defects.spectrum import angle_between
from sinder_cli.events import Noted, Warned
from sinder_cli.files import json_text
from sinder_cli.report.documents import analysis_document
from sinder_cli.requests import AnalyzeRequest, Process

DRAWN = 6


def settings(**given: Any) -> AnalyzeSettings:
    return AnalyzeSettings.model_validate({"device": "cpu", "workers": 0, **given})


@pytest.fixture(scope="module")
def random_model(checkpoint: Callable[..., Path]) -> ModelRequest:
    """The small model with registers."""
    return ModelRequest("dinov2_custom", checkpoint("small"))


@pytest.fixture(scope="module")
def twins() -> Iterator[AnalysisResult]:
    """The demo beside its clean twin, on images that it draws itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "DRAWN_IMAGES", DRAWN)
        other = ModelRequest("demo_vit_clean")
        chosen = settings(batch_size=3, figures=2)
        yield api.analyze(AnalyzeRequest(ModelRequest("demo_vit"), (), chosen, compare=other, portraits=True))


def test_the_demo_has_defects_from_the_planted_block_on(twins: AnalysisResult) -> None:
    verdict = twins.analysis.verdict
    assert (verdict.kind, verdict.first_block) == ("defects", BLOCK)
    assert verdict.sentence.startswith("defects from block 5: ")
    assert verdict.angle_to_predicted_deg is not None
    assert verdict.angle_to_predicted_deg < 25
    assert verdict.tokens >= 3 * DRAWN
    for block in twins.analysis.blocks:
        marked = block.marked["outlying"]
        assert marked is not None
        assert marked.images == (0 if block.block < BLOCK else DRAWN)
        assert block.determined == (block.block >= BLOCK)


def test_its_clean_twin_has_none(twins: AnalysisResult) -> None:
    assert twins.analysis.other is not None
    verdict = twins.analysis.other.verdict
    assert (verdict.kind, verdict.first_block, verdict.tokens) == ("none", None, 0)
    assert all(block.observed is None for block in twins.analysis.other.blocks)
    assert not twins.surveys[1].observed.any()


def test_observed_and_predicted_directions_are_the_planted_one(twins: AnalysisResult) -> None:
    planted = demo_weights(True)[f"blocks.{BLOCK}.down.weight"][:, NEURON]
    for block in range(BLOCK, 12):
        observed, predicted = twins.surveys[0].observed[block], twins.predictions[0].directions()[block]
        assert angle_between(observed, planted) < 5
        assert angle_between(predicted, planted) < 25
        record = twins.analysis.blocks[block].observed
        assert record is not None
        found = record.angle_to_predicted_deg["cumulative"]
        assert found == pytest.approx(angle_between(observed, predicted), abs=1e-3)
        assert record.explained > 0.9
        assert record.spread_within_deg is not None
        assert record.spread_within_deg < 20
    assert not twins.surveys[0].observed[:BLOCK].any()


def test_the_twins_part_at_the_planted_block(twins: AnalysisResult) -> None:
    assert twins.analysis.comparison is not None
    for pair in twins.analysis.comparison:
        assert pair.cls_cosine is not None
        if pair.block < BLOCK:
            assert pair.cls_cosine.min == pytest.approx(1, abs=1e-5)
            assert pair.agreement == {"outlying": None}
        else:
            assert pair.patch_cosine is not None
            assert pair.patch_cosine.min < 0.5
            assert pair.agreement == {"outlying": 0.0}


def test_portraits_are_of_images_spread_over_all(twins: AnalysisResult) -> None:
    drawn = list(twins.portraits)
    assert twins.drawn == len(drawn) == 2
    assert [portrait.name for portrait in drawn] == ["demo_vit #0", "demo_vit #3"]
    assert all(len(portrait.sides) == 2 for portrait in drawn)
    assert drawn[0].sides[0].targets is not None
    assert drawn[0].sides[0].targets.block == BLOCK
    assert list(drawn[0].sides[0].angles) == list(twins.blocks) == [2, 5, 8, 11]


def test_the_document_survives_json(twins: AnalysisResult) -> None:
    text = twins.analysis.model_dump_json()
    assert Analysis.model_validate_json(text).model_dump_json() == text
    assert "NaN" not in text
    assert "Infinity" not in text
    assert twins.analysis.grid == (20, 20)
    assert twins.analysis.settings["batch_size"] == 3
    assert "before the final norm" in twins.analysis.tapped
    assert set(twins.analysis.blocks[0].marked) == set(get_args(Rule))


@pytest.mark.parametrize("resize", ["short", "square", "none"])
def test_photographs_are_read_as_pil_would(
    resize: str, random_model: ModelRequest, small: Subject, photographs: Path, naive: Any, tmp_path: Path
) -> None:
    def cut(image: Tensor) -> Tensor:
        left = (image.shape[2] - 112) // 2
        return image[:, :, left : left + 112] if resize == "square" else image

    if resize == "none":  # at their own size they would take long
        for path in photographs.iterdir():
            Image.open(path).convert("RGB").crop((30, 40, 30 + 131, 40 + 117)).save(tmp_path / f"{path.stem}.png")
        photographs = tmp_path
    paths = sorted(photographs.iterdir())
    images = [
        naive.pixels(image, small.backbone, min(image.size) if resize == "none" else 112)
        for image in map(Image.open, paths)
    ]
    given = {} if resize == "none" else {"image_size": 112}
    result = api.analyze(
        AnalyzeRequest(random_model, [str(photographs)], settings(resize=resize, batch_size=2, **given))
    )
    assert result.analysis.images == len(paths)
    assert result.analysis.grid == (8, 8)
    grids = naive.grids(small, [cut(image) for image in images])
    for block, each in zip(result.analysis.blocks, grids, strict=True):
        norms = np.concatenate([np.linalg.norm(grid, axis=-1).ravel() for grid in each])
        found = block.patch_norm
        assert found is not None
        assert found.count == norms.size
        # whether the cut is made before or after the resize's rounding moves single pixels
        assert (found.mean, found.min, found.max) == pytest.approx((norms.mean(), norms.min(), norms.max()), rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_limit_draws_so_many_images_by_the_seed(
    seed: int, random_model: ModelRequest, small: Subject, photographs: Path, naive: Any
) -> None:
    given = settings(image_size=112, limit=2, seed=seed)
    result = api.analyze(AnalyzeRequest(random_model, [str(photographs)], given))
    chosen = np.random.default_rng(seed).choice(5, 2, replace=False)
    paths = sorted(photographs.iterdir())
    images = [naive.pixels(Image.open(paths[at]), small.backbone, 112) for at in sorted(chosen.tolist())]
    norms = np.concatenate([np.linalg.norm(grid, axis=-1).ravel() for grid in naive.grids(small, images)[-1]])
    found = result.analysis.blocks[-1].patch_norm
    assert result.analysis.images == 2
    assert found is not None
    assert (found.count, found.mean) == (norms.size, pytest.approx(norms.mean(), rel=1e-4))
    again = api.analyze(AnalyzeRequest(random_model, [str(photographs)], given))
    assert again.analysis == result.analysis


def test_clamping_makes_the_second_model_of_the_first(random_model: ModelRequest, photographs: Path) -> None:
    place, size = [str(photographs / "coffee.png")], 112
    clamped = api.analyze(AnalyzeRequest(random_model, place, settings(image_size=size, clamp=100))).analysis
    plain = api.analyze(AnalyzeRequest(random_model, place, settings(image_size=size))).analysis
    assert clamped.blocks == plain.blocks
    assert plain.other is None
    assert plain.comparison is None
    assert clamped.other is not None
    assert clamped.comparison is not None
    assert clamped.other.weights == f"{clamped.weights}, singular values clamped at K = 100"
    assert clamped.other.blocks[0].gap != clamped.blocks[0].gap
    cosine = clamped.comparison[-1].patch_cosine
    assert cosine is not None
    assert 0.9 < cosine.mean < 0.9999


def test_clamping_at_the_first_singular_value_changes_nothing(random_model: ModelRequest, photographs: Path) -> None:
    found = api.analyze(
        AnalyzeRequest(random_model, [str(photographs / "coffee.png")], settings(image_size=112, clamp=1))
    ).analysis
    assert found.other is not None
    assert found.other.blocks == found.blocks


def test_a_named_and_a_clamped_model_are_one_too_many(random_model: ModelRequest, photographs: Path) -> None:
    with pytest.raises(UsageError, match="cannot compare with two models"):
        api.analyze(AnalyzeRequest(random_model, [str(photographs)], settings(clamp=3), compare=random_model))


def test_models_of_other_shapes_are_refused(random_model: ModelRequest, photographs: Path) -> None:
    with pytest.raises(
        UsageError, match="cannot compare demo_vit with dinov2_custom: their width differs, 192 and 128"
    ):
        api.analyze(AnalyzeRequest(ModelRequest("demo_vit"), [str(photographs)], settings(), compare=random_model))


def test_a_missing_block_is_refused_before_any_image_is_run(random_model: ModelRequest) -> None:
    with pytest.raises(UsageError, match="cannot draw block 3"):
        api.analyze(AnalyzeRequest(random_model, [__file__], settings(blocks="0,3")))


def test_what_cannot_be_decoded_is_named_counted_and_not_drawn(
    random_model: ModelRequest, photographs: Path, tmp_path: Path
) -> None:
    shutil.copy(photographs / "coffee.png", tmp_path / "b.png")
    broken = tmp_path / "a.png"
    broken.write_bytes((photographs / "coffee.png").read_bytes()[:40_000])
    told: list[Any] = []
    result = api.analyze(
        AnalyzeRequest(random_model, [str(tmp_path)], settings(image_size=112), portraits=True),
        process=Process(emit=told.append),
    )
    assert result.analysis.images == 1
    assert list(result.analysis.skipped) == [str(broken)]
    assert [event for event in told if isinstance(event, Warned)]
    assert result.drawn == 1
    assert [portrait.name for portrait in result.portraits] == [str(tmp_path / "b.png")]
    (tmp_path / "b.png").unlink()
    with pytest.raises(BadInputError, match="no image could be decoded: all 1 failed"):
        api.analyze(AnalyzeRequest(random_model, [str(tmp_path)], settings(image_size=112)))


@pytest.mark.parametrize(
    ("draw", "figures", "count"), [(False, 8, 0), (True, 0, 0), (True, 2, 2), (True, 8, 5), (True, "all", 5)]
)
def test_so_many_portraits_are_drawn_as_were_asked_for(
    draw: bool, figures: int | str, count: int, random_model: ModelRequest, photographs: Path
) -> None:
    result = api.analyze(
        AnalyzeRequest(random_model, [str(photographs)], settings(image_size=70, figures=figures), portraits=draw)
    )
    assert result.drawn == count
    drawn = list(result.portraits)
    assert len(drawn) == count
    assert len({portrait.name for portrait in drawn}) == count
    for portrait in drawn:
        h, w = portrait.image.shape[1] // 14, portrait.image.shape[2] // 14
        assert portrait.sides[0].norms.shape == (h, w)
        assert torch.isfinite(portrait.sides[0].components).all()


@pytest.mark.parametrize(("size", "most"), [(112, 2048), (518, 4 * 37 * 37)])
def test_the_default_bound_is_four_squares_or_2048_tokens(size: int, most: int, random_model: ModelRequest) -> None:
    backbone = api.open_model(random_model)
    assert api.preprocessing(backbone, size, "short").max_tokens == most
    assert api.preprocessing(backbone, size, "short", 100).max_tokens == 100
    assert [api.preprocessing(backbone, size, resize).max_tokens for resize in ("square", "none")] == [None, None]


def test_a_long_image_is_scaled_down_and_this_is_reported(random_model: ModelRequest, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, shape in (("four.png", (70, 280)), ("long.png", (70, 2240)), ("line.png", (1, 5000))):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(tmp_path / name)
    told: list[object] = []
    result = api.analyze(
        AnalyzeRequest(random_model, [str(tmp_path)], settings(image_size=112, max_tokens=1000)),
        process=Process(emit=told.append),
    )
    assert result is not None
    assert result.analysis.settings["max_tokens"] == 1000
    assert list(result.analysis.skipped) == [str(tmp_path / "line.png")]
    assert "too narrow: scaled down to 1000 tokens" in result.analysis.skipped[str(tmp_path / "line.png")]
    assert told.count(Noted("1 image (long.png) scaled down to at most 1,000 patch tokens (--max-tokens)")) == 1
    norm = result.analysis.blocks[0].patch_norm
    assert norm is not None
    assert norm.count == 8 * 32 + 5 * 178  # √(1000 / 32) = 5.6 patches, 178.9 patches
    untouched = api.analyze(
        AnalyzeRequest(random_model, [str(tmp_path / "long.png")], settings(image_size=112)),
        process=Process(emit=told.append),
    )
    assert untouched is not None
    assert untouched.analysis.blocks[0].patch_norm.count == 8 * 256


def test_a_bound_is_refused_where_it_would_do_nothing() -> None:
    with pytest.raises(ValueError, match="square has the tokens of its image_size"):
        settings(resize="square", max_tokens=100)
    assert settings(resize="none", max_tokens=100).max_tokens == 100


def test_names_of_skipped_images_are_exact_in_the_document(random_model: ModelRequest, tmp_path: Path) -> None:
    names = ["new\nline.png", "esc\x1b[31m.png", "u\u2028x  y.png", "b\udcff.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"no image")
    Image.new("RGB", (70, 70)).save(tmp_path / "a.png")
    result = api.analyze(AnalyzeRequest(random_model, [str(tmp_path)], settings(image_size=70)))
    assert result is not None
    document = json.loads(json_text(analysis_document(result.analysis)))
    assert set(document["skipped"]) == {str(tmp_path / name) for name in names}
