"""The picture of before and after that README shows: a real DINOv2 ViT-S/14 with a planted defect, and its repair.

python tests/real/picture.py       writes docs/images/before-after.png; fetches 200 MB once, takes two minutes
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS / "real")]
from plants import plant_named, planted  # noqa: E402
from real_files import photographs, real_weights  # noqa: E402

from sinder_cli import AnalyzeRequest, ModelRequest, RepairRequest, api  # noqa: E402

PICTURE = TESTS.parent / "docs" / "images" / "before-after.png"
SHOWN = "coffee"  # which scikit-image brings, free of rights


def main() -> None:
    """Plant, repair, and look at one photograph that was not trained on."""
    images = photographs()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state, _ = planted(real_weights(), plant_named("block 8"), images.training)
        weights = folder / "with a defect.pth"
        torch.save(state, weights)
        model, run = ModelRequest("dinov2_vits14", weights), folder / "repaired"
        api.repair(RepairRequest(model, images.training), run, progress=True)
        shown = [str(path) for path in images.held_out if path.stem.startswith(SHOWN)][:1]
        PICTURE.parent.mkdir(exist_ok=True)
        look = api.look([AnalyzeRequest(each, shown) for each in (model, str(run))], PICTURE)
    for answer in look.answers:
        print(answer.title, *answer.lines, sep="\n  ")


if __name__ == "__main__":
    main()
