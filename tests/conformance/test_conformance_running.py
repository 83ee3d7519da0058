"""All checks together: a record each, whatever they meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from drawn_vit import read, ref, vit

from sinder_cli import Backbone, BlockMap
from sinder_cli.conformance.running import conformance
from sinder_cli.conformance.subject import Conformance

NAMES = [
    "map: tensors", "module: weights", "map: roles", "tokens: prefix", "tokens: patches", "passes: forward",
    "passes: batches", "passes: inputs", "passes: gradients", "blocks: formula", "blocks: linearization",
    "repair: step", "export: native",
]  # fmt: skip


def outcomes(result: Conformance) -> dict[str, str]:
    return {check.name: check.outcome for check in result.checks}


def test_a_right_plugin_conforms() -> None:
    result = conformance(vit(), read)
    assert outcomes(result) == dict.fromkeys(NAMES, "passed")
    assert (result.model, result.weights, result.failed) == ("small_vit", "memory", ())


def test_two_runs_say_the_same() -> None:
    assert conformance(vit(), read) == conformance(vit(), read)


def test_a_forward_that_is_not_given_is_not_passed() -> None:
    result = conformance(replace(vit(), forward=None), read)
    assert outcomes(result) == dict.fromkeys(NAMES, "passed") | {"passes: forward": "not given"}
    assert result.failed == ()


def failing(failure: BaseException) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise failure

    return fail


def test_a_raising_check_fails_alone_and_the_others_go_on() -> None:
    result = conformance(replace(vit(), finish=failing(KeyError("norm"))), read)
    failed = {"passes: forward": "failed", "passes: batches": "failed"}
    assert outcomes(result) == dict.fromkeys(NAMES, "passed") | failed
    assert {check.detail for check in result.failed} == {"KeyError: 'norm'"}


def wrong_name(block: BlockMap) -> BlockMap:
    return block.model_copy(update={"attention": block.attention.model_copy(update={"value": ref("no.such")})})


@pytest.mark.parametrize("fault", ["map", "module"])
def test_what_takes_a_module_is_not_run_without_one(fault: str, mapped: Callable[..., Any]) -> None:
    backbone = vit()
    if fault == "map":
        backbone = replace(backbone, layers=mapped(backbone, wrong_name))
    else:
        backbone = replace(backbone, build=lambda: torch.nn.Linear(2, 2))
    result = conformance(backbone, read)
    assert [check.outcome for check in result.checks].count("failed") == 1
    told = "there is no tensor 'no.such'" if fault == "map" else "unexpected: prefix"
    assert told in result.failed[0].detail
    rest = set(NAMES) - {"map: tensors", "module: weights"}
    assert {outcomes(result)[name] for name in rest} == {"not run"}


@pytest.mark.parametrize("lack", [MemoryError("no more"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_lack_of_memory_is_no_verdict(lack: Exception) -> None:
    with pytest.raises(type(lack)):
        conformance(replace(vit(), finish=failing(lack)), read)


def test_a_model_of_one_block_is_enough() -> None:
    def first_block(backbone: Backbone) -> Backbone:
        weights = backbone.weights
        kept = {name: stored for name, stored in weights.stored_names.items() if not name.startswith("blocks.1")}
        layers = backbone.layers.model_copy(update={"blocks": backbone.layers.blocks[:1]})

        def build() -> torch.nn.Module:
            module = backbone.build()
            del module.blocks[1]  # type: ignore[operator, union-attr]
            return module

        return replace(backbone, weights=replace(weights, stored_names=kept), layers=layers, build=build)

    result = conformance(first_block(vit()), lambda path: first_block(read(path)))
    assert outcomes(result) == dict.fromkeys(NAMES, "passed")
