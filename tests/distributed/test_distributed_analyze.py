"""Two ranks find what one finds: counts and quantiles exactly, sums and directions up to rounding."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sinder_cli import ModelRequest, api
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.analysis.survey import Surveys, survey
from sinder_cli.analysis.tokens import Subject
from sinder_cli.backbone.opening import load_module
from sinder_cli.defects.prediction import predict
from sinder_cli.defects.spectrum import angle_between
from sinder_cli.distributed import ALONE, Ranks
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.report.documents import analysis_document
from sinder_cli.requests import AnalyzeRequest

Torchrun = Callable[..., "subprocess.Popen[str]"]
SIDE, GRID = 140, (10, 10)


@pytest.fixture(scope="module")
def subjects() -> list[Subject]:
    """The planted backbone and its clean twin."""
    opened = [api.open_model(ModelRequest(name)) for name in ("demo_vit", "demo_vit_clean")]
    return [Subject(backbone, load_module(backbone), predict(backbone)) for backbone in opened]


@pytest.fixture(scope="module")
def pictures(subjects: list[Subject]) -> list[Tensor]:
    """Seven images that the backbone draws."""
    backbone = subjects[0].backbone
    source = api.drawn_images(backbone, 0)
    preprocess = Preprocessing(SIDE, backbone.mean, backbone.std)
    return [preprocess(source.load(index)) for index in range(7)]


def walked(document: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a document by its path."""
    if isinstance(document, dict):
        for name, value in document.items():
            yield from walked(value, f"{path}.{name}")
    elif isinstance(document, list | tuple):
        yield f"{path}.length", len(document)
        for at, value in enumerate(document):
            yield from walked(value, f"{path}.{at}")
    else:
        yield path, document


def assert_same(first: Any, second: Any) -> None:
    """Angles of observed directions to 1e-3°, means to 1e-9, all else exactly."""
    found, expected = dict(walked(first)), dict(walked(second))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        if ".observed." in path and isinstance(value, float):
            assert found[path] == pytest.approx(value, abs=1e-3), path
        elif path.endswith(".mean") or "angle_to_predicted" in path:
            assert found[path] == pytest.approx(value, rel=1e-6), path
        else:
            assert found[path] == value, path


@pytest.mark.parametrize("sides", [1, 2])
def test_two_ranks_find_what_one_finds(
    sides: int, subjects: list[Subject], pictures: list[Tensor], forked: Any
) -> None:
    settings = AnalyzeSettings(device="cpu", min_gap=0.0, norm_threshold=200.0)

    def surveyed(ranks: Ranks) -> Surveys | None:
        images = (([str(at)], pictures[at][None]) for at in ranks.share(range(len(pictures))))
        return survey(subjects[:sides], images, GRID, settings, "cpu", components=True, ranks=ranks)

    alone = surveyed(ALONE)
    first, second = forked(surveyed).answers()
    assert second is None
    assert alone is not None
    assert first.images == alone.images == 7
    for mine, theirs in zip(alone.sides, first.sides, strict=True):
        assert_same([block.model_dump() for block in theirs.blocks], [block.model_dump() for block in mine.blocks])
        assert theirs.curves == mine.curves
        assert_same(theirs.inpainting.model_dump(), mine.inpainting.model_dump() if mine.inpainting else None)
        seen = [block for block in range(len(mine.blocks)) if mine.blocks[block].observed]
        assert all(angle_between(theirs.observed[block], mine.observed[block]) < 1e-3 for block in seen)
        for shares, others in zip(mine.shares, theirs.shares, strict=True):
            assert all(torch.equal(shares[rule], others[rule]) for rule in shares | others)
    assert any(block.observed for block in alone.sides[0].blocks)
    assert_same([pair.model_dump() for pair in first.pairs], [pair.model_dump() for pair in alone.pairs])
    assert len(alone.pairs) == (12 if sides == 2 else 0)
    torch.testing.assert_close(first.basis.components.abs(), alone.basis.components.abs(), rtol=1e-6, atol=1e-9)


def test_a_rank_without_an_image_adds_nothing(subjects: list[Subject], pictures: list[Tensor], forked: Any) -> None:
    def surveyed(ranks: Ranks) -> Surveys | None:
        images = (([str(at)], pictures[at][None]) for at in ranks.share(range(1)))
        return survey(subjects[:1], images, GRID, AnalyzeSettings(device="cpu"), "cpu", ranks=ranks)

    first, _ = forked(surveyed).answers()
    alone = surveyed(ALONE)
    assert alone is not None
    assert_same(
        [block.model_dump() for block in first.sides[0].blocks], [block.model_dump() for block in alone.sides[0].blocks]
    )


@pytest.mark.slow
def test_the_command_under_torchrun_writes_one_report(
    torchrun: Torchrun, small: Path, photographs: Path, tmp_path: Path
) -> None:
    broken = [tmp_path / name for name in ("a.jpg", "b.jpg")]
    for path in broken:
        path.write_bytes(b"broken")
    places = [str(broken[0]), str(broken[1]), str(photographs)]  # one of the broken falls to each rank
    options = ("--weights", small, "--image-size", "168", "--figures", "1", "--workers", "0", "--out", tmp_path / "out")
    run = torchrun("analyze", "dinov2_custom", *places, *options)
    shown, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    settings = AnalyzeSettings(image_size=168, figures=1, workers=0)
    alone = api.analyze(AnalyzeRequest(ModelRequest("dinov2_custom", small), places, settings))
    assert alone is not None
    expected = json.loads(json.dumps(analysis_document(alone.analysis)))
    found = json.loads(shown)
    assert (tmp_path / "out" / "report.html").is_file()
    assert found["skipped"].keys() == expected["skipped"].keys() == {str(path) for path in broken}
    assert found["images"] == expected["images"] == 6
    assert_same(found["blocks"], expected["blocks"])
    assert found["verdict"]["kind"] == expected["verdict"]["kind"] == "defects"
    for path in broken:
        assert errors.count(f"sinder: warning: skipped {path}") == 1
