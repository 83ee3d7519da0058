"""`sinder analyze` with its inpainted pass, against two bare forward passes and a loop that keeps all tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import skimage
from measuring import PYTHON, Cost, Row, bytes_below, in_turn, measured, sinder
from models import model_of
from PIL import Image

SIDE = 518
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg")
BARE = """
import sys, torch
from pathlib import Path
from sinder_cli import api
from sinder_cli.backbone.hooks import ModelRequest
from sinder_cli.backbone.opening import load_module
module = load_module(api.open_model(ModelRequest(sys.argv[1], Path(sys.argv[2]))))
image = torch.randn(1, 3, int(sys.argv[3]), int(sys.argv[3]))
with torch.no_grad():
    for _ in range(int(sys.argv[4])):
        module(image)
"""
KEEPING = """
import sys, torch
import numpy as np
from pathlib import Path
from PIL import Image
from sinder_cli import api
from sinder_cli.backbone.hooks import ModelRequest
from sinder_cli.backbone.opening import load_module
module = load_module(api.open_model(ModelRequest(sys.argv[1], Path(sys.argv[2]))))
kept = []
for block in module.blocks:
    block.register_forward_hook(lambda module, given, tokens: kept.append(tokens[0].clone()))
side = int(sys.argv[3])
with torch.no_grad():
    for path in sorted(Path(sys.argv[4]).iterdir()):
        image = Image.open(path).convert("RGB").resize((side, side))
        pixels = (torch.from_numpy(np.asarray(image).astype(np.float32)) / 255 - 0.45) / 0.22
        for _ in range(2):  # the second pass stands for the inpainted one
            module(pixels.permute(2, 0, 1)[None])
norms = torch.stack([tokens.norm(dim=-1).max() for tokens in kept])
"""


def rows(tiny: bool) -> Iterator[Row]:
    """Yield rows for time, for memory over many images, and for the page."""
    count, many = (2, 4) if tiny else (100, 2000)
    size = 98 if tiny else SIDE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, weights = model_of("S", folder, tiny)
        images = write_images(folder / "images", count)
        ours = sinder(*analyze(model, weights, images), "--image-size", size)
        bare = [PYTHON, "-c", BARE, model, str(weights), str(size), str(2 * count)]
        keeping = [PYTHON, "-c", KEEPING, model, str(weights), str(size), str(images)]
        cost, passes, kept = in_turn([ours, bare, keeping], 1)
        floor, met = passes.seconds or 1, (cost.seconds or 0) <= 1.1 * (passes.seconds or 0)
        work = f"`analyze`, {count} images of {size} px, with the inpainted pass"
        yield Row(
            work, cost, "a loop with hooks that keeps all tokens", kept, floor, "two bare passes", "≤ 1.1 floors", met
        )
        small, weights = model_of("S", folder, True)
        counts = max(2, many // 100), many
        linked = [link_images(folder / f"of {count}", images, count) for count in counts]
        of_few, of_many = (measured(sinder(*analyze(small, weights, each), "--image-size", 224)) for each in linked)
        met = (of_many.gigabytes or 0) <= 1.1 * (of_few.gigabytes or 1)
        work = f"`analyze`, a small model, {many:,} images of 224 px"
        yield Row(work, of_many, f"the same, {counts[0]:,} images", of_few, goal="constant memory", met=met)
        model, weights = model_of("S", folder, tiny)
        eight = link_images(folder / "eight", images, 8)
        command = (*analyze(model, weights, eight), "--image-size", size)
        without, with_page = in_turn([sinder(*command), sinder(*command, "--out", folder / "page")], 1)
        page, everything = (folder / "page" / "report.html").stat().st_size / 1e6, bytes_below(folder / "page") / 1e6
        seconds = (with_page.seconds or 0) - (without.seconds or 0)
        yield Row(
            "`report.html` of 8 images: what `--out` adds",
            Cost(seconds, with_page.gigabytes),
            goal="≤ 1.5 MB, ≤ 3 s",
            met=page <= 1.5 and seconds <= 3,
            note=f"{page:.2f} MB; {everything:.1f} MB with all files",
        )


def analyze(model: str, weights: Path, images: Path) -> list[str]:
    """The arguments of the command."""
    return ["analyze", model, "--weights", str(weights), "--data", str(images), "--format", "json"]


def write_images(folder: Path, count: int) -> Path:
    """Square crops of photographs, each another one."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    wide = [Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB") for name in PHOTOGRAPHS]
    for index in range(count):
        photograph = wide[index % len(wide)].resize((700, 700))
        left, top = generator.integers(0, 700 - SIDE, 2).tolist()
        photograph.crop((left, top, left + SIDE, top + SIDE)).save(folder / f"{index:04d}.jpg", quality=92)
    return folder


def link_images(folder: Path, images: Path, count: int) -> Path:
    """So many names for the same files."""
    folder.mkdir()
    files = sorted(images.iterdir())
    for index in range(count):
        (folder / f"{index:05d}.jpg").symlink_to(files[index % len(files)])
    return folder
