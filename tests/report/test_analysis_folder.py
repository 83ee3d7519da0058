"""The folder of an analysis: all of it or nothing, figures with their words, and images gone through one at a time."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_analysis import Made
from PIL import Image
from safetensors import safe_open

from sinder_cli.analysis.per_image import Portrait
from sinder_cli.analysis.records import Analysis
from sinder_cli.errors import CannotCreateError
from sinder_cli.events import Advanced, Finished, Started, silent
from sinder_cli.report.analysis.page import EMBEDDED_IMAGES, SCALED_BY, write_analysis

STAGES = ("attention", "mlp", "block", "cumulative")
KINDS = {
    "one side": Made(),
    "a comparison": Made(compared=True),
    "no cls": Made(has_cls=False),
    "no defects": Made(first=None),
    "registers and a threshold": Made(registers=True, settings={"norm_threshold": 30, "blocks": "1,3"}),
    "one block": Made(depth=1, first=0, drawn=1),
    "no pictures": Made(drawn=0),
    "tokens that are not finite": Made(depth=2, first=None, broken=0, drawn=1, compared=True),
    "attention that was not seen": Made(depth=1, first=None, attended=False, drawn=1),
}


@pytest.fixture(scope="module", params=KINDS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Path, Analysis]:
    made = KINDS[request.param]
    folder = tmp_path_factory.mktemp("analysis") / "out"
    return made, folder, write_analysis(folder, made.result(), silent)


def test_the_document_is_the_record_and_validates(written: tuple[Made, Path, Analysis]) -> None:
    _, folder, analysis = written
    text = (folder / "report.json").read_text("utf-8")
    assert Analysis.model_validate(json.loads(text)) == analysis
    assert text.startswith('{\n  "model": "demo_vit"')


def test_the_folder_holds_these_files_and_no_others(written: tuple[Made, Path, Analysis]) -> None:
    _, folder, analysis = written
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    figures = {figure.file for figure in analysis.figures}
    assert files == {"report.json", "report.html", "directions.safetensors"} | figures
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_directions_are_one_tensor_a_stage_and_side(written: tuple[Made, Path, Analysis]) -> None:
    made, folder, _ = written
    names = [*(f"predicted.{stage}" for stage in STAGES), "observed"]
    names += [f"other.{name}" for name in names] if made.compared else []
    with safe_open(folder / "directions.safetensors", "pt") as file:
        assert set(file.keys()) == set(names)
        assert file.metadata()["model"] == ("demo_vit | demo_vit_clean" if made.compared else "demo_vit")
        assert "before the final norm" in file.metadata()["content"]
        for name in names:
            tensor = file.get_tensor(name)
            assert (tuple(tensor.shape), tensor.dtype) == ((made.depth, made.width), torch.float32)


def test_every_figure_is_a_png_with_its_caption_inside(written: tuple[Made, Path, Analysis]) -> None:
    _, folder, analysis = written
    assert len({figure.file for figure in analysis.figures}) == len(analysis.figures)
    for figure in analysis.figures:
        with Image.open(folder / figure.file) as image:
            assert image.format == "PNG"
            texts = image.text  # type: ignore[attr-defined]
            assert texts["Title"]
            assert texts["Description"]
            assert figure.caption.endswith(texts["Description"])
        assert "before the final norm" in figure.caption or "-attention." in figure.file


def test_the_figures_are_those_that_were_asked_for(written: tuple[Made, Path, Analysis]) -> None:
    made, _, analysis = written
    sides = (analysis, analysis.other) if analysis.other else (analysis,)
    firsts = {side.verdict.first_block for side in sides} - {None}
    charts = ["norms", *(f"angles-{stage}" for stage in STAGES)]
    charts += [f"positions-block-{block}" for block in firsts | {made.depth - 1}]
    expected = {chart + ending for chart in charts for ending in ("", "-other")[: len(sides)]}
    expected |= {"cosine"} if made.compared else set()
    kinds = [
        "pca",
        "norm",
        "angles",
        *(["attention"] if made.has_cls and made.attended else []),
        *(["cosine"] if made.compared else []),
    ]
    expected |= {f"{image:04d}-image-{image}-{kind}" for image in range(made.drawn) for kind in kinds}
    found = {Path(figure.file).stem for figure in analysis.figures}
    targets = {name for name in found if "-targets" in name}
    assert found - targets == expected
    assert len(targets) >= made.drawn if made.first is not None else not targets


def test_a_figure_says_what_its_grey_patches_are(tmp_path: Path) -> None:
    made = Made(depth=1, first=None, broken=0, drawn=1, compared=True)
    figures = write_analysis(tmp_path / "out", made.result(), silent).figures
    for kind in ("pca", "norm", "angles", "cosine"):
        (caption,) = [each.caption for each in figures if each.file.endswith(f"image-0-{kind}.png")]
        assert caption.endswith("Dark grey: tokens that are not finite.")


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    made = Made(depth=2, compared=True, drawn=1)
    for name in ("one", "two"):
        write_analysis(tmp_path / name, made.result(), silent)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) > 15
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def breaking(portraits: Iterator[Portrait]) -> Iterator[Portrait]:
    yield next(portraits)
    raise RuntimeError("the device is gone")


def test_nothing_is_left_when_drawing_fails_midway(tmp_path: Path) -> None:
    result = Made().result()
    with pytest.raises(RuntimeError, match="the device is gone"):
        write_analysis(tmp_path / "out", replace(result, portraits=breaking(result.portraits)), silent)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(CannotCreateError, match="it is not empty"):
        write_analysis(tmp_path, Made(drawn=0).result(), silent)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


class Alive:
    """How many tensors of a stream were in memory at once, at most."""

    def __init__(self) -> None:
        self.now: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most = 0

    def add(self, tensor: torch.Tensor) -> None:
        self.now.add(tensor)
        self.most = max(self.most, len(self.now))


def test_many_images_are_drawn_one_at_a_time(tmp_path: Path) -> None:
    drawn = SCALED_BY + 20
    made = Made(depth=1, first=None, grid=(6, 6), width=4, drawn=drawn)
    result, images, maps = made.result(), Alive(), Alive()

    def counted() -> Iterator[Portrait]:
        for portrait in result.portraits:
            images.add(portrait.image)
            maps.add(portrait.sides[0].norms)
            yield portrait
            del portrait

    analysis = write_analysis(tmp_path / "out", replace(result, portraits=counted()), silent)
    assert images.most <= 3
    assert SCALED_BY <= maps.most <= SCALED_BY + 3
    assert len([figure for figure in analysis.figures if figure.file.endswith("-pca.png")]) == drawn
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert page.count('<section class="image">') == EMBEDDED_IMAGES
    assert f"These are the first {EMBEDDED_IMAGES} of {drawn} images that were drawn; the others are in" in page


def test_progress_is_told_image_by_image(tmp_path: Path) -> None:
    events: list[object] = []
    write_analysis(tmp_path / "out", Made(depth=1, drawn=3).result(), events.append)
    assert events == [Started("drawing", 3, "images"), *[Advanced("drawing")] * 3, Finished("drawing")]


def test_clashing_names_are_kept_apart_and_readable(tmp_path: Path) -> None:
    names = ("../../etc/passwd", "\udcff<b>.png", "a/ü ü.jpg")
    analysis = write_analysis(tmp_path / "out", Made(depth=1, drawn=3, names=names).result(), silent)
    stems = {figure.file.split("/")[1].rsplit("-", 1)[0] for figure in analysis.figures if "/000" in figure.file}
    assert stems == {"0000-passwd", "0001-udcff-b", "0002-image"}
    assert any(figure.caption.startswith("\\udcff<b>.png") for figure in analysis.figures)


def test_maps_in_a_file_have_the_colours_of_the_page(tmp_path: Path) -> None:
    write_analysis(tmp_path / "out", Made(drawn=1).result(), silent)
    with Image.open(tmp_path / "out" / "figures" / "0000-image-0-norm.png") as image:
        assert np.asarray(image).std() > 10
        assert image.width > 500
