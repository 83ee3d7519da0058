"""The scan before a repair: which images of the original have defective tokens, where, and if weights predict them.

One pass over the images, made once for a run and kept in its directory as `outliers.json`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sinder_cli.backbone.contract import Backbone
from sinder_cli.defects.detection import (
    DetectionRule,
    alignment_logits,
    defect_mask,
    defective_somewhere,
    norm_ratios,
)
from sinder_cli.defects.settings import NORM_FACTOR
from sinder_cli.defects.spectrum import angle_between, leading_left
from sinder_cli.defects.tokens import in_precision, patch_grid, stream_from_embedding
from sinder_cli.distributed import Ranks
from sinder_cli.errors import BadInputError
from sinder_cli.events import Emit, tracked
from sinder_cli.files import write_text
from sinder_cli.images.loading import Changes, load_in_order, readable
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.processes import worker_count
from sinder_cli.images.sources import ImageSource, SomeImages
from sinder_cli.repairing.forward import Directions
from sinder_cli.repairing.settings import RepairSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

ENOUGH_TO_COMPARE = 5  # images: among fewer, the usual norm is not known
FLOODED = 2.0  # × the usual norm at a block: in a healthy DINOv2, the median patch and cls stay below 1.4 ×
PREDICTED_DEGREES = 30.0  # an observed direction within this angle of a determined predicted one counts as that one


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
        """True if no image has a defective token in any block."""
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
            raise BadInputError("the backbone is broken", why, "give other weights, or a --dtype of more range")

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
class Seen:
    """Measurements of one batch, block by block; scans and looks at the guard are made of them."""

    ratios: Tensor  # [blocks, B, h, w]: norm over the median norm of the image
    norms: Tensor  # [blocks, B, h, w]
    predicted: Tensor  # bool [blocks, B, h, w]: equation (5), with a direction that is determined
    defective: Tensor  # bool [blocks, B, h, w]
    standing: Tensor  # bool [B, h, w]: outlying at some block by the rule `standing_out`
    last: Tensor  # [B, T, N]: the last block's tokens, float32
    levels: Tensor  # [levels, B]: after each block, the median norm of the patches, and the norm of cls if there is one


@torch.no_grad()
def see(
    backbone: Backbone,
    module: nn.Module,
    directions: Directions,
    images: Tensor,
    rule: DetectionRule,
    shared: Shared | None = None,
) -> Seen:
    """Run a batch `[B, 3, H, W]` and mark its tokens in every block.

    All tokens above the norm factor, marked or not, are added to `shared`, which gives the direction that they share.
    """
    stream = stream_from_embedding(backbone, module, images)
    start = norm_ratios(patch_grid(backbone, next(stream), images).float().norm(dim=-1))
    norms, predicted, levels = [], [], []
    for block, tokens in enumerate(stream):
        last = tokens
        patches = patch_grid(backbone, tokens, images).float()
        norms.append(patches.norm(dim=-1))
        levels.append(norms[-1].flatten(1).median(dim=1).values)
        if backbone.has_cls:
            levels.append(tokens[:, 0].float().norm(dim=-1))
        marked = defect_mask(alignment_logits(patches, directions.nu[block]), rule)
        predicted.append(marked & rule.trusts(directions.gaps[block]))
        if shared is not None:
            shared.add(block, patches, norm_ratios(norms[-1]), rule)
    ratios = torch.stack([norm_ratios(each) for each in norms])
    marks = torch.stack(predicted)
    defective = defective_somewhere(ratios, start, marks, rule)
    standing = defective_somewhere(ratios, start, marks, standing_out(rule)).any(dim=0)
    return Seen(ratios, torch.stack(norms), marks, defective, standing, last.float(), torch.stack(levels))


def standing_out(rule: DetectionRule) -> DetectionRule:
    """Return the rule for verdicts: tokens that surely stand out by norm count, whatever marks tokens for training."""
    return replace(rule, mark="norm" if rule.mark == "norm" else "auto", norm_factor=rule.norm_factor or NORM_FACTOR)


@dataclass
class Shared:
    """The second moments of far-out tokens' unit vectors, by block: the leading direction is the shared one."""

    moments: dict[int, Tensor] = field(default_factory=dict)  # [N, N]

    def add(self, block: int, patches: Tensor, ratios: Tensor, rule: DetectionRule) -> None:
        """Add the tokens of a batch `[B, h, w, N]` that are above the norm factor; an infinite one has no direction."""
        far = patches[ratios > (rule.norm_factor or DetectionRule().norm_factor)]  # [M, N]
        far = far[far.isfinite().all(dim=-1)]
        if len(far):
            units = torch.nn.functional.normalize(far, dim=-1)
            moment = (units.T @ units).cpu()
            self.moments[block] = self.moments[block] + moment if block in self.moments else moment

    def merge(self, other: Shared) -> None:
        """Add the tokens of other images."""
        for block, moment in other.moments.items():
            self.moments[block] = self.moments[block] + moment if block in self.moments else moment

    def angle(self, block: int, nu: Tensor) -> float | None:
        """Return the angle in degrees between a block's shared direction and the predicted one; None without tokens."""
        if block not in self.moments:
            return None
        return angle_between(leading_left(self.moments[block]).direction, nu.cpu())


