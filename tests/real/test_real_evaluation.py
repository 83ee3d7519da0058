"""`sinder evaluate` on the real DINOv2 ViT-S/14: labelled sets of real photographs, and a planted defect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import labelled
import numpy as np
import plants
import pytest

from sinder_cli import EvaluateRequest, EvaluateSettings, ModelRequest, api
from sinder_cli.evaluation.records import TaskRecord

SIZE = 266  # pixels, as the plant has it
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def evaluated(weights: Path, task: str, data: Path, compare: Path | None = None, **options: Any) -> TaskRecord:
    """One task on a checkpoint, without placebos unless it is compared."""
    size = options.pop("image_size", None)
    settings = EvaluateSettings(image_size=size, workers=0, resamples=200, no_placebos=compare is None)
    model, other = (None if each is None else ModelRequest(plants.MODEL, weights=each) for each in (weights, compare))
    assert model is not None
    request = EvaluateRequest(model, [task], [data], settings, options={task: options}, compare=other)
    return api.evaluate(request).evaluation.tasks[0]


def value(record: TaskRecord, figure: str, side: Any = "original") -> float:
    found = next(each for each in record.figures if each.name == figure).of(side)
    assert found is not None
    assert found.value is not None
    return found.value


def test_faces_are_told_from_others(real: tuple[Path, Any], tmp_path: Path) -> None:
    record = evaluated(real[0], "knn", labelled.faces_set(tmp_path), k="5", image_size=112)
    assert record.trained_on == record.images == 100
    assert value(record, "top-1, k=5") > 90


def test_things_are_told_from_the_background(real: tuple[Path, Any], tmp_path: Path) -> None:
    data = labelled.segmentation_set(tmp_path)
    record = evaluated(real[0], "segmentation", data, image_size=SIZE, steps=60)
    shares = [np.asarray(thing.mask()).mean() for thing in labelled.THINGS if thing.split == "val"]
    assert value(record, "mIoU") > 100 * max(np.mean(shares), 1 - np.mean(shares)) / 2 + 15  # of one class alone


def test_depth_of_a_real_stereo_pair_is_learnt(real: tuple[Path, Any], tmp_path: Path) -> None:
    data = labelled.depth_set(tmp_path)
    maps = [np.load(path) for path in sorted((data / "depth" / "val").iterdir())]
    constant = np.mean([np.sqrt(np.mean((each[each > 0] - each[each > 0].mean()) ** 2)) for each in maps])
    options = {"image_size": 252, "steps": 80, "batch": 4, "rate": 0.005, "max_depth": 20, "flip": False}
    assert value(evaluated(real[0], "depth", data, **options), "RMSE") < constant


def test_a_box_is_found_around_half_of_the_things(real: tuple[Path, Any], tmp_path: Path) -> None:
    record = evaluated(real[0], "discovery", labelled.discovery_set(tmp_path), image_size=SIZE)
    assert record.images == len(labelled.THINGS)
    assert value(record, "CorLoc") >= 50


def test_the_clean_twin_is_better_by_its_marked_tokens(real: tuple[Path, Any], twins: tuple[Path, Path]) -> None:
    record = evaluated(twins[0], "dense", real[1].held_out[0].parent, twins[1], image_size=SIZE)
    marked = next(each for each in record.figures if each.name == "shift retrieval, marked").of("repaired")
    assert marked is not None
    assert marked.to_original is not None
    assert marked.to_original.standing == "better"
    assert value(record, "outlying tokens") > 0.3 > value(record, "outlying tokens", "repaired")
    assert value(record, "good to inpainted", "repaired") > 0.99
    assert value(record, "marked to inpainted", "repaired") > value(record, "marked to inpainted")
