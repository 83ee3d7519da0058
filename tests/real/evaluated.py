"""`make evaluated`: `sinder evaluate` on the real DINOv2 ViT-S/14 with planted defects, before and after a repair.

    python tests/real/evaluated.py [--plants "block 8" …] [--anew]

The clean twin, which lacks nothing but the defect, is compared by the same calls: it is what a perfect repair would
reach. The paper's recipe, which ruins this model, shows which figures see that. Values are kept as JSON beside what was
fetched, and the part "Tasks" of EVIDENCE.md is written from all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import labelled
import plants
import torch
from evidence import DOCUMENT, SIZE, TASKS
from real_files import cache_folder, photographs, real_weights

from sinder_cli import EvaluateRequest, EvaluateSettings, ModelRequest, RepairRequest, RepairSettings, api

PLANTS = ("block 2", "block 6, common", "block 8", "block 8, strong", "block 10")
INDEPENDENT = ("dense", "knn", "linear")  # tasks whose images are no crops of the same photographs
RUINED = "block 8"  # is repaired by the paper's recipe, too
SHOWN = {  # of the many figures, those that stand in the table
    "dense": ("shift retrieval, marked", "shift retrieval, others", "boundary contrast", "cls to inpainted"),
    "knn": ("top-1, k=10",),
    "linear": ("top-1, cls + mean patch",),
    "segmentation": ("mIoU",),
    "clusters": ("mIoU",),
    "depth": ("RMSE",),
    "discovery": ("CorLoc",),
}


def data_of(folder: Path) -> list[str]:
    """Make the sets, and return where each task finds its own."""
    places = {
        "dense": photographs().held_out[0].parent,
        "knn": labelled.faces_set(folder / "faces"),
        "segmentation": labelled.segmentation_set(folder / "things"),
        "depth": labelled.depth_set(folder / "depth"),
        "discovery": labelled.discovery_set(folder / "boxes"),
    }
    places |= {"linear": places["knn"], "clusters": places["segmentation"]}
    return [f"{task}={place}" for task, place in places.items()]


def repaired(checkpoint: Path, run: Path, recipe: dict[str, Any]) -> Path:
    """Repair a model from the photographs to train on; return the weights that a run leaves."""
    settings = RepairSettings.model_validate({"image_size": SIZE} | recipe)
    paths = [str(path) for path in photographs().training]
    api.repair(RepairRequest(ModelRequest(plants.MODEL, weights=checkpoint), paths, settings, force=True), run)
    return run / "model.safetensors"


def measured(checkpoint: Path, other: Path, data: list[str], features: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return task → figure → side → value of a model, another, and the placebos."""
    request = EvaluateRequest(
        ModelRequest(plants.MODEL, weights=checkpoint),
        list(SHOWN),
        data,
        EvaluateSettings(resamples=500, workers=0),
        options={"depth": {"steps": 80, "batch": 4, "max_depth": 20, "rate": 0.005}, "segmentation": {"steps": 150}},
        compare=ModelRequest(plants.MODEL, weights=other),
        features=features,
    )
    evaluation = api.evaluate(request).evaluation
    return {
        task.task: {figure.name: {value.side: value.model_dump() for value in figure.values} for figure in task.figures}
        for task in evaluation.tasks
    }


def rows_of(name: str) -> list[dict[str, Any]]:
    """All rows of one plant: its sides, the twin, and the paper's repair of one plant."""
    pictures = photographs()
    calibration = [*pictures.training[::3], *pictures.held_out]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        state, twin = plants.planted(real_weights(), plants.plant_named(name), calibration, SIZE)
        for file, tensors in (("planted", state), ("twin", twin)):
            torch.save(tensors, folder / f"{file}.pth")
        planted, data, kept = folder / "planted.pth", data_of(folder), folder / "features"
        found = measured(planted, repaired(planted, folder / "run", {}), data, kept)
        rows = [_row(name, side, found) for side in ("original", "repaired", "inpainted", "smoothed", "blurred")]
        found = measured(planted, folder / "twin.pth", data, kept)
        rows.insert(2, _row(name, "repaired", found) | {"side": "clean twin"})
        if name == RUINED:
            paper = {"recipe": "paper", "keep": "last", "max_steps": 40}
            found = measured(planted, repaired(planted, folder / "paper", paper), data, kept)
            rows.append(_row(name, "repaired", found) | {"side": "repaired with the paper's values"})
        return rows


def _row(name: str, side: str, found: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    cells = {
        f"{task}: {figure}": found[task].get(figure, {}).get(side)
        for task, figures in SHOWN.items()
        for figure in figures
    }
    return {"plant": name, "side": side, "cells": cells}


def section(rows: list[dict[str, Any]]) -> str:
    """The part of EVIDENCE.md."""
    columns = [f"{task}: {figure}" for task, figures in SHOWN.items() for figure in figures]
    lines = [
        TASKS,
        "Written by `make evaluated` (`tests/real/evaluated.py`): `sinder evaluate` on planted models, before and after"
        " the default repair, beside the clean twin and the placebos. Data: the 12 photographs that no repair has seen"
        " (dense); 200 faces and others; 6 photographs with masks drawn by hand, 3 to train on, 3 to test, four"
        " crops each (segmentation, clusters, discovery's boxes); crops of a stereo pair (depth). The sets are small,"
        " and no number here compares with a published one. ≈ marks differences to the original within noise, where"
        " images are independent: not among crops of the same few photographs. Two columns say nothing here: CorLoc has"
        " six images, and linear probes reach 100 % on any side. Depth knows one scene.",
        "",
        f"Machine: {platform.machine()}, torch {torch.__version__}.",
        "",
        f"| plant | side | {' | '.join(columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for row in rows:
        cells = [_cell(row["cells"].get(column), column.partition(":")[0] in INDEPENDENT) for column in columns]
        lines.append(f"| {row['plant']} | {row['side']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: dict[str, Any] | None, independent: bool) -> str:
    if value is None or value["value"] is None:
        return "–"
    number = f"{value['value']:.4f}" if abs(value["value"]) < 10 else f"{value['value']:.2f}"
    difference = value["to_original"]
    return f"{number} ≈" if independent and difference and difference["standing"] == "within noise" else number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plants", nargs="*", default=list(PLANTS))
    parser.add_argument("--anew", action="store_true")
    arguments = parser.parse_args()
    kept = cache_folder() / "evaluated.json"
    stored = json.loads(kept.read_text()) if kept.is_file() else []
    if arguments.anew:
        stored = [row for row in stored if row["plant"] not in arguments.plants]
    for name in arguments.plants:
        if any(row["plant"] == name for row in stored):
            continue
        stored += rows_of(name)
        stored.sort(key=lambda row: PLANTS.index(row["plant"]))
        kept.write_text(json.dumps(stored))
        before = DOCUMENT.read_text(encoding="utf-8").partition(TASKS)[0].rstrip()
        DOCUMENT.write_text(f"{before}\n\n{section(stored)}", encoding="utf-8")


if __name__ == "__main__":
    main()
