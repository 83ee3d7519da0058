"""SGD on ε against torch.optim.SGD, and what reaches the weights."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from sinder_cli.distributed import LostRankError, Ranks
from sinder_cli.events import Noted
from sinder_cli.repairing.deltas import Deltas, SingularBasis, Target

N = 32
LR, MOMENTUM = 0.05, 0.9


def drawn_gradient(target: Target, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(target.delta.shape, generator=generator, dtype=torch.float64).to(target.delta.dtype)


def test_the_descent_is_torchs_sgd_with_momentum(planted: Any) -> None:
    deltas = Deltas(planted.backbone, planted.module)
    targets = [*deltas.of_block(1), *deltas.of_block(3)]
    twins = {target.name: torch.zeros_like(target.delta, requires_grad=True) for target in targets}
    optimizer = torch.optim.SGD(twins.values(), lr=LR, momentum=MOMENTUM)
    originals = {target.name: target.weight.clone() for target in targets}
    for step in range(6):
        chosen = [target for index, target in enumerate(targets) if (index + step) % 3]  # each rests now and then
        gradients = {target.name: drawn_gradient(target, 10 * step + len(target.name)) for target in chosen}
        for name, twin in twins.items():
            twin.grad = gradients.get(name)
        deltas.descend(gradients, LR, MOMENTUM)
        optimizer.step()
    for target in targets:
        twin = twins[target.name].detach()
        torch.testing.assert_close(target.delta, twin)
        U, S, Vt = torch.linalg.svd(originals[target.name], full_matrices=False)
        torch.testing.assert_close(target.weight, U @ torch.diag(S + twin) @ Vt)


def test_a_delta_of_zero_leaves_the_weights_bit_for_bit(single: Any) -> None:
    before = {name: tensor.clone() for name, tensor in single.module.state_dict().items()}
    deltas = Deltas(single.backbone, single.module)
    targets = deltas.of_block(2)
    deltas.descend({target.name: torch.zeros_like(target.delta) for target in targets}, LR, MOMENTUM)
    assert all(torch.equal(before[name], tensor) for name, tensor in single.module.state_dict().items())


def test_only_the_targeted_rows_of_a_fused_weight_change(single: Any) -> None:
    before = {name: tensor.clone() for name, tensor in single.module.state_dict().items()}
    deltas = Deltas(single.backbone, single.module)
    gradients = {target.name: torch.ones_like(target.delta) for target in deltas.of_block(2)}
    deltas.descend({"blocks.2.attention.value": gradients["blocks.2.attention.value"]}, LR, MOMENTUM)
    after = single.module.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(before[name], tensor)}
    assert changed == {"blocks.2.qkv.weight"}
    same_rows = (after["blocks.2.qkv.weight"] == before["blocks.2.qkv.weight"]).all(dim=1)
    assert same_rows.nonzero().flatten().tolist() == list(range(2 * N))  # query and key


def test_a_block_is_decomposed_once(planted: Any) -> None:
    events: list[object] = []
    deltas = Deltas(planted.backbone, planted.module, events.append)
    first = deltas.of_block(4)
    assert deltas.of_block(4) is first
    assert [type(event) for event in events] == [Noted]
    gate = {"blocks.4.mlp.gate"} if planted.backbone.layers.blocks[4].mlp.kind == "gated" else set()
    assert {target.name for target in first} == gate | {
        "blocks.4.attention.value", "blocks.4.attention.output", "blocks.4.mlp.up", "blocks.4.mlp.down",
    }  # fmt: skip


def test_touched_targets_are_listed_in_the_order_of_their_blocks(planted: Any) -> None:
    deltas = Deltas(planted.backbone, planted.module)
    for index in (4, 0, 2):
        deltas.of_block(index)
    blocks = [int(target.name.split(".")[1]) for target in deltas.touched]
    assert blocks == sorted(blocks)
    assert set(blocks) == {0, 2, 4}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_target_keeps_its_velocity_while_it_rests(single: Any, momentum: float) -> None:
    deltas = Deltas(single.backbone, single.module)
    target = deltas.of_block(0)[0]
    gradient = torch.ones_like(target.delta)
    deltas.descend({target.name: gradient}, LR, momentum)
    velocity, delta = target.velocity.clone(), target.delta.clone()
    deltas.descend({}, LR, momentum)
    assert torch.equal(target.velocity, velocity)
    assert torch.equal(target.delta, delta)
    deltas.descend({target.name: gradient}, LR, momentum)
    torch.testing.assert_close(target.velocity, gradient * (1 + momentum))


def test_the_window_ends_at_its_block_and_begins_at_the_first(single: Any) -> None:
    deltas = Deltas(single.backbone, single.module)
    targets = {index: deltas.of_block(index) for index in range(4)}
    for last, window, blocks in ((3, 2, [2, 3]), (3, 4, [0, 1, 2, 3]), (1, 10, [0, 1]), (0, 1, [0])):
        assert deltas.of_window(last, window) == [target for index in blocks for target in targets[index]]


@pytest.mark.parametrize("offload", [False, True])
def test_deltas_are_put_back_as_they_were(offload: bool, single: Any) -> None:
    original = {name: tensor.clone() for name, tensor in single.module.state_dict().items()}
    deltas = Deltas(single.backbone, single.module, offload=offload)
    gradients = {target.name: torch.ones_like(target.delta) for target in deltas.of_block(2)}
    first, second, *_ = gradients
    gradients[first][1:] = 0
    deltas.descend({first: gradients[first]}, LR, MOMENTUM)
    values = deltas.values()
    kept = {name: tensor.clone() for name, tensor in single.module.state_dict().items()}
    assert list(values) == [first]
    deltas.descend(gradients, LR, MOMENTUM)
    assert not torch.equal(values[first], deltas.values()[first])  # a copy
    for state, weights, changed in ((values, kept, [first]), ({}, original, [])):
        deltas.put_back(state)
        assert [target.name for target in deltas.changed] == changed
        assert all(torch.equal(weights[name], tensor) for name, tensor in single.module.state_dict().items())
        assert all(target.velocity.eq(0).all() for target in deltas.touched)
    deltas.put({second: 2 * values[first], "blocks.5.mlp.down": values[first]})
    (changed,) = deltas.changed
    assert (changed.name, torch.equal(changed.delta, 2 * values[first])) == (second, True)
    torch.testing.assert_close(changed.weight, changed.original + changed.basis.change(2 * values[first]))


class Sending(Ranks):
    """Tells from which rank each part of a basis comes."""

    sources: ClassVar[list[int]] = []

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        Sending.sources.append(source)
        return tensor.fill_(7)


def needless(_weight: Tensor) -> SingularBasis:
    raise AssertionError("another rank has decomposed it")


def test_a_basis_is_that_of_the_first_rank_that_has_it(single: Any) -> None:
    deltas = Deltas(single.backbone, single.module, decompose=needless)
    Sending.sources.clear()
    deltas.agree([[2], [1, 3], [1, 2]], Sending(0, 3))
    parts = 3 * len(deltas.by_block[1])
    assert Sending.sources == [1] * parts + [0] * parts + [1] * parts
    assert deltas.agreed == {1, 2, 3}
    assert all(target.basis.U.eq(7).all() for target in deltas.touched)
    deltas.agree([[2], [1, 3], [1, 2]], Sending(0, 3))  # each block once
    assert len(Sending.sources) == 3 * parts


class Lost(Ranks):
    """The rank that holds a basis dies after it has sent some parts of it."""

    sent = 0

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        Lost.sent += 1
        if Lost.sent > 4:
            raise LostRankError("lost", f"rank {source} died")
        return tensor.fill_(7)


@pytest.mark.parametrize("mine", [[], [3]], ids=["of another alone", "of both"])
def test_a_rank_lost_while_sending_a_basis_leaves_no_part(mine: list[int], single: Any) -> None:
    deltas = Deltas(single.backbone, single.module)
    before = {index: [target.basis for target in deltas.of_block(index)] for index in mine}
    bits = [basis.U.clone() for bases in before.values() for basis in bases]
    Lost.sent = 0
    with pytest.raises(LostRankError):
        deltas.agree([[], [3]], Lost(0, 2))
    assert {index: [target.basis for target in targets] for index, targets in deltas.by_block.items()} == before
    assert all(torch.equal(basis.U, U) for basis, U in zip(sum(before.values(), []), bits, strict=True))  # noqa: RUF017
    assert not deltas.agreed


@pytest.mark.parametrize("fails_at", [0, 2, 4])
def test_a_descent_that_runs_out_of_memory_moves_no_delta(
    fails_at: int, single: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = Deltas(single.backbone, single.module)
    gradients = {target.name: torch.ones_like(target.delta) for target in deltas.of_block(2)}
    deltas.descend(gradients, LR, MOMENTUM)
    before = [(target.delta.clone(), target.velocity.clone()) for target in deltas.touched]
    written: list[object] = []
    write = Target.write

    def fails(target: Target, *delta: Tensor) -> None:
        written.append(target)
        if len(written) > fails_at:
            raise RuntimeError("out of memory")
        write(target, *delta)

    monkeypatch.setattr(Target, "write", fails)
    with pytest.raises(RuntimeError):
        deltas.descend(gradients, LR, MOMENTUM)
    for target, (delta, velocity) in zip(deltas.touched, before, strict=True):
        assert torch.equal(target.delta, delta)
        assert torch.equal(target.velocity, velocity)
