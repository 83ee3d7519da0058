"""`--to torchhub`: a folder that torch.hub opens with nothing but torch, and its card."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sinder_plugins.dinov2.config import Config
from sinder_plugins.dinov2.official import DinoVisionTransformer

from sinder_cli import Backbone, ModelRequest, api
from sinder_cli.backbone.opening import load_module
from sinder_cli.errors import BadInputError
from sinder_cli.exporting import torchhub, verifying
from sinder_cli.exporting.drafts import ExportResult
from sinder_cli.exporting.torchhub import foreign_imports, hub_name
from sinder_cli.exporting.verifying import normalized_tokens
from sinder_cli.folders import MANIFEST

Export = Callable[..., ExportResult]
CUSTOM = "dinov2_custom"

# -I: nothing of this environment but its libraries; the safetensors and sinder that are there are made unimportable
LOADED = """
import sys
sys.modules["sinder_cli"] = sys.modules["sinder_plugins"] = sys.modules["safetensors"] = None
import torch
found = {}
for folder, name in zip(sys.argv[2::2], sys.argv[3::2]):
    model = torch.hub.load(folder, name, source="local")
    with torch.inference_mode():
        kinds = model.forward_features(torch.load(sys.argv[1])[folder])
        parts = [kinds["x_norm_clstoken"][:, None], kinds["x_norm_regtokens"], kinds["x_norm_patchtokens"]]
        found[folder] = torch.cat(parts, dim=1)
    assert not model.training
    again = torch.hub.load(folder, name, source="local", pretrained=False).state_dict()
    assert again.keys() == model.state_dict().keys()
