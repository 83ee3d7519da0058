"""The scan before a repair: which images of the original have defective tokens, where, and if weights predict them.

One pass over the images, made once for a run and kept in its directory as `outliers.json`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sinder_cli.backbone.contract import Backbone
from sinder_cli.defects.detection import (
    DetectionRule,
    alignment_logits,
    block_evidence,
    defective_somewhere,
    flooded_images,
    norm_ratios,
    standing_out,
)
from sinder_cli.defects.settings import MOST_GAP, NORM_FACTOR, PREDICTED_DEGREES
from sinder_cli.defects.spectrum import angle_between, leading_left
from sinder_cli.defects.tokens import patch_grid, stream_from_embedding
from sinder_cli.errors import BadInputError
from sinder_cli.events import tracked
from sinder_cli.files import write_text
from sinder_cli.images.loading import Changes, load_in_order, readable
from sinder_cli.images.processes import worker_count
from sinder_cli.images.sources import ImageSource, SomeImages
from sinder_cli.repairing.forward import Directions
from sinder_cli.repairing.preparing import Prepared

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class ImageOutliers:
    """The defective tokens of one image in the original: row-major indices of patches, for each block that has some."""

    name: str
    place: int  # in the source; it stays the same if images have other names when a run is resumed
    grid: tuple[int, int]
    finite: bool
    blocks: dict[int, tuple[int, ...]]
    standing: int = 0  # tokens that stand out by norm at some block, marked or not (`standing_out`)
    flooded: bool = False  # at some block, the median norm of its patches, or the norm of cls, is far above others'

    @property
    def kind(self) -> tuple[int, ...]:
        """The blocks at which a token is marked first: more than one if an image has several defects."""
        found: list[int] = []
        seen: set[int] = set()
        for block, places in sorted(self.blocks.items()):
            if not seen.issuperset(places):
                found.append(block)
            seen.update(places)
        return tuple(found)

    def first_marks(self, depth: int) -> Tensor:
        """Return where each defective token is marked first, bool `[blocks, h, w]`."""
        masks = torch.zeros(depth, self.grid[0] * self.grid[1], dtype=torch.bool)
        seen: set[int] = set()
        for block, places in sorted(self.blocks.items()):
            masks[block, sorted(set(places) - seen)] = True
            seen |= set(places)
        return masks.unflatten(1, self.grid)


@dataclass(frozen=True)
class BlockOutliers:
    """The defective tokens of one block over all images, and whether the weights predict them."""

    block: int
    tokens: int
    images: int
    marked_by_weights: int  # of these tokens, by equation (5) with a direction that is determined
    max_ratio: float  # the largest norm over the median of its image, of all patch tokens
    gap: float  # σ₁/σ₂ of the predicted direction
    angle_deg: float | None  # between the direction that the tokens share and the predicted one; None without tokens
    predicted: bool  # True if that angle is at most 30° and the direction is determined


@dataclass(frozen=True)
class Scan:
    """The defective tokens of the original on the scanned images."""

    images: tuple[ImageOutliers, ...]
    blocks: tuple[BlockOutliers, ...]
    tokens: int  # scanned patch tokens, in each block
    unreadable: dict[int, str] = field(default_factory=dict)  # the reason, by the place in the source

    @property
    def healthy(self) -> bool:
        """True if no image has a defective token in any block; `defects.detection` tells it from other meanings."""
        return not any(image.blocks for image in self.images)

    @property
    def standing(self) -> int:
        """Number of tokens that stand out by norm at some block, whatever the current rule marks."""
        return sum(image.standing for image in self.images)

    @property
    def by_name(self) -> dict[str, ImageOutliers]:
        """The images by name."""
        return {image.name: image for image in self.images}

    def named_as_in(self, source: ImageSource) -> Scan:
        """Return the same scan with the images' current names. Raises `BadInputError` if the source has too few."""
        if any(image.place >= len(source) for image in self.images):
            raise BadInputError("cannot resume", "the list of images is shorter than it was", "start anew with --force")
        return replace(self, images=tuple(replace(image, name=source.name(image.place)) for image in self.images))

    def require_finite(self) -> None:
        """Raise `BadInputError` if tokens of an image are not finite: nothing can be said about such a model."""
        broken = [image.name for image in self.images if not image.finite]
        if broken:
            why = f"its tokens are not finite on {len(broken)} of {len(self.images)} images, such as {broken[0]}"
            raise BadInputError(
                "the backbone is broken", why, "give other weights, or a --dtype with a larger range, such as bfloat16"
            )

    def write(self, path: Path) -> None:
        """Write `outliers.json`."""
        write_text(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> Scan:
        """Read `outliers.json`. Raises `BadInputError` if it is damaged."""
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            images = tuple(
                ImageOutliers(
                    each["name"],
                    each["place"],
                    (each["grid"][0], each["grid"][1]),
                    each["finite"],
                    {int(block): tuple(places) for block, places in each["blocks"].items()},
                    each["standing"],
                    each.get("flooded", False),
                )
                for each in stored["images"]
            )
            blocks = tuple(BlockOutliers(**each) for each in stored["blocks"])
            return cls(images, blocks, stored["tokens"], {int(at): why for at, why in stored["unreadable"].items()})
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadInputError(f"cannot read {path}", str(error), "start anew with --force") from error


@dataclass(frozen=True)
class MarkedBatch:
    """Measurements of one batch, block by block; scans and looks at the guard are made of them."""

    ratios: Tensor  # [blocks, B, h, w]: norm over the median norm of the image
    norms: Tensor  # [blocks, B, h, w]
    predicted: Tensor  # bool [blocks, B, h, w]: equation (5), with a direction that is determined
    defective: Tensor  # bool [blocks, B, h, w]
    standing: Tensor  # bool [B, h, w]: outlying at some block by the rule `standing_out`
    last: Tensor  # [B, T, N]: the last block's tokens, float32
    levels: Tensor  # [levels, B]: after each block, the median norm of the patches, and the norm of cls if there is one


@torch.no_grad()
def marked_batch(
    backbone: Backbone,
    module: nn.Module,
    directions: Directions,
    images: Tensor,
    rule: DetectionRule,
    far: FarTokens | None = None,
) -> MarkedBatch:
    """Run a batch `[B, 3, H, W]` and mark its tokens in every block.

    All tokens above the norm factor, marked or not, are added to `far`, which gives the direction that they share.
    """
    stream = stream_from_embedding(backbone, module, images)
    tokens = next(stream)
    start = norm_ratios(patch_grid(backbone, tokens, images).float().norm(dim=-1))
    found, levels = [], []
    for block in range(backbone.depth):
        tokens = next(stream)
        patches = patch_grid(backbone, tokens, images).float()
        logits = alignment_logits(patches, directions.nu[block])
        found.append(block_evidence(patches, logits, directions.gaps[block], rule))
        levels.append(found[-1].norms.flatten(1).median(dim=1).values)
        if backbone.has_cls:
            levels.append(tokens[:, 0].float().norm(dim=-1))
        if far is not None:
            far.add(block, patches, found[-1].ratios, rule)
    norms, ratios, predicted = (
        torch.stack([getattr(each, name) for each in found]) for name in ("norms", "ratios", "predicted")
    )
    defective = defective_somewhere(ratios, start, predicted, rule)
    standing = defective_somewhere(ratios, start, predicted, standing_out(rule)).any(dim=0)
    return MarkedBatch(ratios, norms, predicted, defective, standing, tokens.float(), torch.stack(levels))


@dataclass
class FarTokens:
    """The second moments of far-out tokens' unit vectors, by block: the leading direction is the one they share."""

    moments: dict[int, Tensor] = field(default_factory=dict)  # [N, N]

    def add(self, block: int, patches: Tensor, ratios: Tensor, rule: DetectionRule) -> None:
        """Add the tokens of a batch `[B, h, w, N]` that are above the norm factor; an infinite one has no direction."""
        far = patches[ratios > (rule.norm_factor or NORM_FACTOR)]  # [M, N]
        far = far[far.isfinite().all(dim=-1)]
        if len(far):
            units = torch.nn.functional.normalize(far, dim=-1)
            moment = (units.T @ units).cpu()
            self.moments[block] = self.moments[block] + moment if block in self.moments else moment

    def merge(self, other: FarTokens) -> None:
        """Add the tokens of other images."""
        for block, moment in other.moments.items():
            self.moments[block] = self.moments[block] + moment if block in self.moments else moment

    def angle(self, block: int, nu: Tensor) -> float | None:
        """Return the angle in degrees between a block's shared direction and the predicted one; None without tokens."""
        if block not in self.moments:
            return None
        return angle_between(leading_left(self.moments[block]).direction, nu.cpu())


@dataclass
class _Found:
    """What one rank has found; the images of others can be added."""

    largest: list[float]  # by block: the largest ratio of norms
    images: list[ImageOutliers] = field(default_factory=list)
    by_weights: Counter[int] = field(default_factory=Counter)  # by block: marked tokens that the weights predict
    levels: dict[int, Tensor] = field(default_factory=dict)  # of each image, by place, as in `flooded_images`
    far: FarTokens = field(default_factory=FarTokens)

    def add(self, places: Mapping[str, int], batch: MarkedBatch) -> None:
        """Add a batch of images with these names and places."""
        by_block = (batch.defective & batch.predicted).flatten(1).sum(dim=1).tolist()
        self.by_weights.update(dict(enumerate(by_block)))
        most = batch.ratios.nan_to_num(0.0).flatten(1).max(dim=1).values.tolist()
        self.largest = [max(pair) for pair in zip(self.largest, most, strict=True)]
        finite = batch.last.flatten(1).isfinite().all(dim=1).tolist()
        for image, (name, place) in enumerate(places.items()):
            standing = int(batch.standing[image].sum())
            self.images.append(_outliers(name, place, batch.defective[:, image], finite[image], standing))
            self.levels[place] = batch.levels[:, image].cpu()

    def merge(self, other: _Found) -> None:
        """Add what another rank has found."""
        self.images += other.images
        self.levels.update(other.levels)
        self.far.merge(other.far)
        self.by_weights.update(other.by_weights)
        self.largest = [max(pair) for pair in zip(self.largest, other.largest, strict=True)]


def scan(prepared: Prepared, chosen: Sequence[int], unreadable: dict[str, str]) -> Scan:
    """Scan the chosen images, given by place; each rank scans its share, and all get the whole result.

    Images that cannot be decoded are named in a warning and added to `unreadable`.
    """
    start, ranks = prepared.start, prepared.ranks
    changes = Changes()
    place_of = {start.source.name(place): place for place in chosen}
    found = _found(prepared, place_of, SomeImages(start.source, ranks.share(chosen)), unreadable, changes)
    for rank, (other, broken, changed) in enumerate(ranks.all_gather((found, dict(unreadable), changes))):
        if rank != ranks.rank:
            found.merge(other)
            unreadable.update(broken)
            changes.merge(changed)
    changes.tell(prepared.emit)
    flooded = flooded_images(found.levels)
    images = tuple(
        replace(image, flooded=image.place in flooded) for image in sorted(found.images, key=lambda image: image.place)
    )
    blocks = tuple(_block(block, images, found, prepared) for block in range(start.backbone.depth))
    tokens = sum(image.grid[0] * image.grid[1] for image in images)
    failed = {place_of[name]: why for name, why in unreadable.items() if name in place_of}
    return Scan(images, blocks, tokens, failed)


def _found(
    prepared: Prepared, place_of: Mapping[str, int], mine: ImageSource, unreadable: dict[str, str], changes: Changes
) -> _Found:
    """Run this rank's images, batch by batch."""
    start, ranks, settings = prepared.start, prepared.ranks, prepared.start.settings
    running, rule = start.running, start.rule
    found = _Found([0.0] * start.backbone.depth)
    loaded = load_in_order(mine, start.preprocess, range(len(mine)), worker_count(settings.workers, ranks.local_size))
    read = readable(loaded, unreadable, prepared.emit, changes)
    images = tracked(read, prepared.emit, "scanning the original", len(mine), "images")
    while batch := list(islice(images, max(1, settings.batch_size // ranks.size))):
        pixels = torch.stack([image for _, image in batch]).to(prepared.directions.nu.device)
        found.add(
            {name: place_of[name] for name, _ in batch},
            marked_batch(running, prepared.module, prepared.directions, pixels, rule, found.far),
        )
    return found


def _outliers(name: str, place: int, masks: Tensor, finite: bool, standing: int) -> ImageOutliers:
    """Return the outliers of one image, from its masks, bool `[blocks, h, w]`."""
    found = {block: tuple(mask.flatten().nonzero()[:, 0].tolist()) for block, mask in enumerate(masks.cpu())}
    blocks = {block: places for block, places in found.items() if places}
    return ImageOutliers(name, place, (masks.shape[1], masks.shape[2]), finite, blocks, standing)


def _block(block: int, images: Sequence[ImageOutliers], found: _Found, prepared: Prepared) -> BlockOutliers:
    having = [image for image in images if block in image.blocks]
    angle = found.far.angle(block, prepared.directions.nu[block]) if having else None
    gap = prepared.directions.gaps[block]
    return BlockOutliers(
        block=block,
        tokens=sum(len(image.blocks[block]) for image in having),
        images=len(having),
        marked_by_weights=found.by_weights[block],
        max_ratio=found.largest[block],
        gap=min(gap, MOST_GAP) if math.isfinite(gap) else MOST_GAP,
        angle_deg=angle,
        predicted=angle is not None and angle <= PREDICTED_DEGREES and prepared.start.rule.trusts(gap),
    )
