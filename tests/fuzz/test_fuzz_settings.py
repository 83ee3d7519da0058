"""Settings as TOML, and the `config.json` of a run that is gone on with: every field with every kind of value."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz_harness import MISSING, VALUES, Case, damaged, mutated, places_in, require_ours

from sinder_cli import ModelRequest, api
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.defects.settings import DetectionSettings, read_settings
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.requests import RepairRequest

BYTES = 100  # random cases a round


def toml_of(value: Any) -> str:
    """A value as TOML has it; JSON's way, but for what JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml_of(part)}" for name, part in value.items()) + "}"
    return json.dumps(value)


def settled(kind: type[DetectionSettings], path: Path, text: bytes) -> Callable[[], object]:
    def run() -> object:
        path.write_bytes(text)
        return read_settings(kind, {}, path)

    return run


@pytest.mark.parametrize("kind", [RepairSettings, AnalyzeSettings])
def test_a_settings_file_with_any_field_of_any_kind(
    kind: type[DetectionSettings], tmp_path: Path, rounds: range
) -> None:
    path = tmp_path / "settings.toml"
    cases = [
        Case(f"{name}: {told}", settled(kind, path, f"{name} = {toml_of(value)}\n".encode()))
        for name in kind.model_fields
        for told, value in VALUES.items()
        if value is not MISSING
    ]
    values = {name: field.default for name, field in kind.model_fields.items() if field.default is not None}
    whole = "".join(f"{name} = {toml_of(value)}\n" for name, value in values.items()).encode()
    for number in rounds:
        for index in range(BYTES):
            draw = random.Random(f"toml {number} {index}")
            cases.append(Case(f"round {number}, {index}", settled(kind, path, damaged(whole, draw))))
    require_ours(cases, least_refused=0.5)


@pytest.fixture(scope="module")
def run(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repair of small weights that has ended, at once: nothing of it is defective."""
    folder = tmp_path_factory.mktemp("run") / "run"
    settings = RepairSettings(scan_images=1, max_steps=1, image_size=70, workers=0, eval_images=1)
    api.repair(RepairRequest(ModelRequest("dinov2_custom", whole), [], settings), folder)
    return folder


def resumed(run: Path, content: bytes) -> Callable[[], object]:
    """What `sinder repair RUN --resume` does with a run that has ended, and `sinder export RUN` before it writes."""

    def go_on() -> object:
        (run / "config.json").write_bytes(content)
        api.repair(RepairRequest(str(run), resume=True))
        return api.open_model(ModelRequest(str(run)))

    return go_on


def test_a_runs_config_with_any_field_of_any_kind(run: Path, tmp_path: Path, rounds: range) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    content = (run / "config.json").read_bytes()
    document = json.loads(content)
    cases = [
        Case(
            f"{'.'.join(map(str, place))}: {told}", resumed(copy, json.dumps(mutated(document, place, value)).encode())
        )
        for place in places_in(document)
        for told, value in VALUES.items()
        if not (value is MISSING and isinstance(place[-1], int))
    ]
    for number in rounds:
        for index in range(BYTES):
            draw = random.Random(f"config {number} {index}")
            cases.append(Case(f"round {number}, {index}", resumed(copy, damaged(content, draw))))
    for told, text in (("deep", b"[" * 100_000), ("digits", b"9" * 5000), ("a list", b"[]"), ("nothing", b"")):
        cases.append(Case(told, resumed(copy, text)))
    require_ours(cases, least_refused=0.5)
