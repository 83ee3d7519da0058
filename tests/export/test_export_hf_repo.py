"""`--to hf-repo`: a folder for upload, with a licence and without any path of the machine that wrote it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sinder_plugins.dinov2 as dinov2
import torch
import yaml
from export_models import random_tensors
from sinder_plugins.dinov2.config import Config

from sinder_cli import ModelRequest
from sinder_cli.errors import BadInputError, UsageError
from sinder_cli.events import Event, Noted
from sinder_cli.exporting import hf_repo, licences, origins
from sinder_cli.exporting.drafts import ExportResult
from sinder_cli.exporting.hf_repo import without_origins
from sinder_cli.files import sha256_of
from sinder_cli.repairing.settings import WITHOUT_EFFECT

pytest.importorskip("transformers", reason="the extra hf is not installed")
Export = Callable[..., ExportResult]
CUSTOM = "dinov2_custom"


def card_header(folder: Path) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    return found


def test_it_is_the_folder_of_transformers_with_licence_and_base(export: Export, plain: Path, tmp_path: Path) -> None:
    base = "facebook/dinov2-small"
    result = export(CUSTOM, "hf-repo", tmp_path / "repo", plain, license="apache-2.0", base_model=base)
    names = {file.name for file in result.files}
    assert {"config.json", "preprocessor_config.json", "model.safetensors", "README.md", ".gitattributes"} <= names
    assert result.check.verified
    header = card_header(tmp_path / "repo")
    assert (header["license"], header["base_model"]) == ("apache-2.0", base)
    assert header["library_name"] == "transformers"
    assert "filter=lfs" in (tmp_path / "repo" / ".gitattributes").read_text()


def test_an_unknown_licence_is_asked_for_and_nothing_is_written(export: Export, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the licence of the base model is not known.*name it with --license"):
        export(CUSTOM, "hf-repo", tmp_path / "repo", plain)
    assert list(tmp_path.iterdir()) == []


def test_no_text_in_it_names_a_folder_of_this_machine(export: Export, run: Path, tmp_path: Path) -> None:
    export(run, "hf-repo", tmp_path / "repo", license="other", verify=False)
    texts = [path for path in (tmp_path / "repo").rglob("*") if path.suffix in {".md", ".json", ""} and path.is_file()]
    assert len(texts) >= 4
    for path in texts:
        text = path.read_text()
        for place in (run.parent, Path.home(), Path.cwd(), tmp_path):
            assert str(place) not in text, path


def test_no_picture_of_the_users_photographs_is_in_it(export: Export, run: Path, tmp_path: Path) -> None:
    export(run, "hf-repo", tmp_path / "repo", license="other", verify=False)
    export(run, "transformers", tmp_path / "folder", verify=False)
    assert list((tmp_path / "folder").rglob("*.png"))
    assert not [path for path in (tmp_path / "repo").rglob("*") if path.suffix in {".png", ".jpg", ".svg", ".pdf"}]
    assert "![" not in (tmp_path / "repo" / "README.md").read_text()


def test_a_path_that_would_leak_ends_the_export(
    export: Export, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for leak in (plain.parent, plain.name):
        monkeypatch.setattr(hf_repo, "LARGE", f"# made from {leak}\n")
        with pytest.raises(BadInputError, match=r"\.gitattributes would publish the local name "):
            export(CUSTOM, "hf-repo", tmp_path / "repo", plain, license="mit", verify=False)
        assert not (tmp_path / "repo").exists()


def test_a_configuration_forgets_where_it_was_read_from() -> None:
    given = {"_name_or_path": "/home/me/vit", "vision_config": {"name_or_path": "x", "width": 3}, "list": [{"a": 1}]}
    assert without_origins(given) == {"vision_config": {"width": 3}, "list": [{"a": 1}]}


@pytest.mark.parametrize("base", ["dinov2", "/home/me/vit", "a/b/c", "../x"])
def test_a_base_model_that_is_no_repository_is_refused(export: Export, plain: Path, tmp_path: Path, base: str) -> None:
    with pytest.raises(UsageError, match="it is no repository; name it OWNER/NAME"):
        export(CUSTOM, "hf-repo", tmp_path / "repo", plain, license="mit", base_model=base)


def test_card_options_are_refused_where_there_is_no_card(export: Export, plain: Path, tmp_path: Path) -> None:
    for option in ({"license": "mit"}, {"base_model": "a/b"}):
        with pytest.raises(UsageError, match="it has no effect there"):
            export(CUSTOM, "native", tmp_path / "out.pth", plain, **option)


def test_a_licence_that_is_named_takes_precedence(export: Export, plain: Path, tmp_path: Path) -> None:
    export(CUSTOM, "transformers", tmp_path / "folder", plain, license="cc-by-4.0", verify=False)
    assert card_header(tmp_path / "folder")["license"] == "cc-by-4.0"
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["model_type"] == "dinov2"


# Whose weights: the licence and the base model


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a small `dinov2_vits14` where torch.hub keeps the official one."""
    small = Config(width=64, depth=2, hidden=256, grid=5)
    monkeypatch.setitem(dinov2.OFFICIAL, "dinov2_vits14", small)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    place = tmp_path / "torch" / "hub" / "checkpoints" / "dinov2_vits14_pretrain.pth"
    place.parent.mkdir(parents=True)
    torch.save(random_tensors(small), place)
    return place


