"""`--to hf-repo`: a folder for upload, with a licence and without any path of the machine that wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sinder_cli.errors import BadInputError, UsageError
from sinder_cli.exporting import hf_repo
from sinder_cli.exporting.drafts import ExportResult
from sinder_cli.exporting.hf_repo import without_origins

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
    monkeypatch.setattr(hf_repo, "LARGE", f"# made in {plain.parent}\n")
    with pytest.raises(BadInputError, match=r"\.gitattributes would publish the path "):
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
