"""`sinder evaluate` whole: sides, placebos, features that are used again, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from headless import DARK, LIGHT, audit, browser, look
from PIL import Image
from safetensors.torch import load_file, save_file

from sinder_cli import BadInputError, ModelRequest, SinderError, api
from sinder_cli.cli.main import main
from sinder_cli.evaluation import features as features_module
from sinder_cli.evaluation import registry
from sinder_cli.evaluation.contract import Scores, Scoring, Task, View, mean_figure
from sinder_cli.evaluation.features import Store
from sinder_cli.evaluation.settings import EvaluateSettings
from sinder_cli.evaluation.views import Observer
from sinder_cli.report.evaluation import page
from sinder_cli.requests import EvaluateRequest, Process

pytestmark = pytest.mark.slow
SIDES = ["original", "repaired", "inpainted", "smoothed", "blurred"]


@pytest.fixture(scope="module")
def other(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with one singular value changed."""
    tensors = load_file(weights)
    tensors["blocks.1.mlp.fc2.weight"] = tensors["blocks.1.mlp.fc2.weight"] * 0.9
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def request_(weights: Path, other: Path, pictures: Path) -> EvaluateRequest:
    settings = EvaluateSettings(image_size=112, workers=0, resamples=100, norm_factor=1.1, figures=2)
    models = (ModelRequest("dinov2_custom", path) for path in (weights, other))
    return EvaluateRequest(next(models), ["dense"], [pictures], settings, compare=next(models))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that were run."""
    sizes: list[int] = []
    real = Observer.observe

    def observe(self: Observer, images: torch.Tensor) -> Any:
        sizes.append(len(images))
        return real(self, images)

    monkeypatch.setattr(Observer, "observe", observe)
    return sizes


def test_all_sides_are_measured_and_written(request_: EvaluateRequest, tmp_path: Path) -> None:
    result = api.evaluate(request_, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [side["side"] for side in document["sides"]] == SIDES
    (task,) = document["tasks"]
    assert (task["task"], task["images"], task["skipped"]) == ("dense", 5, {})
    by_name = {figure["name"]: {value["side"]: value for value in figure["values"]} for figure in task["figures"]}
    assert by_name["good to original"]["original"]["value"] == pytest.approx(1, abs=1e-3)
    assert by_name["good to original"]["repaired"]["value"] < 1
    assert by_name["good to original"]["smoothed"]["value"] == pytest.approx(1, abs=1e-3)
    assert by_name["marked to original"]["smoothed"]["value"] < by_name["marked to original"]["repaired"]["value"]
    of_blocks = {"outlying tokens", "largest norm / median"}  # which the two placebos at the end do not change
    assert all(len(values) == (3 if name in of_blocks else 5) for name, values in by_name.items())
    rows = list(csv.DictReader((tmp_path / "out" / "evaluation.csv").read_text().splitlines()))
    assert len(rows) == sum(len(values) for values in by_name.values())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Images that changed most, both ways" in page
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2 * 3 + 1
    assert result.evaluation.model_dump(mode="json") == document


@pytest.mark.slow
def test_a_browser_shows_the_page_and_everybody_can_read_it(request_: EvaluateRequest, tmp_path: Path) -> None:
    pytest.importorskip("axe_core_python")
    program = browser()
    if program is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    settings = request_.settings.model_copy(update={"figure_formats": ("svg", "csv")})
    api.evaluate(replace(request_, settings=settings), tmp_path / "out")
    charts = {path.name for path in (tmp_path / "out" / "pictures").glob("differences-*")}
    assert charts == {f"differences-dense.{kind}" for kind in ("png", "svg", "csv")}
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    for width in (390, 1400):
        with tempfile.TemporaryDirectory(dir=tmp_path, ignore_cleanup_errors=True) as folder:
            seen = look(program, page, width, Path(folder))
        assert (seen.width, seen.overflow, seen.hidden, seen.loaded, seen.console) == (width, 0, [], [], [])
    for scheme in (LIGHT, DARK):
        assert audit(program, page, scheme, tmp_path)["violations"] == []


def test_features_are_kept_and_used_again(request_: EvaluateRequest, tmp_path: Path, passes: list[int]) -> None:
    request = replace(request_, features=tmp_path / "features")
    first = api.evaluate(request)
    assert len(passes) == 3 * 2 * 5  # three sides that run a backbone, two views, five images of five shapes
    again = api.evaluate(request)
    assert len(passes) == 30
    assert again.evaluation.tasks[0].figures == first.evaluation.tasks[0].figures
    api.evaluate(replace(request, settings=request.settings.model_copy(update={"image_size": 126})))
    assert len(passes) == 60


def only_these_views(monkeypatch: pytest.MonkeyPatch, views_by_task: dict[str, dict[str, View]]) -> None:
    """Replace all tasks by ones that report the mean of what their views keep."""

    def score(views: dict[str, View], scoring: Scoring) -> Scores:
        figures = []
        for name, view in views.items():
            features = scoring.features.test[name]
            for part in view.parts:
                means = torch.stack([features.part(part, index).double().mean() for index in range(len(features))])
                figures.append(mean_figure(f"{name} {part}", means, unit=""))
        return Scores(tuple(figures))

    dense = registry.task_named("dense")

    def task_named(name: str) -> Task:
        views = views_by_task[name]
        return replace(dense, name=name, views=lambda *_: views, score=partial(score, views))

    monkeypatch.setattr(registry, "task_named", task_named)


def test_tasks_that_see_images_in_the_same_way_share_one_pass(
    request_: EvaluateRequest, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one call, and when a later call needs another part; what an earlier one kept stays."""
    views = {
        "one": {"a": View(("stream", "mean"), 98)},
        "two": {"b": View(("patches", "stream"), 98), "c": View(("patches",), 98, flip=True)},
        "three": {"d": View(("norms", "mean"), 98)},
    }
    only_these_views(monkeypatch, views)
    both = replace(request_, tasks=["one", "two"], features=tmp_path / "features")
    together = api.evaluate(both).evaluation
    assert len(passes) == 3 * 2 * 5  # three sides, two views (the flipped one is another), five images
    assert len(list((tmp_path / "features").iterdir())) == 3 * 2
    later = api.evaluate(replace(both, tasks=["three"])).evaluation
    assert len(passes) == 30 + 3 * 5
    again = api.evaluate(replace(both, tasks=["one", "two", "three"])).evaluation
    assert len(passes) == 45
    assert [task.figures for task in again.tasks] == [task.figures for task in (*together.tasks, *later.tasks)]
    alone = [api.evaluate(replace(both, tasks=[name], features=None)).evaluation.tasks[0] for name in views]
    assert [task.figures for task in again.tasks] == [task.figures for task in alone]


