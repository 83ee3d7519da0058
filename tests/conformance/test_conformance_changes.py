"""What a repair may change, what an export must keep, and what a map may name twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_vit import Shape, Vit, norm_map, random_state, read, ref, vit
from torch import Tensor, nn

from sinder_cli import Backbone, BlockMap, MemoryTensors, Weights
from sinder_cli.conformance import passes
from sinder_cli.conformance import passes as maps
from sinder_cli.conformance.subject import Candidate, NonconformityError

Make = Callable[..., Candidate]
Mapped = Callable[..., Any]
AT = "blocks.1.branches.0"


def test_a_step_changes_only_the_trained_weights_of_its_window(subject: Make) -> None:
    looked_at = subject(Shape(gated=True))
    before = random_state(Shape(gated=True))
    assert passes.repair_keeps_to_the_map(looked_at) == "10 weights of the last 2 blocks, and nothing else"
    after = looked_at.module.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    trained = ("qkv.weight", "out.weight", "first.weight", "down.weight")
    assert changed == {f"blocks.{block}.branches.0.{name}" for block in (0, 1) for name in trained}
    qk = slice(0, 2 * 96)
    assert torch.equal(after[f"{AT}.qkv.weight"][qk], before[f"{AT}.qkv.weight"][qk])


def test_a_module_that_writes_into_itself_is_reported(subject: Make) -> None:
    def counting(module: Vit, index: int, x: Tensor, _: object) -> Tensor:
        module.get_parameter("norm.bias").data[0] += 1
        y: Tensor = module.blocks[index](x)
        return y

    with pytest.raises(NonconformityError, match=r"norm\.bias changed outside of what the map names as trained"):
        passes.repair_keeps_to_the_map(subject(run_block=counting))


def test_a_weight_that_the_blocks_do_not_use_is_reported(subject: Make) -> None:
    def idle(module: Vit, index: int, x: Tensor, _: object) -> Tensor:
        branch = module.blocks[index].branches[0]  # type: ignore[index, union-attr]
        y: Tensor = x + branch.attention(x) + branch.mlp(x) * 0  # type: ignore[operator]
        return y

    with pytest.raises(NonconformityError, match=r"first\.weight did not change"):
        passes.repair_keeps_to_the_map(subject(run_block=idle))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_export_keeps_every_bit(dtype: torch.dtype, subject: Make) -> None:
    state = {name: tensor.to(dtype) for name, tensor in random_state(Shape()).items()}
    weights = Weights.of(MemoryTensors("memory", state))
    assert passes.export_reads_back(subject(weights=weights)) == f"{len(state)} tensors"


def test_a_newly_made_activation_function_is_the_same_map(subject: Make) -> None:
    def with_function(backbone: Backbone) -> Backbone:
        blocks = []
        for block in backbone.layers.blocks:
            mlp = block.mlp.model_copy(update={"activation": lambda x: nn.functional.gelu(x)})
            blocks.append(block.model_copy(update={"mlp": mlp}))
        return replace(backbone, layers=backbone.layers.model_copy(update={"blocks": tuple(blocks)}))

    again = replace(subject(), describe=lambda path: with_function(read(path)))
    assert passes.export_reads_back(replace(again, backbone=with_function(again.backbone)))


def halved(path: Path) -> Backbone:
    backbone = read(path)
    tensors = {name: tensor.half() for name, tensor in backbone.weights.read(backbone.weights.names).items()}
    return replace(backbone, weights=Weights.of(MemoryTensors("halved", tensors)))


def forgetful(path: Path) -> Backbone:
    backbone = read(path)
    tensors = backbone.weights.read([name for name in backbone.weights.names if name != "row"])
    return replace(backbone, weights=Weights.of(MemoryTensors("forgetful", tensors)))


def fickle(path: Path) -> Backbone:
    backbone = read(path)
    return replace(backbone, layers=backbone.layers.model_copy(update={"position": None}))


@pytest.mark.parametrize(
    ("describe", "told"),
    [
        (halved, "prefix is not the same in the exported file"),
        (forgetful, "the plugin finds other tensors in the exported file: row"),
        (fickle, "describes the exported file with another layer map"),
    ],
)
def test_a_plugin_that_reads_its_own_export_otherwise_is_reported(
    describe: Callable[[Path], Backbone], told: str, subject: Make
) -> None:
    with pytest.raises(NonconformityError, match=told):
        passes.export_reads_back(replace(subject(), describe=describe))


def overlapping(block: BlockMap) -> BlockMap:
    """Values that begin in the middle of the keys."""
    key = ref(f"{AT}.qkv.weight").model_copy(update={"rows": (96, 200)})
    return block.model_copy(update={"attention": block.attention.model_copy(update={"key": key})})


def test_roles_that_share_rows_are_reported(mapped: Mapped) -> None:
    backbone = vit()
    assert maps.roles_are_apart(backbone) == "32 roles"
    wrong = replace(backbone, layers=mapped(backbone, overlapping))
    told = r"block 1, attention.key and block 1, attention.value both mean .*qkv\.weight\[192:200\]"
    with pytest.raises(NonconformityError, match=told):
        maps.roles_are_apart(wrong)


def test_blocks_that_share_a_tensor_are_reported(mapped: Mapped) -> None:
    backbone = vit()
    wrong = replace(backbone, layers=mapped(backbone, lambda _: backbone.layers.blocks[0]))
    with pytest.raises(NonconformityError, match=r"block 0, .* and block 1, .* both mean"):
        maps.roles_are_apart(wrong)


def test_the_sublayers_of_a_parallel_block_may_share_their_norm(mapped: Mapped) -> None:
    def sharing(block: BlockMap) -> BlockMap:
        mlp = block.mlp.model_copy(update={"norm": norm_map(f"{AT}.norm1", rms=False)})
        return block.model_copy(update={"mlp": mlp})

    parallel, serial = vit(Shape(parallel=True)), vit()
    maps.roles_are_apart(replace(parallel, layers=mapped(parallel, sharing)))
    with pytest.raises(NonconformityError, match=r"norm1\.(weight|bias)"):
        maps.roles_are_apart(replace(serial, layers=mapped(serial, sharing)))
