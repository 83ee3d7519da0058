"""What `sinder check-backbone` says of families of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sinder_cli import ModelRequest, api


@pytest.mark.parametrize("name", ["DINOv2 with registers", "DINOv3 gated", "MAE", "BEiT", "CLIP", "SigLIP 2"])
def test_it_conforms(name: str, saved: Callable[[str], Path]) -> None:
    result = api.check_backbone(ModelRequest(f"hf/{saved(name)}"))
    assert [check for check in result.checks if check.outcome != "passed"] == []
