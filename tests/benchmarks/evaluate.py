"""`sinder evaluate` on many images of 518 px: time and memory of the features, and of each task.

    python tests/benchmarks/evaluate.py [--images 100 1000] [--tasks dense knn …]

ViT-S with random weights, in the official format; crops of scikit-image's photographs, saved as JPEG. Labels, depth and
boxes are made up: they cost what true ones cost. One side, the original, so that the times are those of one model. A
process for each size runs all its tasks with one step of training, and so extracts the features that they need; then
each task runs alone on the features that are there, with its usual number of steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from analyze import SIDE, write_images
from measuring import bytes_below, measured, sinder
from models import SIZES, write_checkpoint
from PIL import Image
from sinder_plugins.dinov2.config import OFFICIAL

GROUPS = {SIDE: ("dense", "segmentation", "clusters", "depth", "discovery"), 224: ("knn", "linear")}  # tasks by size
TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)
MODEL = SIZES["S"]
TRAINED = ("segmentation", "depth")
CLASSES = 5


def write_sets(folder: Path, count: int) -> dict[str, Path]:
    """Sets of the same images for every task: class folders, label images, depth maps, boxes."""
    folder.mkdir()
    files = sorted(write_images(folder / "images", count).iterdir())
    (folder / "labels").mkdir()
    (folder / "depth").mkdir()
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    boxes = []
    for index, path in enumerate(files):
        place = folder / "classes" / str(index % CLASSES) / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
        grey = np.asarray(Image.open(path).convert("L"))
        Image.fromarray(np.minimum(grey // 52, CLASSES - 1)).save(folder / "labels" / f"{path.stem}.png")
        depth = 1 + (rows + (1 + index % 7) * columns) / (8 * SIDE)
        Image.fromarray((1000 * depth).astype(np.uint16)).save(folder / "depth" / f"{path.stem}.png")
        boxes.append({"id": index, "image_id": index, "category_id": 1, "bbox": [100, 120, 250, 200], "iscrowd": 0})
    images = [{"id": at, "file_name": path.name, "width": SIDE, "height": SIDE} for at, path in enumerate(files)]
    document = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "annotations.json").write_text(json.dumps(document))
    places = dict.fromkeys(TASKS, folder)
    return places | {"dense": folder / "images", "knn": folder / "classes", "linear": folder / "classes"}


def evaluate(folder: Path, places: dict[str, Path], tasks: list[str], size: int, steps: int | None = None) -> list[str]:
    """The command line."""
    named = [f"--data={task}={places[task]}" for task in tasks]
    chosen = {"depth.scale": 1000} | ({} if steps is None else {f"{task}.steps": steps for task in TRAINED})
    options = [f"--set={name}={value}" for name, value in chosen.items() if name.partition(".")[0] in tasks]
    kept = [f"--features={folder / 'features'}", f"--out={folder / 'out'}", "--force"]
    given = [
        *named,
        *options,
        *kept,
        f"--weights={folder / 'weights.safetensors'}",
        "--no-placebos",
        f"--image-size={size}",
    ]
    return sinder("evaluate", MODEL, *tasks, *given)


def main() -> None:
    """Measure all tasks together and each alone, for every number of images, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--steps", type=int, help="of training; as many as the tasks take usually, if not given")
    options = parser.parse_args()
    print(f"| images, {MODEL} | s | peak resident memory, GB |\n|---|---:|---:|", flush=True)
    for count in options.images:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_checkpoint(folder / "weights.safetensors", OFFICIAL[MODEL])
            places = write_sets(folder / "set", count)
            for size, of_size in GROUPS.items():
                tasks = [task for task in of_size if task in options.tasks]
                if tasks:
                    measure(folder, places, tasks, size, options.steps, f"{count:,}")


def measure(folder: Path, places: dict[str, Path], tasks: list[str], size: int, steps: int | None, count: str) -> None:
    """Print a line for the features of some tasks at one size, and a line for each task."""
    before = bytes_below(folder / "features")
    cost = measured(evaluate(folder, places, tasks, size, steps=1))
    document = json.loads((folder / "out" / "evaluation.json").read_text())
    seconds = (cost.seconds or 0) - sum(task["seconds"] for task in document["tasks"])
    gigabytes = (bytes_below(folder / "features") - before) / 1e9
    print(
        f"| {count} at {size} px: features, {gigabytes:.2f} GB on disk | {seconds:.0f} | {cost.gigabytes:.2f} |",
        flush=True,
    )
    for task in tasks:
        cost = measured(evaluate(folder, places, [task], size, steps))
        print(f"| {count} at {size} px: {task} | {cost.seconds:.0f} | {cost.gigabytes:.2f} |", flush=True)


if __name__ == "__main__":
    main()
