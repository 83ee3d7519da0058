"""Two ranks extract each a share of the features; the figures are those of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sinder_cli import ModelRequest, api
from sinder_cli.distributed import Ranks
from sinder_cli.evaluation import features as features_module
from sinder_cli.evaluation.settings import EvaluateSettings
from sinder_cli.images import sources
from sinder_cli.requests import EvaluateRequest, Process

pytestmark = pytest.mark.slow


def test_two_ranks_measure_what_one_does(
    forked: Any, small: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "MAPS_AT_A_TIME", 2)
    settings = EvaluateSettings(image_size=112, workers=0, resamples=100, limit=4)
    request = EvaluateRequest(ModelRequest("dinov2_custom", small), ["dense"], [photographs], settings)
    alone = api.evaluate(replace(request, features=tmp_path / "alone"))

    def evaluated(ranks: Ranks) -> Any:
        result = api.evaluate(replace(request, features=tmp_path / "shared"), process=Process(ranks=ranks))
        return None if result is None else result.evaluation.tasks[0].figures

    def evaluated_elsewhere(ranks: Ranks) -> Any:
        if ranks.rank == 1:  # a machine to which the images were copied has other times
            monkeypatch.setattr(sources, "_state", lambda path: (path.stat().st_size, 12345))
        return evaluated(ranks)

    first, second = forked(evaluated_elsewhere).answers(240)
    assert first == alone.evaluation.tasks[0].figures
    assert second is None
    parts = {folder.name: len(list(folder.iterdir())) for folder in (tmp_path / "shared").iterdir()}
    assert parts == {folder.name: len(list(folder.iterdir())) for folder in (tmp_path / "alone").iterdir()}
