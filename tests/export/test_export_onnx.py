"""`--to onnx`: one file whose outputs onnxruntime computes as we do, for any number of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sinder_cli import Backbone, ModelRequest, api
from sinder_cli.backbone.opening import load_module
from sinder_cli.errors import BadInputError, UnavailableError, UsageError
from sinder_cli.exporting import onnx as target
from sinder_cli.exporting import verifying
from sinder_cli.exporting.drafts import ExportResult
from sinder_cli.exporting.verifying import by_kind, normalized_tokens

Export = Callable[..., ExportResult]
CUSTOM = "dinov2_custom"


def session(path: Path) -> object:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def ours(backbone: Backbone, images: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return by_kind(backbone, normalized_tokens(backbone, load_module(backbone), images))


@pytest.mark.parametrize(
    ("weights", "size", "names"),
    [
        ("plain", None, ["cls", "patch_tokens"]),
        ("plain", 112, ["cls", "patch_tokens"]),  # of position embeddings that are resized as the official models do
        ("gated", 56, ["cls", "registers", "patch_tokens"]),  # and antialiased
    ],
)
def test_onnxruntime_computes_what_we_do_for_any_number_of_images(
    export: Export, request: pytest.FixtureRequest, tmp_path: Path, weights: str, size: int | None, names: list[str]
) -> None:
    file: Path = request.getfixturevalue(weights)
    out = tmp_path / "model.onnx"
    result = export(CUSTOM, "onnx", out, file, image_size=size)
    assert result.check.verified
    assert result.check.tolerance == 1e-4
    assert 0 < (result.check.difference or 0) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]  # no data beside it

    backbone, side = api.open_model(ModelRequest(CUSTOM, file)), size or 84
    running = session(out)
    for count in (1, 3):
        images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))
        expected = ours(backbone, images)
        found = running.run(None, {"images": images.numpy()})  # type: ignore[attr-defined]
        assert [output.name for output in running.get_outputs()] == list(expected) == names  # type: ignore[attr-defined]
        for tensor, array in zip(expected.values(), found, strict=True):
            np.testing.assert_allclose(array, tensor.numpy(), rtol=0, atol=2e-5)


def test_position_embeddings_are_constants(export: Export, plain: Path, tmp_path: Path) -> None:
    import onnx

    export(CUSTOM, "onnx", tmp_path / "model.onnx", plain, image_size=112)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not {"Resize", "Upsample"} & {node.op_type for node in graph.node}
    assert [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        3,
        112,
        112,
    ]


def test_dynamic_size_is_refused_where_it_comes_out_wrong(export: Export, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"onnx with dynamic size: .*; leave --dynamic-size out") as refusal:
        export(CUSTOM, "onnx", tmp_path / "model.onnx", plain, dynamic_size=True)
    assert refusal.value.exit_code == 65
    assert len(str(refusal.value)) < 200, "another library's text is told"
    assert "onnxruntime" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_dynamic_size_is_written_where_it_comes_out_right(
    export: Export, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = api.open_model

    def without_positions(request: ModelRequest) -> Backbone:
        """A model that does not know where its patches are."""
        backbone = genuine(request)

        def embed(module: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, None]:
            patches = module.patch_embed(images).flatten(2).transpose(1, 2)
            cls = module.cls_token.expand(images.shape[0], -1, -1)
            return torch.cat([cls, patches], dim=1), None

        return replace(backbone, embed=embed)

    monkeypatch.setattr(api, "open_model", without_positions)
    assert export(CUSTOM, "onnx", tmp_path / "model.onnx", plain, dynamic_size=True).check.verified
    running = session(tmp_path / "model.onnx")
    images = torch.randn(1, 3, 42, 98)
    expected = ours(without_positions(ModelRequest(CUSTOM, plain)), images)
    found = running.run(None, {"images": images.numpy()})  # type: ignore[attr-defined]
    for tensor, array in zip(expected.values(), found, strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), rtol=0, atol=2e-5)


def test_dynamic_size_is_never_taken_on_trust(export: Export, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only if it was verified"):
        export(CUSTOM, "onnx", tmp_path / "model.onnx", plain, dynamic_size=True, verify=False)


def test_another_result_leaves_nothing(
    export: Export, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "TOLERANCE", 1e-12)
    with pytest.raises(BadInputError, match=r"features of onnxruntime .* differ by .*, and the tolerance is 1e-12"):
        export(CUSTOM, "onnx", tmp_path / "model.onnx", plain)
    assert list(tmp_path.iterdir()) == []


def test_without_onnxruntime_it_is_written_with_a_warning(
    export: Export, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(verifying, "find_spec", lambda name: None)  # noqa: ARG005
    result = export(CUSTOM, "onnx", tmp_path / "model.onnx", plain)
    assert not result.check.verified
    assert warnings() == ["not checked: onnxruntime not installed"]
    assert session(tmp_path / "model.onnx")


def test_without_the_exporters_library_nothing_is_written(
    export: Export, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "find_spec", lambda name: None)  # noqa: ARG005
    with pytest.raises(UnavailableError, match=r"onnx and onnxscript not installed; pip install 'sinder-cli\[onnx\]'"):
        export(CUSTOM, "onnx", tmp_path / "model.onnx", plain)


def test_a_size_of_broken_patches_is_refused(export: Export, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="100 pixels are not a multiple of the patch size 14; use --image-size 98"):
        export(CUSTOM, "onnx", tmp_path / "model.onnx", plain, image_size=100)


def test_more_than_one_file_can_hold_is_refused(
    export: Export, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "MOST_BYTES", 1 << 20)
    with pytest.raises(BadInputError, match=r"GB in float32, and one ONNX file holds under 2\.1"):
        export(CUSTOM, "onnx", tmp_path / "model.onnx", plain)
