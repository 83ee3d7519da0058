"""The public Python API: what docs/python.md shows runs as it stands, inside a running event loop too."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sinder_plugins.demo.drawing import draw_images

import sinder_cli
from sinder_cli import ModelRequest, NoInputError, PredictRequest, predict_defects
from sinder_cli.requests import Process

DOCUMENT = Path(__file__).parents[1] / "docs" / "python.md"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the blocks of the document were run, one after another, inside an event loop."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "photos").mkdir()
    for at, image in enumerate(draw_images(8, 5)):
        image.save(folder / "photos" / f"{at}.png")

    async def run() -> None:
        names: dict[str, object] = {"__name__": "example"}
        for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL):
            exec(compile(block, str(DOCUMENT), "exec"), names)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        asyncio.run(run())
    return folder


def test_each_function_writes_what_its_command_writes(examples: Path) -> None:
    assert {"report.html", "report.json", "directions.safetensors", "figures"} == {
        path.name for path in (examples / "analysis").iterdir()
    }
    written = {path.name for path in (examples / "run").iterdir()}
    assert {
        "report.html",
        "README.md",
        "pictures",
        "model.safetensors",
        "summary.json",
        "adapter.safetensors",
    } <= written
    summary = json.loads((examples / "run" / "summary.json").read_text())
    assert summary["verdict"] in ("repaired", "improved", "not improved")
    repaired = load_file(examples / "run" / "model.safetensors")
    exported = torch.load(examples / "repaired.pth", weights_only=True)
    assert all(torch.equal(tensor, exported[name]) for name, tensor in repaired.items())


def test_directions_are_written_and_returned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = predict_defects(PredictRequest("demo_vit", stages=("block",)), tmp_path / "directions.safetensors")
    stored = load_file(tmp_path / "directions.safetensors")
    assert stored.keys() == {"block"}
    assert torch.equal(stored["block"], found.directions("block"))
    assert capsys.readouterr() == ("", "")
    with pytest.raises(NoInputError):
        predict_defects(PredictRequest(ModelRequest("dinov2_custom", weights=tmp_path / "nowhere.pth")))


def test_what_the_document_names_is_public() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:[a-z_]+)|(?:[A-Z]\w+(?:Request|Settings)))`", text)) & set(sinder_cli.__all__)
    assert {"predict_defects", "analyze", "repair", "export", "RepairRequest", "RepairSettings"} <= names
    for name in sinder_cli.__all__:
        assert getattr(sinder_cli, name) is not None
    with pytest.raises(AttributeError):
        _ = sinder_cli.nothing_of_this_name


def test_events_go_to_the_process_or_the_model(tmp_path: Path) -> None:
    of_model: list[object] = []
    of_process: list[object] = []
    request = PredictRequest(ModelRequest("demo_vit", emit=of_model.append), ("mlp",))
    predict_defects(request)
    assert of_model
    of_model.clear()
    predict_defects(request, tmp_path / "directions.safetensors", process=Process(of_process.append))
    assert of_process
    assert not of_model
