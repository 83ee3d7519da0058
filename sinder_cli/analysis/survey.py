"""One pass over all images: the residual stream of one or two backbones, summed up block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from sinder_cli.analysis.collectors import BlockCollector, BlockCurves, Collected, PairCollector
from sinder_cli.analysis.directions import Basis, Moments
from sinder_cli.analysis.gain import InpaintingCollector, Outliers
from sinder_cli.analysis.records import BlockRecord, Inpainting, PairRecord, Rule
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.analysis.tokens import BlockTokens, Subject, block_by_block, featured, in_basis
from sinder_cli.backbone.contract import Backbone
from sinder_cli.defects.detection import DetectionRule
from sinder_cli.defects.settings import MOST_GAP, STAGES
from sinder_cli.distributed import ALONE, Ranks
from sinder_cli.errors import UsageError
from sinder_cli.events import Emit, tracked
from sinder_cli.images.loading import Changes, LoadedImage, load_in_order, readable, skip_all, spread
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.processes import worker_count
from sinder_cli.images.sources import ImageSource

if TYPE_CHECKING:
    from torch import Tensor


Key = TypeVar("Key")

WAITING_BATCHES = 4  # images that wait for others of their shape, in batches: memory that many shapes may take


@dataclass
class ImageBatches:
    """The images of a source, to be run more than once; those that cannot be decoded are reported once."""

    source: ImageSource
    preprocess: Preprocessing
    indices: Sequence[int]
    settings: AnalyzeSettings
    emit: Emit
    ranks: Ranks = ALONE
    skipped: dict[str, str] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)

    def share(self) -> Iterator[tuple[list[str], Tensor]]:
        """Named batches `[B, 3, H, W]` of the images that are this rank's, with progress."""
        mine = self.ranks.share(self.indices)
        loaded = tracked(self._loaded(mine), self.emit, "analyzing", len(mine), "images")
        return self._batched(loaded)

    @property
    def names(self) -> list[str]:
        """The names of all images of all ranks."""
        return [self.source.name(index) for index in self.indices]

    def gather(self) -> None:
        """Let rank 0 know, and tell, what the others could not decode, and how many images were changed."""
        skip_all(self.ranks.gather(self.skipped), self.skipped, self.emit)
        for other in self.ranks.gather(self.changes):
            self.changes.merge(other)
        if self.ranks.writes:
            self.changes.tell(self.emit, self.preprocess.max_tokens)

    def again(self, most: int | Literal["all"]) -> tuple[int, Iterator[tuple[list[str], Tensor]]]:
        """At most so many of the images that could be decoded, evenly spread: their number, and named batches."""
        there = [index for index in self.indices if self.source.name(index) not in self.skipped]
        chosen = spread(there, len(there) if most == "all" else most)
        return len(chosen), self._batched(self._loaded(chosen))

    def _loaded(self, indices: Sequence[int]) -> Iterator[LoadedImage]:
        return load_in_order(
            self.source, self.preprocess, indices, worker_count(self.settings.workers, self.ranks.local_size)
        )

    def _batched(self, loaded: Iterator[LoadedImage]) -> Iterator[tuple[list[str], Tensor]]:
        return equal_shapes(readable(loaded, self.skipped, self.emit, self.changes), self.settings.batch_size)


def equal_shapes(images: Iterable[tuple[Key, Tensor]], size: int) -> Iterator[tuple[list[Key], Tensor]]:
    """Images `[3, H, W]` with their keys, in batches `[B ≤ size, 3, H, W]` of one shape each.

    A batch comes as soon as it is full; when too many images wait, the shape that most of them have goes first.
    The order depends on the images alone.
    """
    waiting: dict[torch.Size, list[tuple[Key, Tensor]]] = {}
    count = 0
    for key, image in images:
        group = waiting.setdefault(image.shape, [])
        group.append((key, image))
        count += 1
        if len(group) < size and count < WAITING_BATCHES * size:
            continue
        fullest = max(waiting, key=lambda shape: len(waiting[shape]))
        count -= len(waiting[fullest])
        yield _stacked(waiting.pop(fullest))
    for group in waiting.values():
        yield _stacked(group)


def _stacked(group: list[tuple[Key, Tensor]]) -> tuple[list[Key], Tensor]:
    return [key for key, _ in group], torch.stack([image for _, image in group])


Keep = Callable[[Sequence[str], Subject, BlockTokens], None]  # names of a batch, and its tokens after the last block


@dataclass(frozen=True)
class Survey:
    """What one pass found out about one backbone."""

    blocks: tuple[BlockRecord, ...]
    curves: tuple[BlockCurves, ...]
    observed: Tensor  # [blocks, N] float32, rows of unit norm, or of zeros where there was no outlying token
    shares: tuple[dict[Rule, Tensor], ...]  # by block: how often each cell of the grid is marked, [H, W]
    inpainting: Inpainting | None = None  # against the inpainted original


