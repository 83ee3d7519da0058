"""An attention kernel that cannot run where the model does is refused before any work."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sinder_cli import ModelRequest, UnavailableError, api
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.backbone.device import attention_kernel, require_attention
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.requests import AnalyzeRequest, RepairRequest


@pytest.fixture
def cuda_and_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that seems to have both."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace())
    attention = scaled_dot_product_attention
    monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(memory_efficient_attention=attention))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))  # noqa: ARG005


@pytest.mark.usefixtures("cuda_and_xformers")
def test_xformers_is_refused_on_the_cpu_even_beside_cuda() -> None:
    require_attention("xformers", "cuda")
    require_attention("xformers", "cuda:1")
    for device in ("cpu", "mps"):
        with pytest.raises(UnavailableError, match=f"do not run on device '{device}'; use --attention sdpa"):
            require_attention("xformers", device)


@pytest.mark.usefixtures("cuda_and_xformers")
def test_xformers_without_its_cuda_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n  query")

    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", missing)
    with pytest.raises(UnavailableError, match=r"does not run with torch .*: No operator found.* inputs:; use --att"):
        attention_kernel("xformers")


@pytest.mark.parametrize("name", ["auto", "sdpa", "eager"])
def test_the_others_run_everywhere(name: str) -> None:
    for device in ("cpu", "cuda", "mps"):
        require_attention(name, device)


@pytest.mark.usefixtures("cuda_and_xformers")
@pytest.mark.parametrize("verb", ["analyze", "repair"])
def test_the_verbs_that_run_the_model_ask_with_their_device(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "open_model", lambda request: pytest.fail(f"{request.model} was opened"))
    request = ModelRequest("demo_vit", attention="xformers")
    run = {
        "analyze": lambda: api.analyze(AnalyzeRequest(request, (), AnalyzeSettings(device="cpu"))),
        "repair": lambda: api.repair(RepairRequest(request, (), RepairSettings(device="cpu")), tmp_path / "run"),
    }
    with pytest.raises(UnavailableError, match="do not run on device 'cpu'"):
        run[verb]()
