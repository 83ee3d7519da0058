"""What `sinder check-backbone` says of kinds of timm's transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from timm_samples import NAMES

from sinder_cli import ModelRequest, api


@pytest.mark.parametrize("kind", ["packed", "gate_last", "scaling_mlp_bias", "things", "eva02_clip", "mixed_rope"])
def test_it_conforms(kind: str, stored: Callable[[str], Path]) -> None:
    result = api.check_backbone(ModelRequest(f"timm/{NAMES[kind]}", stored(kind)))
    assert [check for check in result.checks if check.outcome != "passed"] == []
