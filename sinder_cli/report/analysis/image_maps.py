"""The maps of one image as pictures, used for both the figure files and the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sinder_cli.escaping import printable
from sinder_cli.report.analysis.facts import sides_of
from sinder_cli.report.drawing.pictures import LabelledPicture, clip_range, pca_map, picture, reduced, resized
from sinder_cli.report.drawing.scales import ANGLES, ColourScale, attention_scale, cosine_scale, norm_scale
from sinder_cli.report.formatting import counted, number

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.analysis.per_image import InpaintedMaps, Portrait, PortraitSide, TargetMaps
    from sinder_cli.analysis.records import Analysis
    from sinder_cli.report.drawing.pictures import Picture, Span

MARK = (255, 176, 0)  # a marked patch: amber, which colour-blind readers can distinguish from grey
DIMMED = 0.45  # brightness of the photograph under it
INPAINTED = "cosine to the inpainted original, no unit"


class DrawnImage(NamedTuple):
    """An image, reduced to the size at which it is shown, and its maps."""

    name: str
    photograph: Picture
    sides: tuple[PortraitSide, ...]
    patch_cosine: Tensor | None


@dataclass(frozen=True)
class SideMaps:
    """One backbone's maps of one image; `block` is its first defective block, or None."""

    pca: LabelledPicture
    norm: LabelledPicture
    attention: LabelledPicture | None
    angles: tuple[LabelledPicture, ...]
    masks: tuple[LabelledPicture, ...]
    targets: tuple[LabelledPicture, ...]
    block: int | None
    outlying: int
    largest: float  # norm of a finite token
    broken: int  # tokens that are not finite
    inpainted: LabelledPicture | None = None  # cosine to the inpainted original
    somewhere: LabelledPicture | None = None  # tokens that are outlying in some block
    inpainted_words: str = ""


@dataclass(frozen=True)
class ImageMaps:
    """One image and its maps, as pictures."""

    name: str
    photograph: LabelledPicture
    sides: tuple[SideMaps, ...]
    cosine: LabelledPicture | None


@dataclass(frozen=True)
class Scales:
    """Colour scales that are the same for all images and both sides."""

    pca: Span
    norms: tuple[ColourScale, ...]  # by block
    cosine: ColourScale
    inpainted: ColourScale | None = None  # cosines to the inpainted original


def drawn_image(portrait: Portrait, mean: tuple[float, float, float], std: tuple[float, float, float]) -> DrawnImage:
    """Return the portrait with its image as a photograph of at most 512 pixels per side."""
    photograph = reduced(picture(portrait.image, mean, std))
    return DrawnImage(printable(Path(portrait.name).name), photograph, portrait.sides, portrait.patch_cosine)


def shared_scales(analysis: Analysis, first: Iterable[DrawnImage]) -> Scales:
    """Return scales from the statistics of all images; for principal components, from the first images' maps."""
    pairs = analysis.comparison or ()
    return Scales(
        pca=clip_range([side.components[side.in_basis] for each in first for side in each.sides]),
        norms=tuple(
            norm_scale(block.patch_norm for block in blocks)
            for blocks in zip(*(side.blocks for side in sides_of(analysis)), strict=True)
        ),
        cosine=cosine_scale(pairs[-1].patch_cosine if pairs else None),
        inpainted=_inpainted_scale(analysis),
    )


def _inpainted_scale(analysis: Analysis) -> ColourScale | None:
    """Return one scale for both sides, down to the lower of the 1st percentiles of good and of marked tokens."""
    found = [side.inpainting for side in sides_of(analysis) if side.inpainting]
    known = [each for one in found for each in (one.good_cosine, one.marked_cosine) if each is not None]
    if not known:
        return None
    return replace(cosine_scale(min(known, key=lambda each: each.p01)), label=INPAINTED)


def paint_image(image: DrawnImage, scales: Scales, labels: Sequence[str]) -> ImageMaps:
    """Paint all maps of one image.

    `labels` names the sides of a comparison; for a single side it is one empty text.
    """
    description = f"Cosine between both sides' tokens of {image.name}"
    cosine = image.patch_cosine
    return ImageMaps(
        name=image.name,
        photograph=LabelledPicture("Image", f"{image.name}, as the model saw it", image.photograph),
        sides=tuple(
            _side_maps(image, side, scales, f"{image.name}, {label}" if label else image.name)
            for side, label in zip(image.sides, labels, strict=True)
        ),
        cosine=None if cosine is None else LabelledPicture("Cosine", description, scales.cosine.paint(cosine)),
    )


