"""Adapters: the weights of the repair that wrote them, bit for bit, and nothing for anyone else."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sinder_cli import Backbone, BadInputError, MemoryTensors, NoInputError, Weights
from sinder_cli.backbone.opening import load_module
from sinder_cli.errors import ConflictError
from sinder_cli.events import Noted, Started, silent
from sinder_cli.repairing.deltas import Deltas, singular_basis
from sinder_cli.repairing.results import write_model
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.repairing.weight_changes import ADAPTER_FORMAT, Adapter, adapted, read_adapter, write_adapter

LR, MOMENTUM = 0.05, 0.9
SETTINGS = RepairSettings(lr=LR)


def stored_as(backbone: Backbone, dtype: torch.dtype, **changed: Tensor) -> Backbone:
    """The backbone with weights of this dtype, and some of them others."""
    tensors = backbone.weights.read(backbone.weights.names) | changed
    halves = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return replace(backbone, weights=Weights.of(MemoryTensors("memory", halves)))


def repaired(backbone: Backbone, offload: bool = False) -> Deltas:
    """Some steps along drawn gradients of two blocks; one target of them stays as it was."""
    deltas = Deltas(backbone, load_module(backbone), offload=offload)
    *targets, _ = [*deltas.of_block(1), *deltas.of_block(3)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        gradients = {t.name: t.basis.project(torch.randn(t.weight.shape, generator=generator)) for t in targets}
        deltas.descend(gradients, LR, MOMENTUM)
    return deltas


def written(folder: Path, backbone: Backbone, deltas: Deltas) -> Adapter:
    write_adapter(folder / "adapter.safetensors", backbone.name, backbone.weights.fingerprint(), deltas, SETTINGS)
    return read_adapter(folder / "adapter.safetensors")


@pytest.fixture
def adapter(single: Any, tmp_path: Path) -> Adapter:
    return written(tmp_path, single.backbone, repaired(single.backbone))


def all_tensors(backbone: Backbone) -> dict[str, Tensor]:
    return backbone.weights.read(backbone.weights.names)


def same_bits(these: dict[str, Tensor], those: dict[str, Tensor]) -> bool:
    return these.keys() == those.keys() and all(
        these[name].dtype == those[name].dtype and torch.equal(these[name], those[name]) for name in these
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_gives_the_repaired_weights_bit_for_bit(single: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    backbone = stored_as(single.backbone, dtype)
    deltas = repaired(backbone)
    write_model(tmp_path / "model.safetensors", backbone.weights, deltas)
    found = adapted(backbone, written(tmp_path, backbone, deltas), silent)
    model = load_file(tmp_path / "model.safetensors")
    assert same_bits(all_tensors(found), model)
    assert not same_bits(all_tensors(backbone), model)
    assert found.weights.names == backbone.weights.names
    assert found.weights.output_infos() == backbone.weights.output_infos()


def test_its_fingerprint_is_that_of_the_repaired_weights(single: Any, adapter: Adapter) -> None:
    found = adapted(single.backbone, adapter, silent)
    tensors = all_tensors(found)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} torch.float32 {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].numpy().tobytes())
    assert found.weights.fingerprint() == digest.hexdigest() != single.backbone.weights.fingerprint()


def test_only_targets_that_changed_are_held_in_the_file(adapter: Adapter) -> None:
    roles = ("attention.value", "attention.output", "mlp.gate", "mlp.up", "mlp.down")
    assert list(adapter.deltas) == [f"blocks.{block}.{role}" for block in (1, 3) for role in roles][:-1]


def test_the_weights_are_the_definition_of_a_delta(single: Any, adapter: Adapter) -> None:
    before, after = all_tensors(single.backbone), all_tensors(adapted(single.backbone, adapter, silent))
    rows = {"attention.value": slice(64, 96), "mlp.gate": slice(0, 24), "mlp.up": slice(24, 48)}
    names = {"attention.value": "qkv", "attention.output": "proj", "mlp.gate": "up", "mlp.up": "up", "mlp.down": "down"}
    expected = {name: tensor.double() for name, tensor in before.items()}
    for target, delta in adapter.deltas.items():
        _, block, part, role = target.split(".")
        weight = expected[f"blocks.{block}.{names[f'{part}.{role}']}.weight"][rows.get(f"{part}.{role}", slice(None))]
        U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(U @ torch.diag(S + delta) @ Vt)
    torch.testing.assert_close({name: tensor.double() for name, tensor in after.items()}, expected)


def test_another_machine_gives_the_same_weights_despite_equal_singular_values(
    single: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    equal = torch.kron(torch.diag(torch.tensor([1.0, 1, 2, 2, 2, 3, 4, 5])), torch.kron(pair, pair))
    thin = torch.arange(24 * 3.0).reshape(24, 3) % 7 @ (torch.arange(3 * 32.0).reshape(3, 32) % 5)
    backbone = stored_as(
        single.backbone,
        torch.float32,
        **{"blocks.1.proj.weight": equal, "blocks.3.up.weight": torch.cat([thin, thin.flip(0)]) / 64},
    )
    deltas = repaired(backbone)
    adapter = written(tmp_path, backbone, deltas)
    before, here = all_tensors(backbone), all_tensors(adapted(backbone, adapter, silent))
    svd = torch.linalg.svd

    def shaken(weight: Tensor, full_matrices: bool) -> Any:
        ulps = torch.randint(-1, 2, weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
        return svd(weight * (1 + ulps * torch.finfo(weight.dtype).eps), full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", shaken)
    turned = next(target for target in deltas.touched if target.name == "blocks.1.attention.output")
    assert (singular_basis(equal).U.abs() - turned.basis.U.abs()).max() > 0.1
    there = all_tensors(adapted(backbone, adapter, silent))
    for name, tensor in here.items():
        assert (tensor - there[name]).norm() <= 1e-5 * (tensor - before[name]).norm()


def test_reading_never_changes_what_is_held(single: Any, adapter: Adapter) -> None:
    found = adapted(single.backbone, adapter, silent)
    first = all_tensors(found)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    for tensor in first.values():
        tensor.zero_()
    assert same_bits(all_tensors(found), kept)


def test_what_was_applied_is_told_with_progress(single: Any, adapter: Adapter) -> None:
    events: list[object] = []
    found = adapted(single.backbone, adapter, events.append)
    assert Started("adapting", 9, "weights") in events
    values = sum(len(delta) for delta in adapter.deltas.values())
    assert events[-1] == Noted(f"{adapter.path}: changed {values} singular values of 9 weights")
    assert found.weights.source.label == f"memory, adapted by {adapter.path}"


def test_the_adapter_of_a_repair_that_changed_nothing_changes_nothing(single: Any, tmp_path: Path) -> None:
    nothing = written(tmp_path, single.backbone, Deltas(single.backbone, load_module(single.backbone)))
    assert same_bits(all_tensors(adapted(single.backbone, nothing, silent)), all_tensors(single.backbone))


def test_an_offloaded_repair_gives_the_same_bits(single: Any) -> None:
    here, away = (repaired(single.backbone, offload).touched for offload in (False, True))
    for mine, theirs in zip(here, away, strict=True):
        assert torch.equal(mine.delta, theirs.delta)
        assert torch.equal(mine.weight, theirs.weight)


def test_other_weights_are_refused_with_both_fingerprints(single: Any, adapter: Adapter) -> None:
    other = stored_as(single.backbone, torch.float32, **{"blocks.5.scale1": torch.ones(32)})
    with pytest.raises(ConflictError, match="does not fit memory: it was made for weights of tiny") as refusal:
        adapted(other, adapter, silent)
    assert adapter.base_fingerprint in str(refusal.value)
    assert other.weights.fingerprint() in str(refusal.value)


def test_the_same_weights_in_half_precision_are_others(single: Any, adapter: Adapter) -> None:
    with pytest.raises(ConflictError):
        adapted(stored_as(single.backbone, torch.float16), adapter, silent)


@pytest.mark.parametrize(
    ("name", "delta", "why"),
    [
        ("blocks.1.attention.query", torch.zeros(32), "is no target weight"),
        ("blocks.6.mlp.up", torch.zeros(24), "is no target weight"),
        ("blocks.01.mlp.up", torch.zeros(24), "is no target weight"),
        ("blocks.1.mlp.up", torch.zeros(25), r"has shape \[25\], and the weight 24 singular values"),
        ("blocks.1.mlp.up", torch.zeros(1), r"has shape \[1\], and the weight 24"),
        ("blocks.1.mlp.up", torch.zeros(24, 1), r"has shape \[24, 1\], and the weight 24"),
        ("blocks.1.attention.value", torch.zeros(96), r"has shape \[96\], and the weight 32"),
    ],
)
def test_a_delta_that_fits_no_target_is_refused_by_name(
    single: Any, adapter: Adapter, name: str, delta: Tensor, why: str
) -> None:
    forged = replace(adapter, deltas={**adapter.deltas, name: delta})
    with pytest.raises(BadInputError, match=f"{name} {why}"):
        adapted(single.backbone, forged, silent)


def test_a_value_too_large_for_the_stored_dtype_is_refused(single: Any, tmp_path: Path) -> None:
    backbone = stored_as(single.backbone, torch.float16)
    adapter = written(tmp_path, backbone, repaired(backbone))
    forged = replace(adapter, deltas={"blocks.1.attention.value": torch.full((32,), 1e6)})
    with pytest.raises(BadInputError, match=r"cannot store blocks.1.qkv.weight\[64:96\]: .* torch.float16"):
        adapted(backbone, forged, silent)


GOOD = {"format": ADAPTER_FORMAT, "model": "tiny", "base_fingerprint": "00", "settings": "{}"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "why"),
    [
        ({"w": torch.zeros(2, 2)}, None, f"its format is None, not '{ADAPTER_FORMAT}'"),
        ({"w": torch.zeros(2)}, GOOD | {"format": "sinder-adapter-2"}, "its format is 'sinder-adapter-2'"),
        ({"w": torch.zeros(2)}, {"format": ADAPTER_FORMAT, "model": "tiny"}, "its header has no 'base_fingerprint'"),
        ({"w": torch.zeros(2)}, {"format": ADAPTER_FORMAT, "base_fingerprint": "00"}, "its header has no 'model'"),
        ({"w": torch.tensor([1.0, torch.nan])}, GOOD, "w is not of finite float32 values"),
        ({"w": torch.tensor([1.0, -torch.inf])}, GOOD, "w is not of finite float32 values"),
        ({"w": torch.zeros(2).half()}, GOOD, "w is not of finite float32 values"),
        ({"w": torch.zeros(2, dtype=torch.int64)}, GOOD, "w is not of finite float32 values"),
    ],
)
def test_a_file_that_is_no_adapter_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None, why: str
) -> None:
    path = tmp_path / "forged.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(BadInputError, match=why) as refusal:
        read_adapter(path)
    assert str(refusal.value).startswith(f"cannot read adapter {path}: ")


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_truncated_adapter_is_refused(adapter: Adapter, kept: int) -> None:
    adapter.path.write_bytes(adapter.path.read_bytes()[:kept])
    with pytest.raises(BadInputError, match="cannot read adapter"):
        read_adapter(adapter.path)


def test_a_missing_file_and_a_folder_are_no_input(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="there is no such file"):
        read_adapter(tmp_path / "none.safetensors")
    with pytest.raises(NoInputError, match="it is a folder"):
        read_adapter(tmp_path)
