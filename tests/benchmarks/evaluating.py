"""`sinder evaluate dense` against plain loops over features that stay in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from analyze import SIDE, write_images
from measuring import PYTHON, Row, in_turn, sinder
from models import model_of

PLAIN = """
import sys, torch
import numpy as np
from pathlib import Path
from PIL import Image
from torch.nn.functional import avg_pool2d, normalize
from sinder_cli import api
from sinder_cli.backbone.hooks import ModelRequest
from sinder_cli.backbone.opening import load_module
backbone = api.open_model(ModelRequest(sys.argv[1], Path(sys.argv[2])))
module, side, patch = load_module(backbone), int(sys.argv[3]), 14
kept = []
norms = []
for block in module.blocks:
    block.register_forward_hook(lambda module, given, tokens: norms.append(tokens[0, 1:].norm(dim=-1)))
with torch.no_grad():
    for path in sorted(Path(sys.argv[4]).iterdir()):
        image = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        colours = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)[None]
        pixels = (colours - 0.45) / 0.22
        views = []
        for view in (pixels, pixels[..., 2 * patch:, 2 * patch:]):
            tokens, context = backbone.embed(module, view)
            for at in range(backbone.depth):
                tokens = backbone.run_block(module, at, tokens, context)
            grid = [length // patch for length in view.shape[2:]]
            views.append(tokens[0, backbone.prefix_tokens:].unflatten(0, grid))
        kept.append((*views, avg_pool2d(colours, patch)[0].permute(1, 2, 0)))
for whole, shifted, colours in kept:
    h, w, _ = whole.shape
    places, tokens = (normalize(each.flatten(0, 1) - each.mean(dim=(0, 1)), dim=1) for each in (whole, shifted))
    nearest = (tokens @ places.T).argmax(dim=1)
    found = 0
    for at, place in enumerate(nearest.tolist()):
        row, column = divmod(at, w - 2)
        found += abs(place // w - 2 - row) <= 1 and abs(place % w - 2 - column) <= 1
    alike, apart, centred = [], [], normalize(whole - whole.mean(dim=(0, 1)), dim=-1)
    pairs = [((i, j), (i + di, j + dj)) for i in range(h - 1) for j in range(w - 1) for di, dj in ((1, 0), (0, 1))]
    differences = [float((colours[a] - colours[b]).norm()) for a, b in pairs]
    low, high = np.quantile(differences, (0.25, 0.75))
    for (a, b), difference in zip(pairs, differences):
        (alike if difference <= low else apart if difference >= high else []).append(float(centred[a] @ centred[b]))
    values = torch.linalg.svdvals(centred.flatten(0, 1))
    unit = normalize(whole.flatten(0, 1), dim=1)
    drift = (unit @ unit.T - unit @ unit.T).square().mean().sqrt()
"""


def rows(tiny: bool) -> Iterator[Row]:
    """Yield the row: one side, the original, so that both run each view of each image once."""
    count, size = (3, 98) if tiny else (100, SIDE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, weights = model_of("S", folder, tiny)
        images = write_images(folder / "images", count)
        ours = sinder(
            "evaluate", model, "dense", "--weights", weights, "--data", images, "--image-size", size, "--no-placebos"
        )
        plain = [PYTHON, "-c", PLAIN, model, str(weights), str(size), str(images)]
        cost, theirs = in_turn([ours, plain], 1)
    met = (cost.seconds or 0) <= (theirs.seconds or 0)
    work = f"`evaluate dense --no-placebos`, {count} images of {size} px"
    yield Row(work, cost, "features in memory, plain loops", theirs, goal="no slower, constant memory", met=met)
