"""What a run was called with, and what is given when it is gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sinder_cli import ModelRequest
from sinder_cli.errors import BadInputError, ConflictError
from sinder_cli.repairing.folder import RunFolder
from sinder_cli.repairing.run_identity import as_called, call_of, other_options
from sinder_cli.repairing.settings import RepairSettings

STORED = RepairSettings(lr=0.01, workers=3, image_size=518, seed=4)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that was called from another folder, with everything that there is."""
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    request = ModelRequest("demo_vit", Path("w.pth"), adapter=Path("../a.safetensors"))
    config: dict[str, Any] = {
        "model": "demo_vit",
        "call": call_of(request, ["photos", "-"], is_run=False),
        "heads": 4,
        "revision": "v1",
        "attention": "eager",
        "weights": {},
        "images": {},
        "settings": STORED.model_dump(),
        "versions": {},
    }
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.begin(config)
    monkeypatch.chdir(tmp_path)
    return folder


def test_places_are_told_whole(run: RunFolder, tmp_path: Path) -> None:
    call = run.read_config()["call"]
    assert call["data"] == [str(tmp_path / "there" / "photos"), "-"]
    assert call["weights"] == str(tmp_path / "there" / "w.pth")
    assert Path(call["adapter"]).resolve() == tmp_path / "a.safetensors"
    assert call_of(ModelRequest("run"), [], is_run=True)["model"] == str(
        run.path
    )  # itself repaired, and repaired again


def test_a_run_goes_on_as_it_was_called(run: RunFolder, tmp_path: Path) -> None:
    request, settings = as_called(run, ModelRequest("run"), RepairSettings())
    assert (request.model, request.weights) == ("demo_vit", tmp_path / "there" / "w.pth")
    assert (request.heads, request.attention, request.revision) == (4, "eager", "v1")
    assert settings == STORED


def test_options_given_now_go_over_the_stored_ones(run: RunFolder) -> None:
    given = ModelRequest("run", Path("other.pth"), heads=2, attention="sdpa")
    request, settings = as_called(run, given, RepairSettings(lr=0.005, strict=True))
    assert (request.weights, request.heads, request.attention) == (Path("other.pth"), 2, "sdpa")
    assert settings == STORED.model_copy(update={"lr": 0.005, "strict": True})  # the default counts where it is given


def test_changed_options_that_change_no_result_are_reported(run: RunFolder) -> None:
    assert other_options(run, STORED) == []
    now = STORED.model_copy(update={"workers": 0, "strict": True, "log": ("wandb", "tensorboard"), "device": "cuda:1"})
    told = "--device cuda:1 --log wandb --log tensorboard --strict --workers 0"
    assert other_options(run, now) == told.split()
    assert other_options(run, STORED.model_copy(update={"workers": None})) == []


@pytest.mark.parametrize("damage", ["call", "heads", "settings"])
def test_a_run_of_another_version_is_told_to_be_one(damage: str, run: RunFolder) -> None:
    config = run.read_config()
    config |= {damage: {"lr": "fast"}}
    del config["call" if damage != "settings" else "heads"]
    run.begin(config)
    with pytest.raises(ConflictError, match="of another version") as caught:
        as_called(run, ModelRequest("run"), RepairSettings())
    assert caught.value.exit_code == 78


def test_a_torn_config_is_bad_input(run: RunFolder) -> None:
    run.config.write_text("{")
    with pytest.raises(BadInputError):
        as_called(run, ModelRequest("run"), RepairSettings())
