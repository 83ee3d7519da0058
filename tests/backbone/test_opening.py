"""Who is blamed when a model cannot be opened, and how its module is built and filled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sinder_cli import (
    AttentionMap,
    Backbone,
    BadInputError,
    BlockMap,
    LayerMap,
    MemoryTensors,
    ModelRequest,
    NormMap,
    PlainMlpMap,
    UnavailableError,
    WeightRef,
    Weights,
    api,
    inputs,
)
from sinder_cli.backbone.isolation import Hooks, PluginEntry
from sinder_cli.backbone.opening import load_module, open_backbone, require_loadable
from sinder_cli.exporting.targets import ExportSettings
from sinder_cli.requests import ExportRequest

N = 4


class Toy(nn.Module):
    """One square matrix for every role, and a table that is computed, not stored."""

    def __init__(self, stored_table: bool = False) -> None:
        super().__init__()
        self.mix = nn.Linear(N, N)
        self.register_buffer("table", torch.arange(100.0) + 7, persistent=stored_table)


def toy_tensors() -> dict[str, Tensor]:
    return {"mix.weight": torch.full((N, N), 2.0), "mix.bias": torch.full((N,), 3.0)}


def described(weights: Weights, build: Callable[[], nn.Module] = Toy) -> Backbone:
    weight, norm = WeightRef(name="mix.weight"), NormMap(weight=WeightRef(name="mix.bias"))
    block = BlockMap(
        attention=AttentionMap(norm=norm, value=weight, output=weight),
        mlp=PlainMlpMap(norm=norm, activation="gelu", up=weight, down=weight),
    )
    return Backbone(
        name="toy",
        layers=LayerMap(width=N, blocks=(block,)),
        weights=weights,
        patch_size=1,
        prefix_tokens=1,
        has_cls=True,
        image_size=8,
        build=build,
        embed=lambda _, images: (images, None),
        run_block=lambda _module, _index, tokens, _context: tokens,
        finish=lambda _, tokens: tokens,
    )


def toy(tensors: dict[str, Tensor] | None = None, build: Callable[[], nn.Module] = Toy) -> Backbone:
    return described(Weights.of(MemoryTensors("memory", tensors or toy_tensors())), build)


def hooks(**replaced: Any) -> Hooks:
    """A plugin's hooks, whole unless some are replaced."""
    whole = {
        "sinder_weights": lambda request: MemoryTensors(request.model, toy_tensors()),
        "sinder_backbone": lambda request, weights: described(weights),  # noqa: ARG005 - the hook's keyword
    }
    entry = PluginEntry("toy", "toy-vits", EntryPoint("toy", "toy_plugin", "sinder.backbones"))
    return Hooks(entry, SimpleNamespace(**(whole | replaced)))


