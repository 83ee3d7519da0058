"""Small models in the official format, and a run directory of a short repair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from export_models import GATED, PLAIN, random_tensors
from safetensors.torch import save_file

from sinder_cli import ModelRequest, api
from sinder_cli.events import Event, Warned
from sinder_cli.exporting.drafts import ExportResult
from sinder_cli.exporting.targets import ExportSettings, TargetName
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.requests import ExportRequest, RepairRequest


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As the processes that the tests start."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `dinov2_custom`."""
    path = tmp_path_factory.mktemp("plain") / "plain.safetensors"
    save_file(random_tensors(PLAIN), path)
    return path


@pytest.fixture(scope="session")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with SwiGLU and registers, as a torch file."""
    path = tmp_path_factory.mktemp("gated") / "gated.pth"
    torch.save(random_tensors(GATED), path)
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of the demo backbone, whose weights its plugin can make again."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("repair") / "run"
    settings = RepairSettings(recipe="paper", keep="last", max_steps=10, eval_images=2, lr=0.05, min_gap=1.1)
    assert api.repair(RepairRequest(ModelRequest("demo_vit"), [], settings), folder) is not None
    return folder


Export = Callable[..., ExportResult]


@pytest.fixture
def events() -> list[Event]:
    """What an export told."""
    return []


@pytest.fixture
def warnings(events: list[Event]) -> Callable[[], list[str]]:
    return lambda: [event.text for event in events if isinstance(event, Warned)]


@pytest.fixture
def export(events: list[Event]) -> Export:
    """Export a model, a run or weights, with the settings as options."""

    def exported(
        source: str | Path,
        to: TargetName,
        out: Path,
        weights: Path | None = None,
        adapter: Path | None = None,
        data: tuple[str, ...] = (),
        **options: object,
    ) -> ExportResult:
        request = ModelRequest(str(source), weights, emit=events.append, adapter=adapter)
        return api.export(ExportRequest(request, ExportSettings(to, **options), data), out)  # type: ignore[arg-type]

    return exported
