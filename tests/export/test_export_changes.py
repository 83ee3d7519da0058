"""`--to adapter` and `--to diff`: what a repair changed, alone, and applied to the base again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sinder_cli import ModelRequest, api
from sinder_cli.cli.export import complete_target, target_name
from sinder_cli.errors import BadInputError, ConflictError, UsageError
from sinder_cli.exporting.drafts import ExportResult
from sinder_cli.exporting.targets import ExportSettings, target_of
from sinder_cli.repairing.weight_changes import DIFF_FORMAT, Diff, read_change

Export = Callable[..., ExportResult]
DEMO = "demo_vit"


def bits_of(model: str | Path, **request: Path) -> dict[str, torch.Tensor]:
    weights = api.open_model(ModelRequest(str(model), **request)).weights  # type: ignore[arg-type]
    return weights.read(weights.names)


@pytest.fixture
def diff(export: Export, run: Path, tmp_path: Path) -> Path:
    out = tmp_path / "diff.safetensors"
    assert export(run, "diff", out).check.verified
    return out


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The weights that were repaired, as a file."""
    path = tmp_path / "base.safetensors"
    save_file(bits_of(DEMO), path)
    return path


def test_a_delta_holds_the_changed_tensors_alone(diff: Path, run: Path) -> None:
    before, after = bits_of(DEMO), bits_of(run)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    found = load_file(diff)
    assert found.keys() == changed
    assert 0 < len(changed) < len(before)
    assert all(torch.equal(found[name], after[name]) for name in found)


def test_its_header_names_the_weights_before_and_after(diff: Path, run: Path) -> None:
    with safe_open(diff, framework="pt") as file:
        header = file.metadata()
    assert header == {
        "format": DIFF_FORMAT,
        "model": DEMO,
        "base_fingerprint": json.loads((run / "config.json").read_text())["weights"]["fingerprint"],
        "fingerprint": api.open_model(ModelRequest(str(run))).weights.fingerprint(),
    }


def test_an_adapter_makes_the_repaired_weights_bit_for_bit(diff: Path, run: Path, base: Path) -> None:
    repaired = bits_of(run)
    for request in ({}, {"weights": base}):
        found = bits_of(DEMO, adapter=diff, **request)
        assert found.keys() == repaired.keys()
        assert all(torch.equal(found[name], repaired[name]) for name in repaired)


def test_a_delta_of_a_delta_or_adapter_is_the_same(export: Export, run: Path, diff: Path, tmp_path: Path) -> None:
    for number, change in enumerate((diff, run / "adapter.safetensors")):
        out = tmp_path / f"again-{number}.safetensors"
        assert export(DEMO, "diff", out, adapter=change).check.verified
        assert out.read_bytes() == diff.read_bytes()


def test_other_weights_are_refused(diff: Path, base: Path) -> None:
    tensors = load_file(base)
    tensors["cls"] += 1
    save_file(tensors, base)
    with pytest.raises(ConflictError, match=f"diff {diff} does not fit {base}: it was made for weights of demo_vit"):
        bits_of(DEMO, weights=base, adapter=diff)


def test_a_delta_that_has_changed_is_refused(diff: Path) -> None:
    content = bytearray(diff.read_bytes())
    content[-3] ^= 1
    diff.write_bytes(content)
    with pytest.raises(BadInputError, match="its tensors are not those that were written"):
        bits_of(DEMO, adapter=diff)


@pytest.mark.parametrize(
    ("tensors", "kept", "why"),
    [
        ({"strange": torch.zeros(2)}, ("base_fingerprint", "fingerprint"), "strange is no tensor of this model"),
        ({"cls": torch.zeros(2)}, ("base_fingerprint", "fingerprint"), "or of another shape"),
        ({}, ("base_fingerprint",), "its header has no 'fingerprint'"),
        ({}, ("fingerprint",), "its header has no 'base_fingerprint'"),
    ],
)
def test_a_forged_delta_is_refused(
    diff: Path, tensors: dict[str, torch.Tensor], kept: tuple[str, ...], why: str
) -> None:
    with safe_open(diff, framework="pt") as file:
        header = file.metadata()
    save_file(tensors, diff, {name: header[name] for name in ("format", "model", *kept)})
    with pytest.raises(BadInputError, match=why):
        bits_of(DEMO, adapter=diff)