def _side_maps(image: DrawnImage, side: PortraitSide, scales: Scales, name: str) -> SideMaps:
    outlying, finite = int(side.outlying.sum()), side.norms[side.norms.isfinite()]
    largest = finite.max().item() if len(finite) else math.nan
    description = f"Token norms of {name}: largest {number(largest)}, outlying {outlying:,}"
    attention, inpainted = side.attention, side.inpainted
    return SideMaps(
        pca=LabelledPicture(
            "PCA",
            f"Principal components of the tokens of {name}, as colours",
            pca_map(side.components, scales.pca),
        ),
        norm=LabelledPicture("Norm", description, scales.norms[-1].paint(side.norms)),
        attention=None
        if attention is None
        else LabelledPicture(
            "Attention", f"Attention of cls to the patches of {name}", attention_scale(attention).paint(attention)
        ),
        angles=tuple(
            LabelledPicture(f"block {block}", f"Angles to ν at block {block}, {name}", ANGLES.paint(angles))
            for block, angles in side.angles.items()
        ),
        masks=tuple(_mask_picture(image, block, side.masks.get(block), name) for block in side.angles),
        targets=_target_pictures(side.targets, scales, name) if side.targets else (),
        block=side.targets.block if side.targets else None,
        outlying=outlying,
        largest=largest,
        broken=side.norms.numel() - len(finite),
        inpainted=None
        if inpainted is None or scales.inpainted is None
        else LabelledPicture(
            "Cosine", f"Cosines to the inpainted original, {name}", scales.inpainted.paint(inpainted.cosine)
        ),
        somewhere=None if inpainted is None else _somewhere(image, inpainted, name),
        inpainted_words="" if inpainted is None else _inpainted_words(inpainted),
    )


def _somewhere(image: DrawnImage, inpainted: InpaintedMaps, name: str) -> LabelledPicture:
    description = f"{counted(int(inpainted.marked.sum()), 'patch')} outlying in some block, {name}"
    return LabelledPicture("outlying in some block", description, mask_map(image.photograph, inpainted.marked))


def _inpainted_words(inpainted: InpaintedMaps) -> str:
    """Return the cosines of this image in words."""
    good, marked = inpainted.cosine[~inpainted.marked], inpainted.cosine[inpainted.marked]
    parts = [
        *([f"cls {inpainted.cls_cosine:.4f}"] if inpainted.cls_cosine is not None else []),
        *([f"good tokens {good.median().item():.4f} (median)"] if len(good) else []),
        f"marked {marked.mean().item():.4f} (mean of {len(marked):,})",
    ]
    return f"Cosines: {', '.join(parts)}"


def _mask_picture(image: DrawnImage, block: int, mask: Tensor | None, name: str) -> LabelledPicture:
    if mask is None:
        return LabelledPicture(f"block {block}", f"Block {block}: the direction is not determined", None)
    description = f"{counted(int(mask.sum()), 'patch')} marked at block {block}, {name}"
    return LabelledPicture(f"block {block}", description, mask_map(image.photograph, mask))


def mask_map(photograph: Picture, mask: Tensor) -> Picture:
    """Return marked patches in amber on the photograph, dimmed, grey and as coarse as the mask `[h, w]`."""
    grey = resized(photograph, *mask.shape).mean(axis=2, keepdims=True) * DIMMED
    colours = grey.repeat(3, axis=2).round().astype("uint8")
    colours[mask.numpy()] = MARK
    marked: Picture = colours
    return marked


def _target_pictures(targets: TargetMaps, scales: Scales, name: str) -> tuple[LabelledPicture, ...]:
    scale = scales.norms[targets.block]
    as_it_is = LabelledPicture("as it is", f"Token norms at block {targets.block}, {name}", scale.paint(targets.norms))
    return (
        as_it_is,
        *(
            LabelledPicture(
                f"τ = {temperature:g}",
                f"The same with marked tokens at their target, τ = {temperature:g}",
                scale.paint(norms),
            )
            for temperature, norms in targets.by_temperature.items()
        ),
    )
