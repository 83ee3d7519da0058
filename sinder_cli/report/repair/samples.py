"""The pictures of a repair's page: each image, and maps of its patch tokens before and after, on common scales."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sinder_cli.escaping import printable
from sinder_cli.report.drawing.pictures import data_uri, enlarged, pca_maps, picture
from sinder_cli.report.drawing.scales import FIDELITY, NormSpread, norm_scale
from sinder_cli.report.pages.panels import Panel
from sinder_cli.report.wording import Named, number

if TYPE_CHECKING:
    from sinder_cli.repair.guard import Snapshot
    from sinder_cli.repair.results import RepairResult
    from sinder_cli.report.drawing.pictures import Picture
    from sinder_cli.report.drawing.scales import ColourScale


class Sample(NamedTuple):
    """One image: its own numbers, the image itself, and its maps, each before and after, or of the original alone."""

    name: str
    numbers: list[Named]
    image: Panel
    maps: list[tuple[Panel, ...]]


class Samples(NamedTuple):
    """All images that are shown, and the scales of their maps; `blocks` are those whose norms are shown."""

    images: list[Sample]
    blocks: list[int]
    ratios: ColourScale
    fidelity: ColourScale


def samples_of(result: RepairResult) -> Samples:
    """The images with before and after; where no weight was changed, the original alone."""
    sides = {"before": result.before, "after": result.after}
    if not result.summary["changed_weights"]:
        sides = {"original": result.before}
    last = result.before.norms.shape[0] - 1
    blocks = sorted({result.summary["defects"]["before"]["worst_block"], last})
    ratios = _ratio_scale(list(sides.values()), blocks, len(result.pictures))
    pca = dict(zip(("before", "after"), pca_maps(result.before.samples, result.after.samples), strict=True))
    pca["original"] = pca["before"]
    images = []
    for index, path in enumerate(result.names):
        name = printable(Path(path).name)
        shown = picture(result.pictures[index], result.mean, result.std)
        rows = [_maps(name, side, of, index, blocks, ratios, pca[side][index]) for side, of in sides.items()]
        images.append(
            Sample(
                name,
                _numbers(list(sides.values()), index),
                Panel("Image", f"{name}, as the model saw it", data_uri(shown, "jpeg")),
                list(zip(*rows, strict=True)),
            )
        )
    return Samples(images, blocks, ratios, FIDELITY)


def _ratio_scale(sides: list[Snapshot], blocks: list[int], shown: int) -> ColourScale:
    """One scale of norms ÷ median for every map on the page."""
    scale = norm_scale(NormSpread.of(side.ratios[block, :shown]) for side in sides for block in blocks)
    return replace(scale, label="L2 norm ÷ median of the image")


def _maps(
    name: str, side: str, of: Snapshot, index: int, blocks: list[int], ratios: ColourScale, pca: Picture
) -> list[Panel]:
    panels = []
    for block in blocks:
        values = of.ratios[block, index]
        count, largest = int(of.outlying[block, index].sum()), number(values.max().item(), 3)
        alt = f"Norms ÷ median of {name} after block {block}, {side}: largest {largest}, {count:,} outlying"
        panels.append(_panel(f"Norm, block {block}", side, alt, ratios.paint(values)))
    panels.append(_panel("PCA", side, f"Principal components of the tokens of {name}, {side}, as colours", pca))
    cosines = of.to_inpainted[index]
    lowest = number(cosines.min().item(), 3)
    alt = f"Cosine of each token of {name} to the inpainted original, {side}: lowest {lowest}"
    panels.append(_panel("Fidelity", side, alt, FIDELITY.paint(cosines)))
    return panels


def _panel(what: str, side: str, alt: str, colours: Picture) -> Panel:
    return Panel(f"{what}, {side}", alt, data_uri(enlarged(colours)))


def _numbers(sides: list[Snapshot], index: int) -> list[Named]:
    """What one image shows, on each side."""
    tokens = [f"{int(side.outlying[:, index].any(dim=0).sum()):,}" for side in sides]
    largest = [number(side.ratios[:, index].max().item(), 3) for side in sides]
    rows = {"Outlying tokens": tokens, "Largest norm ÷ median": largest}
    heads = [side.cls_to_inpainted for side in sides]
    cosines = [f"{head[index].item():.4f}" for head in heads if head is not None]
    if cosines:
        rows["cls to the inpainted original"] = cosines
    return [Named(name, " → ".join(values)) for name, values in rows.items()]
