"""`make evidence`: recipe × plant on the real DINOv2 ViT-S/14, judged on photographs that no repair has seen.

    python tests/real/evidence.py                      everything that EVIDENCE.md does not have yet
    python tests/real/evidence.py --plants "block 8"   some plants; --ways sinder: some ways; --anew: those again

Rows are kept as JSON beside what was fetched (`real_files.cache_folder`), and EVIDENCE.md is written from all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import plants
import torch
from real_files import cache_folder, photographs, real_weights
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sinder_cli import Backbone, ModelRequest, api
from sinder_cli.defects.inpainting import inpainted
from sinder_cli.defects.tokens import last_tokens, residual_stream
from sinder_cli.images.decoding import decode
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.requests import RepairRequest

SIZE = 518
FACTOR = 3.0  # × the median patch norm of the image
HEALTHY = "none: as it is"
WAYS: dict[str, tuple[int | None, dict[str, Any]]] = {  # photographs to train on (None: all), and settings
    "sinder": (None, {}),
    "sinder, 32 photographs": (32, {}),
    "sinder, 16 photographs": (16, {}),
    "sinder, 8 photographs": (8, {}),
    "sinder, 4 photographs": (4, {}),
    "sinder, drawn pictures alone": (0, {}),
    "polyak": (None, {"recipe": "polyak", "max_steps": 60}),
    "paper": (None, {"recipe": "paper", "keep": "last", "max_steps": 40}),
}
DOCUMENT = Path(__file__).parent / "EVIDENCE.md"
TASKS = "## Tasks\n"  # begins the part that `evaluated.py` writes


@dataclass(frozen=True)
class Row:
    """One model on the held-out photographs: cosines of the last block's tokens to the twin's, and outliers."""

    plant: str
    what: str  # a way, `before`, or `inpainted original`
    outliers: float  # % of the patch tokens above 3 × the median at any block
    outliers_last: float  # at the last block
    cls: float
    good: float  # mean over the patches that the planted model never marks
    marked: float | None
    inpainted: tuple[float, float]  # cls and good to the inpainted original
    original: tuple[float, float]  # and to the planted model as it is
    verdict: str = ""
    steps: int | None = None
    seconds: float | None = None


def stream(backbone: Any, module: Any, image: Tensor) -> Tensor:
    """The residual stream of one image, `[blocks, T, N]`."""
    return torch.cat(list(residual_stream(backbone, module, image[None])))


def some(paths: Sequence[Path], count: int | None) -> list[Path]:
    """So many of the photographs, spread over all of them."""
    wanted = len(paths) if count is None else count
    return [paths[index * len(paths) // wanted] for index in range(wanted)]


@torch.no_grad()
def judged(
    plant: str, what: str, model: Any, references: Sequence[Sequence[Tensor]], marks: Sequence[Tensor], images: Any
) -> Row:
    """A model `(backbone, module)` on one image at a time.

    `references` are the last tokens `[T, N]` of each image: the twin's, the inpainted original's, the original's.
    """
    cls, good, marked, ever, last, count = [], [], [], 0, 0, 0
    others: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for index, (image, reference, mark) in enumerate(zip(images, references[0], marks, strict=True)):
        tokens = stream(*model, image)
        norms = tokens[:, 1:].norm(dim=-1)
        out = norms > FACTOR * norms.median(dim=1, keepdim=True).values
        ever, last, count = ever + int(out.any(dim=0).sum()), last + int(out[-1].sum()), count + out.shape[1]
        cosine = cosine_similarity(tokens[-1], reference, dim=-1)
        cls.append(cosine[0])
        good.append(cosine[1:][~mark])
        marked.append(cosine[1:][mark])
        for found, other in zip(others, references[1:], strict=True):
            to_other = cosine_similarity(tokens[-1], other[index], dim=-1)
            found.append((to_other[0], to_other[1:][~mark]))
    spoilt = torch.cat(marked)
    return Row(
        plant,
        what,
        100 * ever / count,
        100 * last / count,
        torch.stack(cls).mean().item(),
        torch.cat(good).mean().item(),
        spoilt.mean().item() if len(spoilt) else None,
        *(
            (
                torch.stack([head for head, _ in found]).mean().item(),
                torch.cat([each for _, each in found]).mean().item(),
            )
            for found in others
        ),
    )


@torch.no_grad()
def marked(backbone: Backbone, module: Any, images: Sequence[Tensor]) -> tuple[Backbone, list[Tensor], list[Tensor]]:
    """The inpainted original; what it ever replaces in each image, bool `[patches]`; and its last tokens `[T, N]`."""
    seen: list[Tensor] = []
    yardstick = inpainted(backbone, FACTOR, lambda _, mask: seen.append(mask))
    marks, last = [], []
    for image in images:
        seen.clear()
        last.append(last_tokens(yardstick, module, image[None])[0])
        marks.append(torch.stack(seen).flatten(2).any(dim=0)[0])
    return yardstick, marks, last


@torch.no_grad()
def rows_of(name: str, ways: Sequence[str], folder: Path) -> list[Row]:
    """All rows of one plant."""
    pictures = photographs()
    weights = real_weights()
    if name == HEALTHY:
        state = twin_state = torch.load(weights, weights_only=True)
    else:
        calibration = [*pictures.training[::3], *pictures.held_out]
        state, twin_state = plants.planted(weights, plants.plant_named(name), calibration, SIZE)
    checkpoint = folder / "planted.pth"
    torch.save(state, checkpoint)
    backbone, module = plants.opened(checkpoint)
    preprocess = api.preprocessing(backbone, SIZE)
    images = [preprocess(decode(path)) for path in pictures.held_out]
    _, twin_module = plants.opened(weights)
    twin_module.load_state_dict(twin_state)
    twin = [last_tokens(backbone, twin_module, image[None])[0] for image in images]
    yardstick, marks, without = marked(backbone, module, images)
    references = (twin, without, [last_tokens(backbone, module, image[None])[0] for image in images])
    found = [
        judged(name, "before", (backbone, module), references, marks, images),
        judged(name, "inpainted original", (yardstick, module), references, marks, images),
    ]
    for way in ways:
        count, chosen = WAYS[way]
        run = folder / "run"
        began = time.monotonic()
        with torch.enable_grad():
            result = api.repair(
                RepairRequest(
                    ModelRequest(plants.MODEL, weights=checkpoint),
                    [str(path) for path in some(pictures.training, count)],
                    RepairSettings.model_validate(chosen | {"image_size": SIZE}),
                    force=True,
                ),
                run,
            )
        seconds = time.monotonic() - began
        assert result is not None
        assert name != HEALTHY or not way.startswith("sinder") or not result.summary["changed_weights"]
        repaired = plants.opened(run / "model.safetensors")
        row = judged(name, way, repaired, references, marks, images)
        numbers = {"verdict": result.summary["verdict"], "steps": result.summary["steps"], "seconds": seconds}
        found.append(Row(**(asdict(row) | numbers)))
        shutil.rmtree(run)
    return found


def document(rows: Sequence[Row]) -> str:
    """EVIDENCE.md."""
    lines = [
        "# Evidence: repairs of a real model",
        "",
        "Written by `make evidence` (`tests/real/evidence.py`): the real DINOv2 ViT-S/14 with defects planted in it"
        " (`tests/real/plants.py`), repaired on 38 crops of photographs at 518 px with the recipe's defaults, judged on"
        " 12 other photographs; with fewer than 16, pictures are drawn to make up for it. Cosines are"
        " those of the last block's tokens, before the final norm, to the twin that"
        " lacks nothing but the defect (two columns: to others); *good* patches are never above 3 × the median in the"
        " planted model, *marked*"
        " ones are at some block. Outliers are patch tokens above 3 × the median norm of their image, in % of all. The"
        " paper's recipe is stopped after 40 steps and keeps its last state (`--keep last`).",
        "",
        f"Machine: {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}. Seconds are"
        " whole calls of `api.repair`, on a machine that may have been busy.",
        "",
        "| plant | row | verdict | outliers at any block, % | at the last, % | cls | good | marked | cls, good to the"
        " inpainted original | to the original | steps | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        marked = "–" if row.marked is None else f"{row.marked:.4f}"
        steps, seconds = ("", "") if row.steps is None else (str(row.steps), f"{row.seconds:.0f}")
        lines.append(
            f"| {row.plant} | {row.what} | {row.verdict} | {row.outliers:.3f} | {row.outliers_last:.3f} | {row.cls:.4f}"
            f" | {row.good:.4f} | {marked} | {_pair(row.inpainted)} | {_pair(row.original)} | {steps} | {seconds} |"
        )
    return "\n".join(lines) + "\n"


def _pair(cosines: tuple[float, float]) -> str:
    return ", ".join(f"{value:.4f}" for value in cosines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [HEALTHY, *(plant.name for plant in plants.PLANTS)]
    parser.add_argument("--plants", nargs="*", default=names)
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--anew", action="store_true")
    arguments = parser.parse_args()
    kept = cache_folder() / "evidence-2.json"  # 2: the version of its rows
    stored = [Row(**each) for each in json.loads(kept.read_text())] if kept.is_file() else []
    if arguments.anew:
        again = ("before", "inpainted original", *arguments.ways)
        stored = [row for row in stored if row.plant not in arguments.plants or row.what not in again]
    for name in arguments.plants:
        done = {row.what for row in stored if row.plant == name}
        ways = [way for way in arguments.ways if way not in done]
        if not ways:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for row in rows_of(name, ways, Path(folder)):
                if row.what not in done:
                    print(row, flush=True)
                    stored.append(row)
        order = ["before", "inpainted original", *WAYS]
        stored.sort(key=lambda row: (names.index(row.plant), order.index(row.what)))
        kept.write_text(json.dumps([asdict(row) for row in stored]))
        _, begins, rest = DOCUMENT.read_text(encoding="utf-8").partition(TASKS)
        DOCUMENT.write_text(document(stored) + (f"\n{begins}{rest}" if begins else ""), encoding="utf-8")


if __name__ == "__main__":
    main()