torch.save(found, sys.argv[1])
"""


def by_torch_hub(tmp_path: Path, images: dict[Path, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """What torch.hub computes in one fresh process, by folder."""
    file = tmp_path / "exchanged.pt"
    torch.save({str(folder): batch for folder, batch in images.items()}, file)
    named = [text for folder in images for text in (str(folder), name)]
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADED, str(file), *named],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, torch.Tensor] = torch.load(file)
    return found


def ours(weights: Path, images: torch.Tensor) -> torch.Tensor:
    backbone = api.open_model(ModelRequest(CUSTOM, weights))
    with torch.inference_mode():
        return normalized_tokens(backbone, load_module(backbone), images)


def test_torch_hub_computes_what_we_do_in_either_folder(
    export: Export, plain: Path, gated: Path, tmp_path: Path
) -> None:
    folders = {tmp_path / "plain": plain, tmp_path / "gated": gated}
    for folder, weights in folders.items():
        result = export(CUSTOM, "torchhub", folder, weights)
        assert result.check.verified
        assert result.check.difference == 0
    images = torch.randn(2, 3, 84, 112, generator=torch.Generator().manual_seed(0))
    found = by_torch_hub(tmp_path, dict.fromkeys(folders, images), CUSTOM)
    for folder, weights in folders.items():
        torch.testing.assert_close(found[str(folder)], ours(weights, images), rtol=0, atol=1e-6)


def test_only_torch_and_the_standard_library_are_imported(export: Export, run: Path, tmp_path: Path) -> None:
    export(run, "torchhub", tmp_path / "hub")
    files = {path.name: path.read_text() for path in (tmp_path / "hub").rglob("*.py")}
    (package,) = (path.name for path in (tmp_path / "hub").iterdir() if path.name.startswith("sinder_hub_"))
    assert foreign_imports(files) == [package]
    assert "def demo_vit(pretrained=True)" in files["hubconf.py"]
    assert all(len(line) <= 120 for line in files["hubconf.py"].splitlines())


def test_weights_keep_their_dtype_or_take_another(export: Export, plain: Path, tmp_path: Path) -> None:
    export(CUSTOM, "torchhub", tmp_path / "hub", plain, dtype="bfloat16")
    state = torch.load(tmp_path / "hub" / "dinov2_custom.pth", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    images = torch.randn(1, 3, 84, 84)
    cast = tmp_path / "cast.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(plain).items()}, cast)
    found = by_torch_hub(tmp_path, {tmp_path / "hub": images}, CUSTOM)
    torch.testing.assert_close(found[str(tmp_path / "hub")], ours(cast, images), rtol=0, atol=1e-6)


def test_a_folder_that_computes_something_else_leaves_nothing(
    export: Export, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = verifying._our_features

    def shifted(*arguments: object) -> dict[str, torch.Tensor]:
        return {name: tensor * (1 + 3e-5) for name, tensor in genuine(*arguments).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(verifying, "_our_features", shifted)
    with pytest.raises(BadInputError, match=r"differ by 3\.0e-05, and the tolerance is 1e-05") as refusal:
        export(CUSTOM, "torchhub", tmp_path / "hub", plain)
    assert refusal.value.exit_code == 65
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_loaded_leaves_the_old_one(
    export: Export, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(CUSTOM, "torchhub", tmp_path / "hub", plain)
    before = {path: path.read_bytes() for path in (tmp_path / "hub").rglob("*") if path.is_file()}
    monkeypatch.setattr(torchhub, "OFFICIAL_HUBCONF", torchhub.OFFICIAL_HUBCONF + "raise RuntimeError('broken')\n")
    with pytest.raises(BadInputError, match="it cannot be loaded: RuntimeError: broken"):
        export(CUSTOM, "torchhub", tmp_path / "hub", plain, force=True)
    assert {path: path.read_bytes() for path in (tmp_path / "hub").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (None, "its plugin provides no source of the module that needs only torch"),
        ({"module.py": ""}, "has no model.py"),
        ({"model.py": "import timm\nfrom sinder_cli import Weights"}, "imports sinder_cli, timm"),
    ],
)
def test_a_plugin_without_a_source_of_its_own_is_refused(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str] | None, why: str
) -> None:
    genuine = api.open_model

    def opened(request: ModelRequest) -> Backbone:
        return replace(genuine(request), hub_source=None if files is None else lambda: files)

    monkeypatch.setattr(api, "open_model", opened)
    with pytest.raises(BadInputError, match=f"cannot export demo_vit to torchhub: its plugin.*{why}|{why}"):
        export("demo_vit", "torchhub", tmp_path / "hub")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "name"), [("dinov2_vitl14_reg", "dinov2_vitl14_reg"), ("hf/a/b-c.d", "hf_a_b_c_d"), ("3d", "_3d")]
)
def test_a_models_name_becomes_a_functions(model: str, name: str) -> None:
    assert hub_name(model) == name
    ast.parse(f"def {name}(): ...")


# The card, and the list of what is in the folder


def test_the_folder_lists_what_is_in_it(export: Export, run: Path, tmp_path: Path) -> None:
    result = export(run, "torchhub", tmp_path / "hub")
    manifest = json.loads((tmp_path / "hub" / MANIFEST).read_text())
    there = {path.relative_to(tmp_path / "hub").as_posix() for path in (tmp_path / "hub").rglob("*") if path.is_file()}
    assert there == {MANIFEST, *manifest["files"]} == {MANIFEST, *(file.name for file in result.files)}
    assert manifest["verified"] is True
    assert export(run, "torchhub", tmp_path / "hub", force=True).check.verified


def test_an_exported_dinov2_is_called_as_the_official_one_is(
    export: Export, plain: Path, gated: Path, tmp_path: Path
) -> None:
    """The calls of programs that load facebookresearch/dinov2, against the blocks one by one."""
    for weights in (plain, gated):
        backbone = api.open_model(ModelRequest(CUSTOM, weights))
        export(CUSTOM, "torchhub", tmp_path / weights.stem, weights)
        model = torch.hub.load(str(tmp_path / weights.stem), CUSTOM, source="local", verbose=False)
        images = torch.randn(2, 3, 84, 112, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            module, states = load_module(backbone), []
            tokens, context = backbone.embed(module, images)
            for at in range(backbone.depth):
                tokens = backbone.run_block(module, at, tokens, context)
                states.append(tokens)
            normed, first = [backbone.finish(module, each) for each in states], backbone.prefix_tokens
            same = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
            same(model(images), normed[-1][:, 0])
            features = model(images, is_training=True)
            assert list(features) == ["x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm", "masks"]
            same(features["x_norm_patchtokens"], normed[-1][:, first:])
            same(features["x_norm_regtokens"], normed[-1][:, 1:first])
            same(features["x_prenorm"], states[-1])
            several = model.forward_features([images[:1], images[1:]], [None, None])
            same(torch.cat([each["x_norm_clstoken"] for each in several]), normed[-1][:, 0])
            last_two = model.get_intermediate_layers(images, n=2, return_class_token=True)
            for (patches, cls), expected in zip(last_two, normed[-2:], strict=True):
                same(patches, expected[:, first:])
                same(cls, expected[:, 0])
            (grid,) = model.get_intermediate_layers(images, n=[0], reshape=True, norm=False)
            assert grid.shape == (2, backbone.width, 6, 8)
            same(grid.flatten(2).transpose(1, 2), states[0][:, first:])
        sizes = (model.embed_dim, model.n_blocks, model.patch_size, model.num_register_tokens)
        assert sizes == (backbone.width, backbone.depth, 14, first - 1)
        with pytest.raises(ValueError, match="only 0 of 1 blocks were found"):
            model.get_intermediate_layers(images, n=[99])


def test_masked_patches_become_the_mask_token() -> None:
    config = Config(width=64, depth=1, hidden=128, grid=6, mask_token=True)
    model = DinoVisionTransformer(config, 1, torch.nn.functional.scaled_dot_product_attention)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images, masks = torch.randn(1, 3, 84, 84), torch.zeros(1, 36, dtype=torch.bool)
    masks[0, 7] = True
    with torch.no_grad():
        difference = model.prepare_tokens_with_masks(images, masks) - model.prepare_tokens_with_masks(images)
        own = model.prepare_tokens_with_masks(images, masks)[0, 1 + 7] - model.pos_embed[0, 1 + 7]
    assert difference[0].abs().amax(dim=1).nonzero().flatten().tolist() == [1 + 7]
    torch.testing.assert_close(own, model.mask_token[0])
    without = DinoVisionTransformer(replace(config, mask_token=False), 1, model.blocks[0].attn.kernel)
    with pytest.raises(ValueError, match="no mask token"):
        without.prepare_tokens_with_masks(images, masks)
