"""The one line of Python that an export ends with: it loads what was written, and the card has the same call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest

from sinder_cli import ModelRequest, api
from sinder_cli.exporting.drafts import ExportResult
from sinder_cli.exporting.targets import TargetName, target_of
from sinder_cli.report.documents import export_document
from sinder_cli.report.tables import export_table
from sinder_cli.report.terminal import print_escaped

Export = Callable[..., ExportResult]
LIBRARIES = {"transformers": "transformers", "hf-repo": "transformers", "timm": "timm", "onnx": "onnxruntime"}
NAMES = {"native": "a.pth", "dinov2": "a.safetensors", "onnx": "a.onnx", "adapter": "a.safetensors"} | {
    "diff": "a.safetensors"
}


@pytest.mark.parametrize("target", get_args(TargetName))
def test_the_line_loads_what_was_written(
    target: TargetName, export: Export, run: Path, plain: Path, tmp_path: Path
) -> None:
    if target in LIBRARIES and find_spec(LIBRARIES[target]) is None:
        pytest.skip(f"{LIBRARIES[target]} is not installed")
    if target == "onnx" and find_spec("onnxscript") is None:
        pytest.skip("onnxscript is not installed")
    out = tmp_path / "it's a place" / NAMES.get(target, "folder")
    out.parent.mkdir()
    options = {"license": "mit"} if target == "hf-repo" else {}
    of_changes = target_of(target).of_changes
    source = (run, None) if of_changes else ("dinov2_custom", plain)
    result = export(source[0], target, out, source[1], verify=False, **options)
    assert "\n" not in result.load
    if target == "timm" and not _imports("timm"):
        pytest.skip("timm cannot be imported")
    found: dict[str, Any] = {}
    exec(result.load, found)
    assert {"model", "state", "session"} & set(found)
    assert export_document(result)["load"] == result.load


def _imports(name: str) -> bool:
    from sinder_cli import define_torchvision_operators

    define_torchvision_operators()
    try:
        __import__(name)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("target", ["torchhub", "transformers", "timm"])
def test_card_and_line_have_one_call(target: TargetName, export: Export, plain: Path, tmp_path: Path) -> None:
    if target in LIBRARIES and find_spec(LIBRARIES[target]) is None:
        pytest.skip(f"{LIBRARIES[target]} is not installed")
    result = export("dinov2_custom", target, tmp_path / "folder", plain, verify=False)
    imports, call = result.load.rsplit("; ", 1)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert imports in card
    assert call.replace(str(tmp_path / "folder"), "folder") in card


def test_the_table_ends_with_the_whole_line(
    export: Export, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The terminal wraps it: a line that is broken or cut cannot be pasted."""
    result = export("dinov2_custom", "native", tmp_path / "a.pth", plain, verify=False)
    result = replace(result, load=f"{result.load}  # [bold]{'x' * 100}")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_escaped(export_table(result))
    assert capsys.readouterr().out.splitlines()[-1].strip() == f"in Python: {result.load}"


def test_the_module_of_a_file_of_changes_is_the_repaired_one(export: Export, run: Path, tmp_path: Path) -> None:
    result = export(run, "adapter", tmp_path / "a.safetensors", verify=False)
    found: dict[str, Any] = {}
    exec(result.load, found)
    assert found["model"].weights.fingerprint() == api.open_model(ModelRequest(str(run))).weights.fingerprint()