def test_an_image_has_one_pass_whatever_list_it_is_in(
    request_: EvaluateRequest, pictures: Path, tmp_path: Path, passes: list[int]
) -> None:
    """Splits and sets that overlap share what is known of an image."""
    some = replace(request_, data=sorted(pictures.iterdir())[1:4], features=tmp_path / "features")
    few = api.evaluate(some)
    assert len(passes) == 3 * 2 * 3
    all_ = replace(request_, features=tmp_path / "features")
    api.evaluate(all_)
    assert len(passes) == 3 * 2 * 5
    assert api.evaluate(some).evaluation.tasks[0].figures == few.evaluation.tasks[0].figures
    alone = api.evaluate(replace(all_, features=None)).evaluation.tasks[0].figures
    assert api.evaluate(all_).evaluation.tasks[0].figures == alone


def test_a_part_that_only_another_task_keeps_is_refused(
    request_: EvaluateRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a task would work or fail by what else is run."""
    dense = registry.task_named("dense")
    view = View(("stream",), 98)
    only_these_views(monkeypatch, {"one": {"a": view}})
    request = replace(request_, tasks=["one"], features=tmp_path / "features")
    api.evaluate(request)

    def task_named(name: str) -> Task:
        def score(scoring: Scoring) -> Scores:
            scoring.features.test["a"].part("stream", 0)
            raise AssertionError

        return replace(dense, name=name, views=lambda *_: {"a": replace(view, parts=("norms",))}, score=score)

    monkeypatch.setattr(registry, "task_named", task_named)
    with pytest.raises(SinderError, match="the view keeps norms, outlying, and no stream") as error:
        api.evaluate(request)
    assert error.value.exit_code == 69


def test_an_interrupted_extraction_goes_on_where_it_was(
    request_: EvaluateRequest, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "MAPS_AT_A_TIME", 2)
    request = replace(request_, features=tmp_path / "features")
    whole = api.evaluate(request)
    parts = sorted((tmp_path / "features").rglob("*.safetensors"))
    assert len(parts) == 3 * 2 * 3
    parts[4].unlink()
    parts[9].write_bytes(b"cut short")
    del passes[:]
    again = api.evaluate(request)
    assert len(passes) <= 4
    assert again.evaluation.tasks[0].figures == whole.evaluation.tasks[0].figures


def test_features_are_stored_in_half_precision_unless_too_large(tmp_path: Path) -> None:
    narrow, wide = torch.full((2, 2, 3), 7.0), torch.full((2, 2, 3), 7e4)
    stored = [features_module._stored("stream", each) for each in (narrow, wide)]
    assert [each.dtype for each in stored] == [torch.float16, torch.float32]
    assert features_module._stored("norms", narrow).dtype == torch.float32
    assert features_module._stored("outlying", narrow > 1).dtype == torch.uint8
    about = {"view": 1, "fingerprint": "a"}
    keys = {Store.of(tmp_path, about | change).folder for change in ({}, {"view": 2}, {"fingerprint": "b"})}
    assert len(keys) == 3


def test_unreadable_images_are_skipped_and_named(request_: EvaluateRequest, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "pictures")
    (tmp_path / "pictures" / "2.png").write_bytes(b"no image")
    result = api.evaluate(replace(request_, data=[tmp_path / "pictures"]))
    (task,) = result.evaluation.tasks
    assert task.images == 4
    assert [Path(name).name for name in task.skipped] == ["2.png"]
    shutil.rmtree(tmp_path / "pictures")
    (tmp_path / "pictures").mkdir()
    for name in ("0.png", "1.png"):
        (tmp_path / "pictures" / name).write_bytes(b"no image")
    with pytest.raises(
        SinderError, match=r"no test image can be used for dense: all 2 failed, the first, .*0\.png"
    ) as error:
        api.evaluate(replace(request_, data=[tmp_path / "pictures"]))
    assert error.value.exit_code == 65


def test_a_run_is_compared_with_what_it_repaired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    repair = ["repair", "demo_vit", "--out", str(run), "--max-steps", "8", "--eval-images", "4", "--scan-images", "8"]
    evaluate = ["evaluate", str(run), "dense", "--limit", "6", "--out", str(out)]
    with pytest.raises(SystemExit):
        main([*repair, "--format", "json"])
    with pytest.raises(SystemExit) as end:
        main(
            ["evaluate", str(run), "dense", "--limit", "6", "--out", str(out), "--format", "json", "--resamples", "100"]
        )
    assert end.value.code == 0
    document = json.loads((out / "evaluation.json").read_text())
    assert [side["side"] for side in document["sides"]] == SIDES
    fingerprints = {side["side"]: side["fingerprint"] for side in document["sides"]}
    assert fingerprints["original"] != fingerprints["repaired"]
    assert document["tasks"][0]["images"] == 6
    with pytest.raises(SystemExit) as end:
        main(evaluate)
    assert end.value.code == 73
    assert "add --force to replace it" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_costs_no_other_pass(
    request_: EvaluateRequest, pictures: Path, tmp_path: Path, passes: list[int]
) -> None:
    """The chunk that it is in is used again, with the parts of other tasks; the image alone is tried again."""
    shutil.copytree(pictures, tmp_path / "pictures")
    (tmp_path / "pictures" / "2.png").write_bytes(b"no image")
    request = replace(request_, data=[tmp_path / "pictures"], features=tmp_path / "features")
    first = api.evaluate(request)
    done = len(passes)
    again = api.evaluate(request)
    assert len(passes) == done > 0
    assert again.evaluation.tasks[0].figures == first.evaluation.tasks[0].figures
    assert list(again.evaluation.tasks[0].skipped) == list(first.evaluation.tasks[0].skipped)


def test_an_image_that_a_later_part_cannot_be_read_of_is_skipped(
    request_: EvaluateRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when rights are taken away between two calls: what is there of it serves other tasks, and this one goes on."""
    views = {"one": {"a": View(("stream",), 98)}, "two": {"a": View(("patches",), 98)}}
    only_these_views(monkeypatch, views)
    request = replace(request_, features=tmp_path / "features")
    assert api.evaluate(replace(request, tasks=["one"])).evaluation.tasks[0].images == 5
    real = features_module.load_in_order

    def failing(*arguments: Any) -> Iterator[Any]:
        for image in real(*arguments):
            yield replace(image, pixels=None, problem="no rights") if image.index == 2 else image

    monkeypatch.setattr(features_module, "load_in_order", failing)
    (second,) = api.evaluate(replace(request, tasks=["two"])).evaluation.tasks
    assert (second.images, list(second.skipped.values())) == (4, ["no rights"])
    assert api.evaluate(replace(request, tasks=["one"])).evaluation.tasks[0].images == 5


def test_a_task_that_fails_costs_no_earlier_one(
    request_: EvaluateRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = registry.task_named("dense")

    def failing(_: Scoring) -> Scores:
        raise BadInputError("cannot use a.png", "label 99 is out of range")

    def task_named(name: str) -> Task:
        return dense if name == "dense" else replace(dense, name=name, score=failing)

    monkeypatch.setattr(registry, "task_named", task_named)
    with pytest.raises(BadInputError, match="label 99"):
        api.evaluate(replace(request_, tasks=["dense", "second"]), tmp_path / "out")
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [task["task"] for task in document["tasks"]] == ["dense"]
    assert document["finished"] is False
    assert (tmp_path / "out" / "evaluation.csv").read_text().count("\ndense,") > 10
    monkeypatch.undo()
    api.evaluate(request_, tmp_path / "out")  # an evaluation that did not end needs no --force
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["finished"] is True


def test_a_folder_in_which_the_first_write_failed_can_be_used(request_: EvaluateRequest, tmp_path: Path) -> None:
    (tmp_path / "out" / "pictures").mkdir(parents=True)
    (tmp_path / "out" / "features").mkdir()
    api.evaluate(request_, tmp_path / "out")
    assert (tmp_path / "out" / "evaluation.json").is_file()


def test_two_figures_of_one_name_are_refused(request_: EvaluateRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = registry.task_named("dense")

    def score(_: Scoring) -> Scores:
        return Scores((mean_figure("f", torch.zeros(5)), mean_figure("f", torch.ones(5))))

    monkeypatch.setattr(registry, "task_named", lambda _: replace(dense, score=score))
    with pytest.raises(SinderError, match="two figures are called 'f'") as error:
        api.evaluate(request_)
    assert error.value.exit_code == 69


def test_the_same_set_to_train_and_to_test_on_is_refused(request_: EvaluateRequest, pictures: Path) -> None:
    with pytest.raises(SinderError, match="it is --train and --data") as error:
        api.evaluate(replace(request_, train=[pictures]))
    assert error.value.exit_code == 2
    with pytest.raises(SinderError, match="cannot use --train with dense: it trains on nothing") as error:
        api.evaluate(replace(request_, train=[pictures / "0.png"]))
    assert error.value.exit_code == 2


def test_equal_weights_are_named(request_: EvaluateRequest) -> None:
    heard: list[Any] = []
    api.evaluate(replace(request_, compare=request_.model), process=Process(emit=heard.append))
    assert any("has the same weights as the original" in getattr(event, "text", "") for event in heard)


def test_a_task_that_reads_nothing_is_blamed(request_: EvaluateRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = registry.task_named("dense")
    monkeypatch.setattr(registry, "task_named", lambda _: replace(dense, read=lambda *_: None))
    with pytest.raises(SinderError, match="task 'dense' failed: TypeError: read returned NoneType"):
        api.evaluate(request_)


@pytest.mark.parametrize("given", [{"similar": 7}, {"unlike": -1}, {"similar": 0.5, "unlike": 0.4}])
def test_settings_of_dense_out_of_range_are_refused(request_: EvaluateRequest, given: dict[str, float]) -> None:
    with pytest.raises(SinderError) as error:
        api.evaluate(replace(request_, options={"dense": given}))
    assert error.value.exit_code == 2


def test_only_the_first_page_is_said_to_be_used(request_: EvaluateRequest, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "pictures")
    pages = [Image.open(pictures / f"{at}.png").convert("RGB") for at in (0, 1)]
    pages[0].save(tmp_path / "pictures" / "9.tif", save_all=True, append_images=pages[1:])
    heard: list[Any] = []
    api.evaluate(replace(request_, data=[tmp_path / "pictures"]), process=Process(emit=heard.append))
    texts = [getattr(event, "text", "") for event in heard]
    assert "only the first page or frame is used of 1 image (9.tif)" in texts


def test_a_single_image_is_refused(request_: EvaluateRequest, pictures: Path) -> None:
    with pytest.raises(SinderError, match=r"0\.png is the only image to test on") as error:
        api.evaluate(replace(request_, data=[pictures / "0.png"]))
    assert error.value.exit_code == 65


def test_an_image_that_could_not_be_read_is_tried_again(
    request_: EvaluateRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a decoder is installed, or rights are given: size and time of the file stay as they were."""
    real = features_module.load_in_order

    def failing(*arguments: Any) -> Iterator[Any]:
        for image in real(*arguments):
            yield replace(image, pixels=None, problem="no rights") if image.index == 2 else image

    request = replace(request_, features=tmp_path / "features")
    monkeypatch.setattr(features_module, "load_in_order", failing)
    assert api.evaluate(request).evaluation.tasks[0].images == 4
    monkeypatch.undo()
    assert api.evaluate(request).evaluation.tasks[0].images == 5


def test_other_heads_have_other_features(weights: Path, request_: EvaluateRequest, tmp_path: Path) -> None:
    def contrast(heads: int, features: Path) -> float | None:
        model = ModelRequest("dinov2_custom", weights, heads=heads)
        found = api.evaluate(replace(request_, model=model, compare=None, features=features))
        figure = next(each for each in found.evaluation.tasks[0].figures if each.name == "effective rank")
        value = figure.of("original")
        return value and value.value

    shared = [contrast(heads, tmp_path / "shared") for heads in (1, 4)]
    assert shared == [contrast(heads, tmp_path / str(heads)) for heads in (1, 4)]
    assert shared[0] != shared[1]


def test_other_files_are_never_removed(request_: EvaluateRequest, pictures: Path, tmp_path: Path) -> None:
    """A folder of the user's own that holds `pictures` is no evaluation."""
    shutil.copytree(pictures, tmp_path / "album" / "pictures")
    with pytest.raises(SinderError, match="it holds other files") as error:
        api.evaluate(replace(request_, force=True), tmp_path / "album")
    assert error.value.exit_code == 73
    assert len(list((tmp_path / "album" / "pictures").iterdir())) == 5
    api.evaluate(request_, tmp_path / "out")
    (tmp_path / "out" / "pictures" / "mine.png").write_bytes(b"mine")
    api.evaluate(replace(request_, force=True), tmp_path / "out")
    assert (tmp_path / "out" / "pictures" / "mine.png").read_bytes() == b"mine"


def test_a_picture_that_cannot_be_drawn_costs_no_result(
    request_: EvaluateRequest, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pictures, tmp_path / "pictures")
    real = page.begin_evaluation

    def gone(folder: Path) -> None:
        for path in (tmp_path / "pictures").iterdir():
            path.unlink()
        real(folder)

    monkeypatch.setattr(page, "begin_evaluation", gone)
    heard: list[Any] = []
    request = replace(request_, data=[tmp_path / "pictures"])
    api.evaluate(request, tmp_path / "out", process=Process(emit=heard.append))
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"][0]["images"] == 5
    assert (tmp_path / "out" / "report.html").is_file()
    assert any("no pictures of" in getattr(event, "text", "") for event in heard)


def test_two_tasks_share_standard_input(
    request_: EvaluateRequest, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = registry.task_named("dense")
    monkeypatch.setattr(registry, "task_named", lambda name: replace(dense, name=name))
    listed = "\n".join(str(path) for path in sorted(pictures.iterdir()))
    request = replace(request_, tasks=["dense", "again"], data=["-"], compare=None)
    result = api.evaluate(request, process=Process(stdin=StringIO(listed)))
    assert result is not None
    assert [task.images for task in result.evaluation.tasks] == [5, 5]


def test_one_model_alone_has_placebos_only(request_: EvaluateRequest) -> None:
    result = api.evaluate(replace(request_, compare=None))
    assert [side.side for side in result.evaluation.sides] == ["original", "inpainted", "smoothed", "blurred"]
    settings = request_.settings.model_copy(update={"no_placebos": True})
    alone = api.evaluate(replace(request_, compare=None, settings=settings))
    assert [side.side for side in alone.evaluation.sides] == ["original"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["dense", "--data", "x" * 300], 66, "there is no such file or folder"),
        (
            ["dense", "--data", "knn=photos"],
            2,
            "cannot use --data knn=photos: task 'knn' is not run; name the task, too",
        ),
        (["dense", "--data", "dense="], 2, "it names no place; give dense=PATH"),
        (["dense", "--image-size", "16"], 2, "image size 16 is too small: it makes under"),
        (["dense", "--data", "nowhere"], 66, "cannot read nowhere: there is no such file or folder"),
        (["dens"], 2, "unknown task 'dens': no installed plugin offers it; did you mean dense?"),
        (["dense", "--set", "dense.similar=much"], 2, "bad setting dense.similar: "),
        (["dense", "--set", "dense.other=1"], 2, "bad setting dense.other: "),
        (["dense", "--set", "knn.k=1"], 2, "bad option --set knn.k=1: task 'knn' is not run; name dense"),
        (["dense", "--set", "similar"], 2, "it is not TASK.NAME=VALUE"),
        (["dense", "--sweep"], 2, "cannot use --sweep: it has no effect on dense; leave it out"),
        (["dense", "--compare-weights", "x"], 2, "no second model"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "demo_vit", *arguments])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == code, lines
    assert words in lines[-1]


def test_models_of_other_shapes_do_not_compare(request_: EvaluateRequest) -> None:
    with pytest.raises(SinderError, match="cannot compare dinov2_custom and demo_vit: width is 64 and 192") as error:
        api.evaluate(replace(request_, compare="demo_vit"))
    assert error.value.exit_code == 78


def test_progress_and_warnings_go_to_the_listener(request_: EvaluateRequest) -> None:
    heard: list[Any] = []
    api.evaluate(request_, process=Process(emit=heard.append))
    assert any("features" in getattr(event, "phase", "") for event in heard)
    assert any("dense: repaired" in getattr(event, "phase", "") for event in heard)
