"""An exported DINOv2 takes the place of one of facebookresearch/dinov2: signatures, keywords, attributes, numbers.

What the official repository has is stated here as facts, read from it at commit b8931f7 (14 August 2025): hubconf.py,
dinov2/hub/backbones.py, dinov2/models/vision_transformer.py, dinov2/layers/{patch_embed,attention,block}.py.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from inspect import Parameter
from pathlib import Path
from typing import Any

import pytest
import torch
from sinder_plugins.dinov2.config import Config
from sinder_plugins.dinov2.module import VisionTransformer
from sinder_plugins.dinov2.official import DinoVisionTransformer
from torch.nn.functional import scaled_dot_product_attention

from sinder_cli.exporting.drafts import ExportResult

Export = Callable[..., ExportResult]
CUSTOM = "dinov2_custom"
KINDS = {
    "": Parameter.POSITIONAL_OR_KEYWORD,
    "*": Parameter.VAR_POSITIONAL,
    "**": Parameter.VAR_KEYWORD,
    "kw ": Parameter.KEYWORD_ONLY,
}
NONE = Parameter.empty
ENTRY = [("kw ", "pretrained", True), ("kw ", "weights", "LVD142M"), ("**", "kwargs", NONE)]  # of each hub function
METHODS: dict[str, list[tuple[str, str, Any]]] = {
    "init_weights": [],
    "interpolate_pos_encoding": [("", "x", NONE), ("", "w", NONE), ("", "h", NONE)],
    "prepare_tokens_with_masks": [("", "x", NONE), ("", "masks", None)],
    "forward_features_list": [("", "x_list", NONE), ("", "masks_list", NONE)],
    "forward_features": [("", "x", NONE), ("", "masks", None)],
    "get_intermediate_layers": [
        ("", "x", NONE),
        ("", "n", 1),
        ("", "reshape", False),
        ("", "return_class_token", False),
        ("", "norm", True),
    ],
    "forward": [("*", "args", NONE), ("kw ", "is_training", False), ("**", "kwargs", NONE)],
}
# keywords of `_make_dinov2_model` with the values that its functions of models without and with registers give them
PLAIN = {
    "img_size": 84,  # of this small model; officially 518
    "patch_size": 14,
    "init_values": 1.0,
    "ffn_layer": "mlp",
    "block_chunks": 0,
    "num_register_tokens": 0,
    "interpolate_antialias": False,
    "interpolate_offset": 0.1,
}
WITH_REGISTERS = PLAIN | {
    "ffn_layer": "swiglufused",
    "num_register_tokens": 4,
    "interpolate_antialias": True,
    "interpolate_offset": 0.0,
}


@pytest.fixture(scope="module")
def hubs(tmp_path_factory: pytest.TempPathFactory, plain: Path, gated: Path) -> dict[str, Path]:
    """An exported folder for a model without registers, and one with them and gated MLPs."""
    from sinder_cli import ModelRequest, api
    from sinder_cli.exporting.targets import ExportSettings
    from sinder_cli.requests import ExportRequest

    folders = {}
    for name, weights in (("plain", plain), ("gated", gated)):
        folders[name] = tmp_path_factory.mktemp("hubs") / name
        settings = ExportSettings("torchhub", verify=False)
        api.export(ExportRequest(ModelRequest(CUSTOM, weights), settings), folders[name])
    return folders


def loaded(folder: Path, **keywords: Any) -> Any:
    return torch.hub.load(str(folder), CUSTOM, source="local", verbose=False, **keywords)


def parts(called: Callable[..., Any]) -> list[tuple[str, str, Any]]:
    """Kind, name and default of each parameter; the default of an enumeration by its name."""
    prefixes = {kind: prefix for prefix, kind in KINDS.items()}
    return [
        (prefixes[each.kind], each.name, each.default.name if isinstance(each.default, Enum) else each.default)
        for each in inspect.signature(called).parameters.values()
    ]


def entries(folder: Path) -> dict[str, Callable[..., Any]]:
    """What `hubconf.py` offers, imported and looked through as torch.hub does."""
    module: Any = torch.hub._import_module("hubconf", str(folder / "hubconf.py"))
    return {name: each for name, each in vars(module).items() if callable(each) and not name.startswith("_")}


def test_the_function_of_the_hub_has_the_official_signature(
    hubs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in hubs.values():
        monkeypatch.syspath_prepend(str(folder))
        assert {name: parts(each) for name, each in entries(folder).items()} == {CUSTOM: ENTRY}


@pytest.mark.parametrize("method", METHODS)
def test_methods_have_the_official_signatures(hubs: dict[str, Path], method: str) -> None:
    model = loaded(hubs["gated"])
    assert parts(getattr(model, method)) == METHODS[method]


@pytest.mark.parametrize(("name", "registers", "heads"), [("plain", 0, 2), ("gated", 4, 2)])
def test_attributes_are_the_official_ones(hubs: dict[str, Path], name: str, registers: int, heads: int) -> None:
    model = loaded(hubs[name])
    width, depth, grid = model.cls_token.shape[-1], len(model.blocks), round((model.pos_embed.shape[1] - 1) ** 0.5)
    found = {
        each: getattr(model, each) for each in ("embed_dim", "num_features", "n_blocks", "num_heads", "num_tokens")
    }
    assert found == {"embed_dim": width, "num_features": width, "n_blocks": depth, "num_heads": heads, "num_tokens": 1}
    assert (model.patch_size, model.num_register_tokens, model.chunked_blocks) == (14, registers, False)
    assert (model.interpolate_antialias, model.interpolate_offset) == ((True, 0.0) if registers else (False, 0.1))
    assert (model.register_tokens is None) == (registers == 0)
    assert isinstance(model.head, torch.nn.Identity)
    patches = model.patch_embed
    assert (patches.patch_size, patches.num_patches, patches.img_size) == ((14, 14), grid**2, (14 * grid, 14 * grid))
    assert (patches.patches_resolution, patches.in_chans, patches.embed_dim) == ((grid, grid), 3, width)
    assert (patches.flatten_embedding, isinstance(patches.norm, torch.nn.Identity)) == (True, True)
    assert patches(torch.zeros(2, 3, 28, 42)).shape == (2, 6, width)
    for block in model.blocks:
        assert (block.attn.num_heads, block.attn.dim, block.attn.scale) == (heads, width, (width // heads) ** -0.5)
        assert isinstance(block.drop_path1, torch.nn.Identity)
        assert block.attn.qkv.out_features == 3 * width
        assert block.attn.attn_drop == block.sample_drop_ratio == 0
        assert isinstance(block.attn.proj_drop, torch.nn.Identity)


@pytest.mark.parametrize(("name", "keywords"), [("plain", PLAIN), ("gated", WITH_REGISTERS)])
def test_the_official_keywords_change_nothing(hubs: dict[str, Path], name: str, keywords: dict[str, Any]) -> None:
    side = 14 * round((loaded(hubs[name]).pos_embed.shape[1] - 1) ** 0.5)
    images = torch.randn(1, 3, 70, 98, generator=torch.Generator().manual_seed(0))
    given = keywords | {"img_size": side, "weights": "LVD142M", "pretrained": True}
    with torch.inference_mode():
        assert torch.equal(loaded(hubs[name], **given)(images), loaded(hubs[name])(images))


@pytest.mark.parametrize(("registers", "masks"), [(0, False), (0, True), (4, False), (4, True)])
def test_it_computes_what_the_module_that_sinder_repairs_does(registers: int, masks: bool) -> None:
    config = Config(width=64, depth=2, hidden=128, grid=6, registers=registers)
    ours = VisionTransformer(config, 2, scaled_dot_product_attention)
    official = DinoVisionTransformer(config, 2, scaled_dot_product_attention)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    official.load_state_dict(ours.state_dict())
    assert list(official.state_dict()) == list(ours.state_dict())
    for rows, columns in ((6, 6), (5, 8), (9, 7), (3, 3)):
        images = torch.randn(2, 3, 14 * rows, 14 * columns)
        hidden = torch.rand(2, rows * columns) < 0.3 if masks else None
        with torch.inference_mode():
            tokens = ours.embed(images, hidden)
            assert torch.equal(official.prepare_tokens_with_masks(images, hidden), tokens)
            without = torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], dim=1)
            positions = official.interpolate_pos_encoding(without, 14 * rows, 14 * columns)
            assert torch.equal(positions, ours.position(rows, columns))
            if not masks:
                assert torch.equal(official(images), ours(images)[:, 0])


def test_positions_are_resized_as_the_keywords_say() -> None:
    config = Config(width=64, depth=1, hidden=128, grid=6)
    reg = DinoVisionTransformer(
        Config(width=64, depth=1, hidden=128, grid=6, registers=4), 1, scaled_dot_product_attention
    )
    asked = DinoVisionTransformer(
        config, 1, scaled_dot_product_attention, interpolate_antialias=True, interpolate_offset=0.0
    )
    usual = DinoVisionTransformer(config, 1, scaled_dot_product_attention)
    torch.nn.init.normal_(reg.pos_embed)
    for model in (asked, usual):
        model.pos_embed.data = reg.pos_embed.data
    tokens = torch.zeros(1, 13, 64)
    assert torch.equal(asked.interpolate_pos_encoding(tokens, 42, 56), reg.interpolate_pos_encoding(tokens, 42, 56))
    assert not torch.equal(
        asked.interpolate_pos_encoding(tokens, 42, 56), usual.interpolate_pos_encoding(tokens, 42, 56)
    )


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"image_size": 84}, TypeError, r"dinov2_custom\(\) got an unexpected keyword argument 'image_size'"),
        ({"depth": 2}, TypeError, "unexpected keyword argument 'depth'"),
        ({"patch_size": 16}, ValueError, "patch_size is 14 in these weights, not 16"),
        ({"ffn_layer": "swiglufused"}, ValueError, "ffn_layer is 'GELU' in these weights, not 'swiglufused'"),
        ({"block_chunks": 4}, ValueError, "block_chunks is 0 in these weights, not 4"),
        ({"num_register_tokens": 4}, ValueError, "num_register_tokens is 0"),
        ({"drop_path_rate": 0.1}, ValueError, "drop_path_rate is 0.0"),
        ({"img_size": 140}, ValueError, "img_size does not fit the weights: leave it out"),
        ({"img_size": (84, 98)}, ValueError, r"img_size \(84, 98\) is no side of a square"),
        ({"weights": "IMAGENET"}, ValueError, "there are no weights 'IMAGENET' in this folder"),
    ],
)
def test_what_it_cannot_do_is_refused(
    hubs: dict[str, Path], keywords: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        loaded(hubs["plain"], **keywords)


def test_without_weights_it_is_ready_to_be_trained(hubs: dict[str, Path]) -> None:
    model = loaded(hubs["plain"], pretrained=False, img_size=140, init_values=0.5, drop_path_uniform=True)
    assert model.patch_embed.num_patches == 100 == model.pos_embed.shape[1] - 1
    assert {parameter.unique().item() for name, parameter in model.named_parameters() if "gamma" in name} == {0.5}
    assert 0.015 < model.pos_embed.std().item() < 0.025
    assert 0.015 < model.blocks[0].attn.qkv.weight.std().item() < 0.025
    assert model.blocks[0].attn.qkv.bias.abs().max() == 0
    assert 0 < model.cls_token.abs().max() < 1e-4
    with pytest.raises(ValueError, match="an image of 20 × 28 px is not made of patches of 14 px"):
        model(torch.zeros(1, 3, 20, 28))


def test_attention_maps_are_computed_as_programs_do(hubs: dict[str, Path]) -> None:
    """The usual hook: queries and keys from `qkv`, by `num_heads` and `scale`."""
    model, seen = loaded(hubs["plain"]), []
    model.blocks[-1].attn.qkv.register_forward_hook(lambda *given: seen.append(given[2]))
    with torch.inference_mode():
        model(torch.randn(1, 3, 84, 84))
    attention = model.blocks[-1].attn
    q, k, _ = seen[0].reshape(1, 37, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    maps = (q * attention.scale @ k.transpose(-2, -1)).softmax(dim=-1)
    assert maps.shape == (1, attention.num_heads, 37, 37)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(1, attention.num_heads, 37))


def test_it_is_loaded_where_only_torch_is(hubs: dict[str, Path]) -> None:
    code = (
        "import sys; sys.modules['sinder_cli'] = sys.modules['sinder_plugins'] = sys.modules['safetensors'] = None\n"
        f"import torch; model = torch.hub.load({str(hubs['gated'])!r}, {CUSTOM!r}, source='local', weights='LVD142M')\n"
        "print(model.num_register_tokens)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "4"), done.stderr