def test_an_adapter_is_that_of_the_run_and_applied_again(export: Export, run: Path, tmp_path: Path) -> None:
    result = export(run, "adapter", tmp_path / "adapter.safetensors")
    assert (tmp_path / "adapter.safetensors").read_bytes() == (run / "adapter.safetensors").read_bytes()
    assert result.check.line == "applied again to demo_vit: no difference"


def test_an_adapter_of_other_weights_leaves_nothing(export: Export, run: Path, tmp_path: Path) -> None:
    forged = shutil.copytree(run, tmp_path / "run")
    tensors = load_file(run / "model.safetensors")
    tensors["norm.weight"] *= 1.001  # which no repair changes
    save_file(tensors, forged / "model.safetensors")
    for target in ("adapter", "diff"):
        with pytest.raises(BadInputError, match=r"applied again|are not those that were written"):
            export(forged, target, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("target", ["adapter", "diff"])
def test_a_missing_base_is_named_and_can_be_given(
    export: Export, run: Path, base: Path, tmp_path: Path, target: str, warnings: Callable[[], list[str]]
) -> None:
    moved = shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["weights"]["source"] = "/nowhere/base.pth"
    (moved / "config.json").write_text(json.dumps(config))
    result = export(moved, target, tmp_path / "out.safetensors")
    assert not result.check.verified
    assert [text for text in warnings() if "/nowhere/base.pth, are not there; name them with --weights" in text]
    assert export(moved, target, tmp_path / "out.safetensors", base, force=True).check.verified

    config["weights"]["source"] = str(base)
    (moved / "config.json").write_text(json.dumps(config))
    assert export(moved, target, tmp_path / "out.safetensors", force=True).check.verified
    save_file(load_file(base) | {"cls": torch.zeros(1, 1, 192)}, base)
    result = export(moved, target, tmp_path / "out.safetensors", force=True)
    assert f"{base} holds other weights now" in result.check.line
    with pytest.raises(ConflictError, match="does not fit"):
        export(moved, target, tmp_path / "out.safetensors", base, force=True)


@pytest.mark.parametrize("target", ["adapter", "diff"])
def test_a_model_that_was_not_repaired_has_neither(export: Export, tmp_path: Path, target: str) -> None:
    with pytest.raises(UsageError, match="it is not a repaired model; name a run, or give --adapter"):
        export(DEMO, target, tmp_path / "out.safetensors")


def test_no_adapter_comes_of_a_delta(export: Export, diff: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds whole tensors, not singular values; use --to diff"):
        export(DEMO, "adapter", tmp_path / "out.safetensors", adapter=diff)


def test_the_files_of_the_run_are_not_written_over(export: Export, run: Path) -> None:
    before = (run / "adapter.safetensors").read_bytes()
    for name in ("adapter.safetensors", "model.safetensors"):
        with pytest.raises(UsageError, match="is read from there"):
            export(run, "adapter", run / name, force=True)
    assert (run / "adapter.safetensors").read_bytes() == before


def test_a_diff_under_its_old_name_is_still_read(run: Path, export: Export, tmp_path: Path) -> None:
    out, old = tmp_path / "diff.safetensors", tmp_path / "old.safetensors"
    export(run, "diff", out)
    with safe_open(out, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert metadata["format"] == "sinder-diff-1"
    save_file(tensors, old, metadata | {"format": "sinder-delta-1"})
    found, expected = read_change(old), read_change(out)
    assert isinstance(found, Diff)
    assert isinstance(expected, Diff)
    assert (found.base_fingerprint, found.fingerprint) == (expected.base_fingerprint, expected.fingerprint)


def test_the_old_name_of_a_format_means_its_present_one() -> None:
    assert target_name("delta") == target_name("diff") == "diff"
    assert complete_target("t") == ["transformers", "timm", "torchhub"]
    with pytest.raises(typer.BadParameter, match="'deltas' is not one of native, "):
        target_name("deltas")


def test_python_knows_old_names_of_formats() -> None:
    assert ExportSettings("delta").to == "diff"  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no export format 'layouts': there are native, "):
        target_of("layouts")  # type: ignore[arg-type]
