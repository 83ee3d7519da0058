"""The demo plugin is what it tells others to be."""

from __future__ import annotations

import pytest

from sinder_cli import ModelRequest, api


@pytest.mark.slow
@pytest.mark.parametrize("model", ["demo_vit", "demo_vit_clean"])
def test_the_demo_plugin_conforms(model: str) -> None:
    result = api.check_backbone(ModelRequest(model))
    assert {check.name: check.detail for check in result.checks if check.outcome != "passed"} == {}
    assert len(result.checks) == 13
