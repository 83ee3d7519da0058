"""Every field of the `config.json` of a transformers folder, and of its preprocessor, with every kind of value."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz_harness import VALUES, Case, damaged, mutated, places_in, require_ours
from hf_samples import SAMPLES

FAMILIES = ("DINOv2", "CLIP with its text", "DINOv3 gated", "BEiT")  # after the first, in `make fuzz`
BYTES = 60  # random cases a round


@pytest.fixture(scope="session", params=FAMILIES)
def folder(request: pytest.FixtureRequest, rounds: range, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as `save_pretrained` writes it."""
    if request.param != FAMILIES[0] and len(rounds) == 1:
        pytest.skip("in make fuzz")
    path = tmp_path_factory.mktemp("folder") / "model"
    SAMPLES[request.param].made().save_pretrained(path)
    sizes = {"height": 40, "width": 40}
    document = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": sizes, "crop_size": sizes}
    (path / "preprocessor_config.json").write_text(json.dumps(document | {"do_resize": True, "do_normalize": True}))
    return path


def described(folder: Path, name: str, content: bytes) -> Callable[[], object]:
    """What a case does: write the file, describe the model, and build its module without memory."""

    def run() -> object:
        from sinder_cli import ModelRequest, api
        from sinder_cli.backbone.opening import require_loadable

        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        try:
            return require_loadable(api.open_model(ModelRequest(f"hf/{folder}")))
        finally:
            (folder / name).write_bytes(whole)

    return run


def cases_of(folder: Path, name: str) -> list[Case]:
    document = json.loads((folder / name).read_text())
    return [
        Case(f"{'.'.join(map(str, place))}: {told}", described(folder, name, _text(mutated(document, place, value))))
        for place in places_in(document)
        for told, value in VALUES.items()
        if not (told == "missing" and isinstance(place[-1], int)) and place[0] != "text_config"
    ]


def _text(document: Any) -> bytes:
    return json.dumps(document).encode()


def test_a_configuration_with_any_field_of_any_kind(folder: Path) -> None:
    require_ours(cases_of(folder, "config.json"), least_refused=0.2)


def test_a_preprocessor_with_any_field_of_any_kind(folder: Path) -> None:
    require_ours(cases_of(folder, "preprocessor_config.json"), least_refused=0.1)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_configuration_with_other_bytes(name: str, folder: Path, rounds: range) -> None:
    content = (folder / name).read_bytes()
    cases = []
    for number in rounds:
        for index in range(BYTES // len(FAMILIES)):
            draw = random.Random(f"{name} {folder} {number} {index}")
            cases.append(Case(f"round {number}, {index}", described(folder, name, damaged(content, draw))))
    for told, text in (
        ("deep", b"[" * 100_000),
        ("digits", b"9" * 5000),
        ("a list", b"[]"),
        ("nothing", b""),
        ("null", b"null"),
    ):
        cases.append(Case(told, described(folder, name, text)))
    require_ours(cases)