def notes(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Noted)]


@pytest.mark.usefixtures("official")
def test_official_weights_bring_licence_and_base_model(export: Export, tmp_path: Path, events: list[Event]) -> None:
    export("dinov2_vits14", "hf-repo", tmp_path / "repo", verify=False)
    header = card_header(tmp_path / "repo")
    assert (header["license"], header["base_model"]) == ("apache-2.0", "facebook/dinov2-small")
    assert "| Read from | `the original weights of dinov2_vits14` |" in (tmp_path / "repo" / "README.md").read_text()
    assert any(note.startswith("licence apache-2.0: that of the official weights") for note in notes(events))


def test_weights_that_are_not_official_bring_neither(export: Export, official: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "my_finetune.pth"
    shutil.copy(official, tuned)
    with pytest.raises(UsageError, match=r"not known to be the official weights; name it with --license") as refusal:
        export("dinov2_vits14", "hf-repo", tmp_path / "repo", tuned, verify=False)
    assert refusal.value.exit_code == 2
    export("dinov2_vits14", "hf-repo", tmp_path / "repo", tuned, verify=False, license="mit")
    assert "base_model" not in card_header(tmp_path / "repo")
    export("dinov2_vits14", "torchhub", tmp_path / "hub", tuned, verify=False)
    assert "license" not in card_header(tmp_path / "hub")


def test_an_official_file_is_known_wherever_it_lies(
    export: Export, official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = tmp_path / "fetched.pth"
    shutil.copy(official, fetched)
    monkeypatch.setitem(origins.OFFICIAL_FILES, sha256_of(fetched), "dinov2_vits14")
    export("dinov2_vits14", "hf-repo", tmp_path / "repo", fetched, verify=False)
    assert card_header(tmp_path / "repo")["base_model"] == "facebook/dinov2-small"
    monkeypatch.setitem(origins.OFFICIAL_FILES, sha256_of(fetched), "dinov2_vitb14")  # another model's
    with pytest.raises(UsageError, match="not known to be the official weights"):
        export("dinov2_vits14", "hf-repo", tmp_path / "other", fetched, verify=False)


def test_every_official_model_has_its_file_and_its_repository() -> None:
    assert set(origins.OFFICIAL_FILES.values()) == set(origins.REPOSITORIES) == set(dinov2.OFFICIAL)
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in origins.OFFICIAL_FILES)
    assert origins.REPOSITORIES["dinov2_vitg14_reg"] == "facebook/dinov2-with-registers-giant"


def test_a_run_has_the_weights_that_it_was_called_with(run: Path, tmp_path: Path) -> None:
    def own(called: dict[str, object] | None) -> bool:
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run, folder)
        config = json.loads((run / "config.json").read_text())
        config["call"] = called
        (folder / "config.json").write_text(json.dumps(config))
        return origins.are_the_plugins_own(ModelRequest(str(folder)), "dinov2_vits14")

    assert own({"model": "dinov2_vits14", "weights": None})
    assert not own({"model": "dinov2_vits14", "weights": "/gone/tuned.pth"})
    assert not own(None)
    assert own({"model": str(run), "weights": None})  # a run of a run
    assert not own({"model": str(tmp_path / "gone"), "weights": None})


# What the card names


