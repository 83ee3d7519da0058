"""The measure of a check, and the images that it looks at."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from sinder_cli import ModelRequest, api
from sinder_cli.errors import BadInputError, SinderError, TryAgainError, UnavailableError
from sinder_cli.events import silent
from sinder_cli.exporting import verifying
from sinder_cli.exporting.targets import ExportSettings, Plan
from sinder_cli.exporting.verifying import by_kind, relative_difference, square_images
from sinder_cli.images.sources import find_images


@pytest.fixture
def plan(plain: Path) -> Plan:
    return Plan(api.open_model(ModelRequest("dinov2_custom", plain)), ExportSettings("torchhub"), silent)


def test_a_difference_is_that_of_the_worst_token() -> None:
    ours = torch.tensor([[[300.0, 400.0], [3.0, 4.0]]])
    theirs = ours + torch.tensor([[[0.0, 0.5], [0.0, 0.01]]])
    assert relative_difference(theirs, ours) == pytest.approx(0.01 / 5, rel=1e-3)  # against 0.5 / 500


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_within_no_tolerance(value: float) -> None:
    theirs = torch.ones(1, 3, 2)
    theirs[0, 1, 0] = value
    assert not relative_difference(theirs, torch.ones(1, 3, 2)) <= 1e9


def test_tokens_are_told_apart_by_kind(plan: Plan) -> None:
    tokens = torch.arange(2 * 7 * 3).view(2, 7, 3).float()
    assert list(by_kind(plan.backbone, tokens)) == ["cls", "patch_tokens"]
    assert by_kind(plan.backbone, tokens)["patch_tokens"].shape == (2, 6, 3)


def test_named_images_are_looked_at_and_unreadable_ones_left_out(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    Image.new("RGB", (90, 90), (255, 0, 0)).save(tmp_path / "b.png")
    from dataclasses import replace

    named = replace(plan, images=find_images([str(tmp_path)], None, silent))
    assert square_images(named).shape == (1, 3, 84, 84)
    (tmp_path / "b.png").write_bytes(b"no image either")
    named = replace(plan, images=find_images([str(tmp_path)], None, silent))
    with pytest.raises(BadInputError, match="no image could be decoded; name others with --data"):
        square_images(named)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (signal.SIGABRT, UnavailableError, "it died of SIGABRT (Aborted): terminate called; reinstall timm, or"),
        (signal.SIGSEGV, UnavailableError, "it died of SIGSEGV (Segmentation fault)"),
        (signal.SIGKILL, TryAgainError, "it died of SIGKILL (Killed); run again, or give --no-verify"),
        (signal.SIGTERM, TryAgainError, "it died of SIGTERM (Terminated)"),
    ],
)
def test_a_check_that_dies_is_told_by_its_signal(
    number: signal.Signals,
    kind: type[SinderError],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = tmp_path / "check.py"
    script.write_text(
        f"import os, sys\nprint('terminate called', file=sys.stderr, flush=True)\nos.kill(os.getpid(), {int(number)})\n"
    )
    monkeypatch.setattr(verifying, "CHECKS", tmp_path)
    with pytest.raises(kind) as failure:
        verifying._their_features(tmp_path, script, [torch.zeros(1)], "a model", ["timm"])
    assert words in str(failure.value)
    assert "memory" not in str(failure.value)