def failing(failure: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise failure

    return fail


def test_a_whole_plugin_is_opened() -> None:
    assert open_backbone(hooks(), ModelRequest("toy")).depth == 1


MISTAKES = [(KeyError("w"), "KeyError: 'w'"), (SystemExit(3), "SystemExit: 3")]
BLAME = "plugin 'toy' of toy-vits failed at 'toy': "


@pytest.mark.parametrize(("mistake", "words"), MISTAKES, ids=["a mistake", "an exit"])
@pytest.mark.parametrize("hook", ["sinder_weights", "sinder_backbone"])
def test_a_failing_hook_is_told_as_the_plugins_failure(hook: str, mistake: BaseException, words: str) -> None:
    with pytest.raises(UnavailableError, match=f"{BLAME}{words}; tell its author"):
        open_backbone(hooks(**{hook: failing(mistake)}), ModelRequest("toy"))


@pytest.mark.parametrize(("mistake", "words"), MISTAKES, ids=["a mistake", "an exit"])
@pytest.mark.parametrize("function", ["build", "embed", "run_block", "finish"])
def test_so_is_what_goes_wrong_in_the_functions_it_describes(function: str, mistake: BaseException, words: str) -> None:
    def broken(weights: Weights, **_: object) -> Backbone:
        return replace(described(weights), **{function: failing(mistake)})

    backbone = open_backbone(hooks(sinder_backbone=broken), ModelRequest("toy"))
    with pytest.raises(UnavailableError, match=f"{BLAME}{words}; tell its author"):
        getattr(backbone, function)()


@pytest.mark.parametrize("lack", [MemoryError("no more"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_lack_of_memory_in_a_function_is_the_machines(lack: Exception) -> None:
    def greedy(weights: Weights, **_: object) -> Backbone:
        return replace(described(weights), run_block=failing(lack))

    backbone = open_backbone(hooks(sinder_backbone=greedy), ModelRequest("toy"))
    with pytest.raises(type(lack)):
        backbone.run_block(Toy(), 0, torch.ones(1, 2, N), None)


@pytest.mark.parametrize("failure", [MemoryError("no more"), PermissionError("not yours")])
@pytest.mark.parametrize("hook", ["sinder_weights", "sinder_backbone"])
def test_a_failure_of_the_machine_inside_a_plugin_passes(hook: str, failure: Exception) -> None:
    with pytest.raises(type(failure)) as caught:
        open_backbone(hooks(**{hook: failing(failure)}), ModelRequest("toy"))
    assert caught.value is failure


@pytest.mark.parametrize("failure", [MemoryError("no more"), PermissionError("not yours"), RuntimeError("ours")])
@pytest.mark.parametrize("named_by", ["the user", "the plugin"])
def test_a_failure_to_open_a_checkpoint_is_never_the_plugins(
    named_by: str, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("a.pth")
    monkeypatch.setattr("sinder_cli.backbone.opening.open_checkpoint", failing(failure))
    asked = hooks(sinder_weights=lambda request: path)  # noqa: ARG005
    with pytest.raises(type(failure)) as caught:
        open_backbone(asked, ModelRequest("toy", path if named_by == "the user" else None))
    assert caught.value is failure


@pytest.mark.parametrize("given", [None, {"layers": 12}], ids=["nothing", "a dictionary"])
def test_a_plugin_that_describes_nothing_is_unavailable(given: object) -> None:
    asked = hooks(sinder_backbone=lambda request, weights: given)  # noqa: ARG005
    with pytest.raises(UnavailableError, match=f"{BLAME}.* no Backbone"):
        open_backbone(asked, ModelRequest("toy"))


def test_a_buffer_that_no_file_holds_is_computed() -> None:
    module = load_module(toy())
    assert torch.equal(module.get_buffer("table"), torch.arange(100.0) + 7)
    assert torch.equal(module.get_parameter("mix.weight"), torch.full((N, N), 2.0))


def test_a_stored_buffer_is_read_and_built_without_memory() -> None:
    devices = []

    def build() -> nn.Module:
        devices.append(torch.empty(0).device.type)
        return Toy(stored_table=True)

    module = load_module(toy(toy_tensors() | {"table": torch.zeros(100)}, build))
    assert torch.equal(module.get_buffer("table"), torch.zeros(100))
    assert devices == ["meta"]


MISFITS = [
    (toy_tensors() | {"head": torch.ones(2)}, "1 unexpected: head"),
    ({"mix.weight": torch.ones(N, N)}, "1 missing: mix.bias"),
    (toy_tensors() | {"mix.bias": torch.ones(N + 1)}, "1 mis-shaped: mix.bias"),
]


@pytest.mark.parametrize(("tensors", "why"), MISFITS)
@pytest.mark.parametrize("load", [require_loadable, load_module])
def test_weights_that_are_not_the_modules_are_refused(
    load: Callable[[Backbone], nn.Module], tensors: dict[str, Tensor], why: str
) -> None:
    with pytest.raises(BadInputError, match=why):
        load(toy(tensors))


def test_an_export_is_as_strict_as_loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inputs, "hooks_for", lambda model: hooks())  # noqa: ARG005
    save_file(toy_tensors() | {"head": torch.ones(2)}, tmp_path / "more.safetensors")
    request = ModelRequest("toy", tmp_path / "more.safetensors")
    with pytest.raises(BadInputError, match="1 unexpected: head"):
        api.export(ExportRequest(request, ExportSettings("native")), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
