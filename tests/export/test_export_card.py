"""The card of an exported folder: what a hub reads, and what a reader wants to know."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sinder_cli import ModelRequest, api
from sinder_cli.events import silent
from sinder_cli.exporting.drafts import ExportResult
from sinder_cli.exporting.targets import ExportCheck, ExportSettings, Plan
from sinder_cli.exporting.torchhub import TARGET
from sinder_cli.repairing.weight_changes import write_diff
from sinder_cli.report.cards import render_export_card
from sinder_cli.report.formatting import CITATION
from sinder_cli.report.repair.pictures import WORDS, read_pictures

Export = Callable[..., ExportResult]
CUSTOM = "dinov2_custom"


def header(card: str) -> dict[str, object]:
    """The YAML between the first two lines of dashes."""
    import yaml

    found: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return found


@pytest.fixture(scope="session")
def reported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with two pictures of our own."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "pictures")
    (folder / "pictures").mkdir()
    for name in ("image.jpg", "norm.png"):
        Image.new("RGB", (28, 28)).save(folder / "pictures" / name)
    words = {"image.jpg": "a.png, as the model saw it", "norm.png": "norms of [a]"}
    (folder / "pictures" / WORDS).write_text(json.dumps(words))
    return folder


def test_the_card_of_a_repaired_model_tells_the_repair(export: Export, reported: Path, tmp_path: Path) -> None:
    result = export(reported, "torchhub", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert header(card)["verified"] is True
    assert {"sinder", "singular-defects"} <= set(header(card)["tags"])  # type: ignore[call-overload]
    config = json.loads((reported / "config.json").read_text())
    for words in (
        "# `demo_vit`, repaired",
        f"Verified: {result.check.line}.",
        "| | before | after |",
        "| Outlying tokens at any block |",
        "64 images, all drawn by the program; labels are not used.",
        f"The list has the fingerprint `{config['images']['fingerprint']}`",
        f"| Fingerprint of the base weights | `{config['weights']['fingerprint']}` |",
        "| `lr` | `0.05` |",
        "torch.hub.load('hub', 'demo_vit', source=\"local\")",
        CITATION,
    ):
        assert words in card
    shown = re.findall(r"!\[(.*)\]\((.*)\)", card)
    assert shown == [("a.png, as the model saw it", "pictures/image.jpg"), ("norms of (a)", "pictures/norm.png")]
    for _, name in shown:
        with Image.open(tmp_path / "hub" / name) as picture:
            assert picture.size[0] == picture.size[1]
    assert not re.search(r"\{\{|\}\}|\{%|%\}|None|Undefined|\n\n\n", card)


def test_an_unrepaired_model_says_so_and_has_no_table(export: Export, plain: Path, tmp_path: Path) -> None:
    export(CUSTOM, "torchhub", tmp_path / "hub", plain, verify=False)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert header(card)["verified"] is False
    assert "**Not verified**: not checked: --no-verify." in card
    assert "It was not repaired." in card
    assert "before | after" not in card
    assert "singular-defects" not in card


def test_a_licence_is_carried_over(tmp_path: Path) -> None:
    backbone = api.open_model(ModelRequest("demo_vit"))
    from dataclasses import replace

    for licence in ("apache-2.0", None):
        plan = Plan(replace(backbone, license=licence), ExportSettings("torchhub"), silent)
        card = render_export_card(plan, TARGET, ExportCheck("looked at", True, 2.5e-7, 1e-5), tmp_path.name)
        assert header(card).get("license") == licence
        assert "largest relative difference 2.5e-07, tolerance 1e-05" in card


def test_a_run_without_whole_pictures_has_none(reported: Path, tmp_path: Path) -> None:
    assert [picture.name for picture in read_pictures(reported / "pictures")] == ["image.jpg", "norm.png"]
    assert read_pictures(tmp_path / "nowhere") == []
    for damage in ("[]", "{", '{"gone.png": ""}'):
        (tmp_path / WORDS).write_text(damage)
        assert read_pictures(tmp_path) == []


def test_every_table_row_has_the_columns_of_its_head(export: Export, run: Path, tmp_path: Path) -> None:
    export(run, "torchhub", tmp_path / "hub", verify=False)
    card = (tmp_path / "hub" / "README.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_a_run_changed_further_does_not_show_its_own_table(export: Export, run: Path, tmp_path: Path) -> None:
    weights = api.open_model(ModelRequest(str(run))).weights
    delta = tmp_path / "delta.safetensors"
    write_diff(delta, "demo_vit", weights.fingerprint(), weights, ["norm.weight"])
    for change, shown in ((None, True), (delta, False)):
        export(run, "torchhub", tmp_path / "hub", adapter=change, verify=False, force=True)
        card = (tmp_path / "hub" / "README.md").read_text()
        assert "# `demo_vit`, repaired" in card
        assert ("| before | after |" in card) is shown


def test_a_card_tells_no_folder_of_this_machine(export: Export, plain: Path, tmp_path: Path) -> None:
    export(CUSTOM, "torchhub", tmp_path / "hub", plain, verify=False)
    for path in (tmp_path / "hub").rglob("*"):
        if path.suffix in {".md", ".json", ".py"}:
            assert str(plain.parent) not in path.read_text()
    assert f"| Read from | `{plain.name}` |" in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "base"),
    [("hf/facebook/dinov2-small", "facebook/dinov2-small"), ("hf/./vit", None), ("hf//home/me/vit", None)],
)
def test_only_a_model_of_a_hub_is_a_base_model(name: str, base: str | None, tmp_path: Path) -> None:
    from dataclasses import replace

    backbone = replace(api.open_model(ModelRequest("demo_vit")), name=name)
    card = render_export_card(
        Plan(backbone, ExportSettings("transformers"), silent), TARGET, ExportCheck("x", True), tmp_path.name
    )
    assert header(card).get("base_model") == base
    assert "/home/me" not in card
