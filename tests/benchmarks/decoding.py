"""Photographs of 12 megapixels to 518 px: our loader with two processes against Pillow in one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import skimage
from measuring import PYTHON, Cost, Row, measured
from PIL import Image

SIDE = 518
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
OURS = """
import sys
from pathlib import Path
from sinder_cli.images.loading import load_in_order
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.sources import ImageFiles
files = ImageFiles(tuple(sorted(Path(sys.argv[1]).iterdir())))
way = Preprocessing(int(sys.argv[2]), (0.5,) * 3, (0.5,) * 3, "short", 14)
assert all(image.pixels is not None for image in load_in_order(files, way, range(len(files)), workers=2))
"""
THEIRS = """
import sys
import numpy as np, torch
from pathlib import Path
from PIL import Image
side = int(sys.argv[2])
for path in sorted(Path(sys.argv[1]).iterdir()):
    image = Image.open(path).convert("RGB")
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    torch.from_numpy((np.asarray(image).astype(np.float32) / 255 - 0.5) / 0.5).permute(2, 0, 1).contiguous()
"""


def write_photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Large photographs with grain, as JPEG; each file another name of one of a few."""
    generator = np.random.default_rng(0)
    distinct = []
    for name in PHOTOGRAPHS[: min(count, len(PHOTOGRAPHS))]:
        image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
        pixels = (pixels + generator.normal(0, 4, (*pixels.shape[:2], 1))).clip(0, 255).astype(np.uint8)
        distinct.append(folder.parent / f"{name}.jpg")
        Image.fromarray(pixels).save(distinct[-1], quality=92)
    for index in range(count):
        (folder / f"{index:04}.jpg").symlink_to(distinct[index % len(distinct)])


def rows(tiny: bool) -> Iterator[Row]:
    """Yield the row; loading Python and torch is subtracted from both sides."""
    count, size = (4, (800, 600)) if tiny else (500, (4000, 3000))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "photographs")
        folder.mkdir()
        write_photographs(folder, count, size)
        began = time.perf_counter()
        measured([PYTHON, "-c", "import numpy, torch, PIL.Image, sinder_cli.images.loading"])
        start = time.perf_counter() - began
        ours, theirs = (measured([PYTHON, "-c", code, str(folder), str(SIDE)]) for code in (OURS, THEIRS))
    ours, theirs = (Cost(max((each.seconds or 0) - start, 1e-3), each.gigabytes) for each in (ours, theirs))
    met = (theirs.seconds or 0) >= 3 * (ours.seconds or 0)
    work = f"decode {count} photographs of {size[0]} × {size[1]} to {SIDE} px"
    yield Row(work, ours, "Pillow, one process", theirs, goal="≥ 3 × faster", met=met, note="without the start")
