"""What one image's pictures show, painted: one small picture a map, for the files and for the page alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sinder_cli.files import printable
from sinder_cli.report import facts
from sinder_cli.report.scales import ANGLES, ColourScale, attention_scale, cosine_scale, norm_scale

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from sinder_cli.analysis.portraits import Portrait, PortraitSide, TargetMaps
    from sinder_cli.analysis.records import Analysis
    from sinder_cli.report.figures import Picture

MARK = (255, 176, 0)  # a marked patch: amber, which the colour-blind tell from grey
DIMMED = 0.45  # the photograph under it


class Tile(NamedTuple):
    """One picture: its caption, what a reader who cannot see it is told, and its colours; None without a map."""

    label: str
    told: str
    picture: Picture | None


class Sitter(NamedTuple):
    """An image and its maps, without the pixels that nobody will see: the photograph is reduced."""

    name: str
    photograph: Picture
    sides: tuple[PortraitSide, ...]
    patch_cosine: Tensor | None


@dataclass(frozen=True)
class SideTiles:
    """One backbone's maps of one image; `block` is the first defective one, None without."""

    pca: Tile
    norm: Tile
    attention: Tile | None
    angles: tuple[Tile, ...]
    masks: tuple[Tile, ...]
    targets: tuple[Tile, ...]
    block: int | None
    outlying: int
    largest: float


@dataclass(frozen=True)
class ImageTiles:
    """One image and its maps."""

    name: str
    photograph: Tile
    sides: tuple[SideTiles, ...]
    cosine: Tile | None


@dataclass(frozen=True)
class Scales:
    """The colours that are the same for all images and both sides."""

    pca: tuple[NDArray[Any], NDArray[Any]]  # the values [3] that take no and full red, green and blue
    norms: tuple[ColourScale, ...]  # by block
    cosine: ColourScale


def sitter(portrait: Portrait, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Sitter:
    """The portrait with its image as a photograph of at most 512 pixels a side."""
    from sinder_cli.report.figures import picture, reduced

    photograph = reduced(picture(portrait.image, mean, std))
    return Sitter(printable(Path(portrait.name).name), photograph, portrait.sides, portrait.patch_cosine)


def shared_scales(analysis: Analysis, first: Iterable[Sitter]) -> Scales:
    """Scales from the statistics of all images, and for the principal components from the first ones' maps."""
    sides = [analysis, *([analysis.other] if analysis.other else [])]
    pairs = analysis.comparison or ()
    return Scales(
        pca=_clip_range([side.components[side.in_basis] for each in first for side in each.sides]),
        norms=tuple(
            norm_scale(block.patch_norm for block in blocks) for blocks in zip(*(s.blocks for s in sides), strict=True)
        ),
        cosine=cosine_scale(pairs[-1].patch_cosine if pairs else None),
    )


def _clip_range(components: Sequence[Tensor]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The 1st and the 99th percentile of each component, over tokens `[M, 3]`."""
    import numpy as np

    from sinder_cli.report.figures import CLIP_PERCENTILES

    pooled = np.concatenate([part.reshape(-1, 3).numpy() for part in components] or [np.zeros((1, 3))])
    finite = pooled[np.isfinite(pooled).all(axis=1)]
    low, high = np.percentile(finite if len(finite) else np.zeros((1, 3)), CLIP_PERCENTILES, axis=0)
    return low, high


def image_tiles(sitter: Sitter, scales: Scales, labels: Sequence[str]) -> ImageTiles:
    """Paint all maps of one image; `labels` names the sides of a comparison, and is one empty text without."""
    told = f"Cosine between both sides' tokens of {sitter.name}"
    cosine = sitter.patch_cosine
    return ImageTiles(
        name=sitter.name,
        photograph=Tile("Image", f"{sitter.name}, as the model saw it", sitter.photograph),
        sides=tuple(
            _side_tiles(sitter, side, scales, f"{sitter.name}, {label}" if label else sitter.name)
            for side, label in zip(sitter.sides, labels, strict=True)
        ),
        cosine=None if cosine is None else Tile("Cosine", told, scales.cosine.paint(cosine)),
    )


def _side_tiles(sitter: Sitter, side: PortraitSide, scales: Scales, name: str) -> SideTiles:
    from sinder_cli.report.figures import linear_position, to_bytes

    outlying, largest = int(side.outlying.sum()), side.norms.max().item()
    told = f"Token norms of {name}: largest {facts.number(largest)}, outlying {outlying:,}"
    components = side.components.nan_to_num().numpy()
    attention = side.attention
    return SideTiles(
        pca=Tile(
            "PCA",
            f"Principal components of the tokens of {name}, as colours",
            to_bytes(linear_position(components, *scales.pca)),
        ),
        norm=Tile("Norm", told, scales.norms[-1].paint(side.norms)),
        attention=None
        if attention is None
        else Tile(
            "Attention", f"Attention of cls to the patches of {name}", attention_scale(attention).paint(attention)
        ),
        angles=tuple(
            Tile(f"block {block}", f"Angles to ν at block {block}, {name}", ANGLES.paint(angles))
            for block, angles in side.angles.items()
        ),
        masks=tuple(_mask_tile(sitter, block, side.masks.get(block), name) for block in side.angles),
        targets=_target_tiles(side.targets, scales, name) if side.targets else (),
        block=side.targets.block if side.targets else None,
        outlying=outlying,
        largest=largest,
    )


def _mask_tile(sitter: Sitter, block: int, mask: Tensor | None, name: str) -> Tile:
    if mask is None:
        return Tile(f"block {block}", f"Block {block}: the direction is not determined", None)
    told = f"{facts.counted(int(mask.sum()), 'patch')} marked at block {block}, {name}"
    return Tile(f"block {block}", told, mask_map(sitter.photograph, mask))


def mask_map(photograph: Picture, mask: Tensor) -> Picture:
    """Marked patches in amber on the photograph, which is dimmed, grey and as coarse as the mask `[h, w]`."""
    from sinder_cli.report.figures import resized

    grey = resized(photograph, *mask.shape).mean(axis=2, keepdims=True) * DIMMED
    colours = grey.repeat(3, axis=2).round().astype("uint8")
    colours[mask.numpy()] = MARK
    marked: Picture = colours
    return marked


def _target_tiles(targets: TargetMaps, scales: Scales, name: str) -> tuple[Tile, ...]:
    scale = scales.norms[targets.block]
    as_it_is = Tile("as it is", f"Token norms at block {targets.block}, {name}", scale.paint(targets.norms))
    return (
        as_it_is,
        *(
            Tile(
                f"τ = {temperature:g}",
                f"The same with marked tokens at their target, τ = {temperature:g}",
                scale.paint(norms),
            )
            for temperature, norms in targets.by_temperature.items()
        ),
    )