def scan(
    backbone: Backbone,
    module: nn.Module,
    directions: Directions,
    source: ImageSource,
    preprocess: Preprocessing,
    chosen: Sequence[int],
    settings: RepairSettings,
    unreadable: dict[str, str],
    emit: Emit,
    ranks: Ranks,
) -> Scan:
    """Scan the chosen images of a source; each rank scans its share, and all get the whole result.

    Images that cannot be decoded are named in a warning and added to `unreadable`.
    """
    running, rule = in_precision(backbone, settings.dtype, settings.tf32), DetectionRule.of(settings)
    mine = SomeImages(source, ranks.share(chosen))
    loaded = load_in_order(mine, preprocess, range(len(mine)), worker_count(settings.workers, ranks.local_size))
    shared = Shared()
    found: list[ImageOutliers] = []
    levels: dict[int, Tensor] = {}  # of each image, by its place: its usual norms, as in `flooded_images`
    by_weights: Counter[int] = Counter()
    largest = [0.0] * backbone.depth
    B = max(1, settings.batch_size // ranks.size)
    batch: list[tuple[str, Tensor]] = []
    place_of = {source.name(place): place for place in chosen}

    def take() -> None:
        seen = see(
            running, module, directions, torch.stack([each for _, each in batch]).to(directions.nu.device), rule, shared
        )
        by_block = (seen.defective & seen.predicted).flatten(1).sum(dim=1).tolist()
        by_weights.update(dict(enumerate(by_block)))
        for block, ratio in enumerate(seen.ratios.nan_to_num(0.0).flatten(1).max(dim=1).values.tolist()):
            largest[block] = max(largest[block], ratio)
        finite = seen.last.flatten(1).isfinite().all(dim=1).tolist()
        for image, (name, _) in enumerate(batch):
            standing = int(seen.standing[image].sum())
            found.append(_outliers(name, place_of[name], seen.defective[:, image], finite[image], standing))
            levels[place_of[name]] = seen.levels[:, image].cpu()
        batch.clear()

    changes = Changes()
    read = readable(loaded, unreadable, emit, changes)
    for name, pixels in tracked(read, emit, "looking at the original", len(mine), "images"):
        batch.append((name, pixels))
        if len(batch) == B:
            take()
    if batch:
        take()
    sharing = shared if ranks.size > 1 else None
    parts = ranks.all_gather((found, sharing, dict(by_weights), largest, dict(unreadable), changes, levels))
    for rank, (_, other, counts, most, broken, changed, norms) in enumerate(parts):
        levels.update(norms)
        if rank == ranks.rank:
            continue
        if other is not None:
            shared.merge(other)
        by_weights.update(counts)
        largest = [max(pair) for pair in zip(largest, most, strict=True)]
        unreadable.update(broken)
        changes.merge(changed)
    changes.tell(emit)
    flooded = flooded_images(levels)
    images = tuple(
        replace(image, flooded=image.place in flooded)
        for image in sorted((each for part in parts for each in part[0]), key=lambda image: image.place)
    )
    blocks = tuple(
        _block(block, images, by_weights[block], largest[block], directions, shared, rule)
        for block in range(backbone.depth)
    )
    tokens = sum(image.grid[0] * image.grid[1] for image in images)
    failed = {place_of[name]: why for name, why in unreadable.items() if name in place_of}
    return Scan(images, blocks, tokens, failed)


def _outliers(name: str, place: int, masks: Tensor, finite: bool, standing: int) -> ImageOutliers:
    """Return the outliers of one image, from its masks, bool `[blocks, h, w]`."""
    found = {block: tuple(mask.flatten().nonzero()[:, 0].tolist()) for block, mask in enumerate(masks.cpu())}
    blocks = {block: places for block, places in found.items() if places}
    return ImageOutliers(name, place, (masks.shape[1], masks.shape[2]), finite, blocks, standing)


def flooded_images(levels: Mapping[int, Tensor]) -> set[int]:
    """Find the images, by place, in which most patch tokens are outlying, or cls is.

    `levels` has of each image the median norm of its patches, and the norm of its cls, after each block: `[levels]`. If
    most tokens are outlying, so is the median, and hardly any token exceeds 3 × the median; but it is far above the
    medians of other images.
    """
    if len(levels) < ENOUGH_TO_COMPARE:
        return set()
    usual = torch.stack(list(levels.values())).quantile(0.5, dim=0)
    return {place for place, norms in levels.items() if bool((norms > FLOODED * usual).any())}


def _block(
    block: int,
    images: Sequence[ImageOutliers],
    by_weights: int,
    largest: float,
    directions: Directions,
    shared: Shared,
    rule: DetectionRule,
) -> BlockOutliers:
    having = [image for image in images if block in image.blocks]
    angle = shared.angle(block, directions.nu[block]) if having else None
    gap = directions.gaps[block]
    return BlockOutliers(
        block=block,
        tokens=sum(len(image.blocks[block]) for image in having),
        images=len(having),
        marked_by_weights=by_weights,
        max_ratio=largest,
        gap=min(gap, 1e12) if math.isfinite(gap) else 1e12,
        angle_deg=angle,
        predicted=angle is not None and angle <= PREDICTED_DEGREES and rule.trusts(gap),
    )


def to_train_on(images: Sequence[ImageOutliers]) -> list[ImageOutliers]:
    """Return the images with a defect, without flooded ones if another image has the same kind of defect.

    The neighbours of a token in a flooded image are outlying themselves: no target to learn.
    """
    kinds = {image.kind for image in images if image.blocks and not image.flooded}
    return [image for image in images if image.blocks and not (image.flooded and image.kind in kinds)]


def rarest_first(images: Sequence[ImageOutliers], indices: Sequence[int]) -> list[int]:
    """Return the indices of the images, one of each kind in turn, beginning with the rarest kind."""
    kinds: dict[tuple[int, ...], list[int]] = {}
    for image, index in zip(images, indices, strict=True):
        kinds.setdefault(image.kind, []).append(index)
    queues = sorted(kinds.values(), key=len)
    return [queue[at] for at in range(max(map(len, queues), default=0)) for queue in queues if at < len(queue)]