@dataclass(frozen=True)
class Surveys:
    """One survey a backbone; for two also what they have in common."""

    sides: tuple[Survey, ...]
    pairs: tuple[PairRecord, ...]
    images: int
    basis: Basis | None  # of the last block's patch tokens of all sides


def require_comparable(backbones: Sequence[Backbone]) -> None:
    """Refuse backbones whose tokens cannot be compared. Raises `UsageError` naming what differs."""
    first = backbones[0]
    for other in backbones[1:]:
        facts = {
            "width": (first.width, other.width),
            "depth": (first.depth, other.depth),
            "patch size": (first.patch_size, other.patch_size),
            "normalization": ((first.mean, first.std), (other.mean, other.std)),
        }
        for name, (one, two) in facts.items():
            if one != two:
                why = f"their {name} differs, {one} and {two}"
                raise UsageError(f"cannot compare {first.name} with {other.name}", why, "name one of the same shape")


@torch.no_grad()
def survey(
    subjects: Sequence[Subject],
    batches: Iterable[tuple[Sequence[str], Tensor]],
    grid: tuple[int, int],
    settings: AnalyzeSettings,
    device: str,
    components: bool = False,
    ranks: Ranks = ALONE,
    keep: Keep | None = None,
) -> Surveys | None:
    """Run named batches `[B, 3, H, W]` of normalized images through one or two backbones of one width and depth.

    `grid` is the one that positions are counted on; `components` asks for the principal components of the last
    block's patch tokens; `keep` gets those tokens, of the inpainted side where there is one, else of the first.
    Memory does not grow with the number of images. Each rank has batches of its own; rank 0 sums up for all, and the
    others get None.
    """
    collected = _collected(subjects, batches, grid, settings, device, components, keep).at_first(ranks)
    if not ranks.writes:
        return None
    parts = zip(subjects, collected.sides, collected.inpainted, strict=True)
    return Surveys(
        tuple(_summed(*each) for each in parts) if collected.images else (),
        tuple(pair.record(block) for block, pair in enumerate(collected.pairs)),
        collected.images,
        collected.moments.basis() if collected.moments is not None else None,
    )


def _collected(
    subjects: Sequence[Subject],
    batches: Iterable[tuple[Sequence[str], Tensor]],
    grid: tuple[int, int],
    settings: AnalyzeSettings,
    device: str,
    components: bool,
    keep: Keep | None,
) -> Collected:
    depth, width = subjects[0].backbone.depth, subjects[0].backbone.width
    rule = DetectionRule.of(settings)
    directions = [subject.directions(device) for subject in subjects]
    collectors = [[BlockCollector(device, grid, rule) for _ in range(depth)] for _ in subjects]
    pairs = [PairCollector(device) for _ in range(depth if len(subjects) == 2 else 0)]
    moments = Moments(width, device) if components else None
    inpainted = [InpaintingCollector(device) if settings.inpaint and each.original else None for each in subjects]
    kept = featured(subjects)
    count = 0
    for names, batch in batches:
        images = batch.to(device)
        count += len(images)
        outliers = [Outliers(settings) for _ in subjects]
        streams = [block_by_block(each, images, nu, settings) for each, nu in zip(subjects, directions, strict=True)]
        for block, sides in enumerate(zip(*streams, strict=True)):
            for side, blocks, seen in zip(sides, collectors, outliers, strict=True):
                blocks[block].add(side)
                seen.add(side)
            if pairs:
                pairs[block].add(sides)
            if block < depth - 1:
                continue
            if moments is not None:
                for side in sides:
                    moments.add(side.patches[in_basis(side, settings)])
            if keep is not None:
                keep(names, subjects[kept], sides[kept])
            for subject, collector, seen, side in zip(subjects, inpainted, outliers, sides, strict=True):
                if collector is not None:
                    collector.add(names, subject, images, seen, side, settings)
    return Collected(count, collectors, pairs, moments, inpainted)


def _summed(subject: Subject, collectors: list[BlockCollector], inpainted: InpaintingCollector | None) -> Survey:
    nu = subject.directions("cpu")
    gaps = {stage: [min(gap, MOST_GAP) for gap in subject.prediction.gaps(stage)] for stage in STAGES}
    records = tuple(
        collector.record(block, nu[block], {stage: gaps[stage][block] for stage in STAGES})
        for block, collector in enumerate(collectors)
    )
    none = torch.zeros(subject.backbone.width)
    found = [collector.observed.direction for collector in collectors]
    return Survey(
        blocks=records,
        curves=tuple(collector.curves() for collector in collectors),
        observed=torch.stack([none if direction is None else direction for direction in found]),
        shares=tuple(
            {rule: places.shares() for rule, places in collector.counts.places.items()} for collector in collectors
        ),
        inpainting=inpainted.record(finite=not any(block.nonfinite for block in records)) if inpainted else None,
    )
