"""Across libraries: the same features from the tensors of another library's model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_models import CUSTOM, GATED, PLAIN, random_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sinder_cli import BadInputError, MemoryTensors, ModelRequest, WeightRef, Weights, api
from sinder_cli.backbone.contract import NormMap
from sinder_cli.exporting import dinov2, timm, transformers
from sinder_cli.exporting.conversion import ConvertedTensors, Recipe, part, reshaped
from sinder_cli.exporting.drafts import ExportResult
from sinder_cli.exporting.layouts import architecture_of
from sinder_cli.exporting.targets import TargetName
from sinder_cli.files import json_text

Export = Callable[..., ExportResult]

VARIANTS = {
    "plain": PLAIN,
    "gated, registers": GATED,
    "registers": replace(PLAIN, registers=4),
    "gated": replace(GATED, registers=0),
    "without mask": replace(PLAIN, mask_token=False),
    "without LayerScale": replace(PLAIN, layer_scale=False),
    "without bias of q, k, v": replace(PLAIN, qkv_bias=False),
    "without any bias": replace(PLAIN, qkv_bias=False, proj_bias=False, mlp_bias=False),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(random_tensors(request.param), path)
    return path


@pytest.mark.parametrize("target", ["transformers", "timm"])
def test_the_other_library_computes_the_same_features(
    export: Export, checkpoint: Path, target: TargetName, tmp_path: Path
) -> None:
    pytest.importorskip(target)
    result = export(CUSTOM, target, tmp_path / "out", checkpoint)
    assert result.check.verified
    assert result.check.difference is not None
    assert result.check.difference < 1e-5
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_dinov2_comes_back_bit_for_bit(export: Export, checkpoint: Path, tmp_path: Path) -> None:
    export(CUSTOM, "dinov2", tmp_path / "again.safetensors", checkpoint)
    before, after = load_file(checkpoint), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_all_hidden_states_are_compared(plain: Path) -> None:
    backbone = api.open_model(ModelRequest(CUSTOM, plain))
    from sinder_cli.backbone.opening import load_module

    states = transformers.hidden_states(backbone, load_module(backbone), torch.zeros(1, 3, 84, 84))
    assert list(states) == [*(f"hidden_states.{index}" for index in range(4)), "last_hidden_state"]


@pytest.mark.parametrize("target", ["transformers", "timm"])
def test_a_conversion_that_is_wrong_leaves_nothing(
    export: Export, plain: Path, target: TargetName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(target)
    module = {"transformers": transformers, "timm": timm}[target]
    right = module.recipes

    def swapped(*arguments: object) -> dict[str, Recipe]:
        made = right(*arguments)
        norms = [name for name in made if name.endswith(("norm1.weight", "norm2.weight"))]
        return made | {norms[0]: made[norms[1]], norms[1]: made[norms[0]]}

    monkeypatch.setattr(module, "recipes", swapped)
    with pytest.raises(BadInputError, match=r"features of .* differ by .*, and the tolerance is 1e-05") as caught:
        export(CUSTOM, target, tmp_path / "out", plain)
    assert caught.value.exit_code == 65
    assert list(tmp_path.iterdir()) == []


def test_large_weights_come_in_shards_with_an_index(export: Export, plain: Path, tmp_path: Path) -> None:
    result = export(CUSTOM, "transformers", tmp_path / "out", plain, max_shard_size=400_000)
    assert result.check.verified  # by transformers, from the shards
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "out" / file).stat().st_size < 500_000 for file in files)
    held = {}
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            held |= dict.fromkeys(opened.keys(), file)
            assert opened.metadata() == {"format": "pt"}
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in load_file(plain).values())


def test_the_preprocessor_is_loaded_by_transformers(export: Export, plain: Path, tmp_path: Path) -> None:
    export(CUSTOM, "transformers", tmp_path / "out", plain)
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert written["size"] == {"shortest_edge": 84}
    assert written["crop_size"] == {"height": 84, "width": 84}
    assert written["image_mean"] == pytest.approx([0.485, 0.456, 0.406])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModel.from_pretrained" in card


REFUSALS = [
    ({"width": 192, "hidden": 500}, "transformers", "its MLP width 500 is no whole multiple of 192"),
]


@pytest.mark.parametrize(("changed", "target", "told"), REFUSALS)
def test_what_a_family_cannot_hold_is_refused_with_the_reason(
    export: Export, changed: dict[str, int], target: TargetName, told: str, tmp_path: Path
) -> None:
    save_file(random_tensors(replace(PLAIN, **changed)), tmp_path / "odd.safetensors")
    with pytest.raises(BadInputError, match=told) as caught:
        export(CUSTOM, target, tmp_path / "out", tmp_path / "odd.safetensors")
    assert caught.value.exit_code == 65
    assert not (tmp_path / "out").exists()


def test_what_no_foreign_vit_has_is_refused_with_the_reason(plain: Path) -> None:
    backbone = api.open_model(ModelRequest(CUSTOM, plain))
    layers = backbone.layers
    first, *others = layers.blocks
    attention, mlp = first.attention, first.mlp

    def told(**changed: object) -> str:
        with pytest.raises(BadInputError) as caught:
            architecture_of(replace(backbone, layers=layers.model_copy(update=changed)), "timm")
        return str(caught.value)

    def blocks(**changed: object) -> dict[str, object]:
        return {"blocks": (first.model_copy(update=changed), *others)}

    norm = NormMap(weight=attention.norm.weight)
    assert "no learned position embedding" in told(position=None)
    assert "does not name its stem" in told(stem=None)
    assert "no cls token" in told(stem=layers.stem.model_copy(update={"cls": None}))
    assert "block 0 has sub-layers that run in parallel" in told(
        blocks=tuple(block.model_copy(update={"parallel": True}) for block in layers.blocks)
    )
    unlike = others[-1].model_copy(update={"mlp": mlp.model_copy(update={"activation": "relu"})})
    assert "block 2 differs from block 0 in its structure" in told(blocks=(first, *others[:-1], unlike))
    inner = attention.model_copy(update={"inner_norm": norm})
    assert "norm inside a sub-layer" in told(
        blocks=tuple(block.model_copy(update={"attention": inner}) for block in layers.blocks)
    )
    rotary = attention.model_copy(update={"mixing": "other"})
    assert "rotary or relative positions" in told(
        blocks=tuple(block.model_copy(update={"attention": rotary}) for block in layers.blocks)
    )
    root = mlp.model_copy(update={"norm": NormMap(kind="rmsnorm", weight=mlp.norm.weight, bias=mlp.norm.bias)})
    assert "not a LayerNorm with weight and bias" in told(**blocks(mlp=root))
    other = mlp.model_copy(update={"norm": mlp.norm.model_copy(update={"eps": 1e-3})})
    assert "differ in their eps" in told(
        blocks=tuple(block.model_copy(update={"mlp": other}) for block in layers.blocks)
    )
    nameless = mlp.model_copy(update={"activation": torch.sin})
    assert "activation has no name" in told(
        blocks=tuple(block.model_copy(update={"mlp": nameless}) for block in layers.blocks)
    )
    assert "2 rows of its position embedding belong to no patch" in told(
        position=layers.position.model_copy(update={"prefix": 2})
    )


def test_the_dinov2_layout_refuses_what_its_code_would_run_otherwise(plain: Path) -> None:
    backbone = api.open_model(ModelRequest(CUSTOM, plain))

    def with_blocks(activation: str = "gelu", eps: float = 1e-6) -> object:
        def norm(found: NormMap) -> NormMap:
            return found.model_copy(update={"eps": eps})

        blocks = tuple(
            block.model_copy(
                update={
                    "attention": block.attention.model_copy(update={"norm": norm(block.attention.norm)}),
                    "mlp": block.mlp.model_copy(update={"norm": norm(block.mlp.norm), "activation": activation}),
                }
            )
            for block in backbone.layers.blocks
        )
        assert backbone.layers.norm is not None
        changed = {"blocks": blocks, "norm": norm(backbone.layers.norm)}
        return replace(backbone, layers=backbone.layers.model_copy(update=changed))

    dinov2.converted(with_blocks())  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="its activation is relu, not gelu"):
        dinov2.converted(with_blocks(activation="relu"))  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="its norms have eps 1e-05, not 1e-06"):
        dinov2.converted(with_blocks(eps=1e-5))  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="eps 1e-05, and timm's 1e-06"):
        timm.converted(with_blocks(eps=1e-5))  # type: ignore[arg-type]


def test_recipes_join_parts_and_fill_in_what_is_missing() -> None:
    a, b = torch.arange(12.0).reshape(6, 2), torch.arange(4.0)
    weights = Weights.of(MemoryTensors("m", {"a": a, "b": b}))

    def ref(name: str, *rows: int) -> WeightRef:
        return WeightRef(name=name, rows=(rows[0], rows[1]) if rows else None)

    recipes = {
        "fused": part(weights, ref("a", 4, 6), ref("a", 0, 2)),
        "whole": part(weights, ref("a")),
        "square": reshaped(weights, ref("b"), 2, 2),
        "ones": Recipe((3,), fill=1.0),
    }
    source = ConvertedTensors(weights, recipes, torch.float16)
    read = source.read(recipes)
    assert torch.equal(read["fused"], torch.tensor([[8.0, 9], [10, 11], [0, 1], [2, 3]]))
    assert torch.equal(read["whole"], a)
    assert torch.equal(read["square"], b.reshape(2, 2))
    assert torch.equal(read["ones"], torch.ones(3, dtype=torch.float16))
    assert {name: (info.shape, info.dtype) for name, info in source.infos.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in read.items()
    }
    read["whole"].zero_()
    assert torch.equal(source.read(["whole"])["whole"], a)
    with pytest.raises(ValueError, match="does not make"):
        reshaped(weights, ref("b"), 3, 2)


def test_documents_are_plain_json(plain: Path) -> None:
    backbone = api.open_model(ModelRequest(CUSTOM, plain))
    for made in (transformers.converted(backbone).config, timm.converted(backbone).config):
        assert json.loads(json_text(made)) == made