def test_the_repository_that_is_named_is_in_the_card(
    export: Export, plain: Path, tmp_path: Path, events: list[Event]
) -> None:
    export(CUSTOM, "hf-repo", tmp_path / "h", plain, license="mit", repo_id="me/vit", verify=False)
    card = (tmp_path / "h" / "README.md").read_text()
    assert "AutoModel.from_pretrained('me/vit')" in card
    assert "OWNER/NAME" not in card
    assert not [note for note in notes(events) if "OWNER/NAME" in note]
    export(CUSTOM, "hf-repo", tmp_path / "i", plain, license="mit", verify=False)
    card = (tmp_path / "i" / "README.md").read_text()
    assert "AutoModel.from_pretrained('OWNER/NAME')" in card
    assert "`OWNER/NAME` stands for the repository that this folder is uploaded to." in card
    assert "the card names the repository OWNER/NAME: name yours with --repo-id, or edit README.md" in notes(events)


@pytest.mark.parametrize(
    "name", ["vit", "a/b/c", "-a/b", "a/b-", "a/b--c", "a/b..c", "a/vit.git", "ä/b", f"a/{'b' * 95}"]
)
def test_a_repository_that_the_hub_refuses_is_refused(export: Export, plain: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"bad repository .*: it is no repository; name it OWNER/NAME"):
        export(CUSTOM, "hf-repo", tmp_path / "repo", plain, license="mit", repo_id=name)


def test_only_a_folder_for_upload_takes_a_repository(export: Export, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot use --repo-id with --to transformers"):
        export(CUSTOM, "transformers", tmp_path / "folder", plain, repo_id="me/vit")


def test_no_local_name_is_in_it(export: Export, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = Path("kunde-mueller.safetensors")
    shutil.copy(plain, weights)
    export(CUSTOM, "transformers", Path("kunde/x"), weights, verify=False)
    shutil.copytree("kunde/x", "kunde-y")
    folders = []
    for number, (source, given) in enumerate(
        ((CUSTOM, weights), ("hf/kunde/x", None), ("hf/kunde-y", None), ("hf/./kunde-y", None))
    ):
        folders.append(Path(f"kunde-out-{number}"))
        export(source, "hf-repo", folders[-1], given, license="mit", verify=False)
    for folder in folders:
        texts = [path for path in folder.rglob("*") if path.suffix in {".md", ".json", ""} and path.is_file()]
        assert len(texts) == 5
        assert not [path for path in texts if "kunde" in path.read_text()]
        assert "weights of the exporter's own" in (folder / "README.md").read_text()
        assert "base_model" not in card_header(folder)
    assert "# `Vision Transformer, 3 blocks of width 128`" in (folders[1] / "README.md").read_text()
    export("hf/kunde/x", "hf-repo", Path("named"), license="mit", base_model="facebook/dinov2-small", verify=False)
    assert "# `facebook/dinov2-small`" in Path("named/README.md").read_text()


def test_settings_without_effect_on_the_weights_are_not_told(export: Export, run: Path, tmp_path: Path) -> None:
    export(run, "hf-repo", tmp_path / "repo", license="mit", verify=False)
    rows = set(re.findall(r"^\| `(\w+)` \|", (tmp_path / "repo" / "README.md").read_text(), re.MULTILINE))
    assert {"recipe", "max_steps"} <= rows
    assert not rows & WITHOUT_EFFECT
    assert {"log", "figure_formats", "device"} <= WITHOUT_EFFECT


# Licences


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("Apache-2.0", "did you mean apache-2.0, or other?"),
        ("apache 2", "did you mean apache-2.0, or other?"),
        ("MIT", "did you mean mit, or other?"),
        ("cc_by_4.0", "did you mean cc-by-4.0, or other?"),
        ("", "give for example apache-2.0, or other for an unlisted one"),
        ("in house", "give for example apache-2.0, or other for an unlisted one"),
    ],
)
def test_a_licence_that_the_hub_does_not_know_is_refused(
    export: Export, plain: Path, tmp_path: Path, given: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=rf"bad licence '{given}': the Hub has no such identifier; {re.escape(hint)}"):
        export(CUSTOM, "hf-repo", tmp_path / "repo", plain, license=given)


def test_another_licence_has_a_name_and_a_file(
    export: Export, plain: Path, tmp_path: Path, events: list[Event]
) -> None:
    export(CUSTOM, "hf-repo", tmp_path / "repo", plain, license="other", verify=False)
    header = card_header(tmp_path / "repo")
    found = (header["license"], header["license_name"], header["license_link"])
    assert found == ("other", "license-of-the-base-model", "LICENSE")
    assert "licence other: before upload, put its text into LICENSE, its name into README.md" in notes(events)
    assert licences.metadata("dinov3-license")[:2] == ['license: "other"', 'license_name: "dinov3-license"']
