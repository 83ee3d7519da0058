"""Estimate of what a repair could change: the last block's tokens against the inpainted original, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cosine_similarity

from sinder_cli.analysis.histogram import Histogram, LinearScale
from sinder_cli.analysis.records import Distribution, Gain, ImageInpainting, Inpainting
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.analysis.tokens import BlockTokens, Subject
from sinder_cli.defects.detection import DetectionRule, certain_somewhere, norm_ratios
from sinder_cli.defects.inpainting import inpainted, outlying_factor
from sinder_cli.defects.tokens import last_tokens, patch_grid

if TYPE_CHECKING:
    from torch import Tensor

SCALE = LinearScale(-1.0, 1.0, 40_000)  # bins of 0.00005: what matters here lies near 1
SAME = 0.999  # cosine from which tokens count as unmoved; 2.6°
AS_GOOD_AS_ONE = 0.99995  # in four digits
FAR = 0.9  # mean cosine of cls below which the report advises a test on a task
MOST_IMAGES = 1000  # with a record of their own: memory does not grow with the number of images


class Outliers:
    """The patch tokens of one batch that are outlying in any block by the rule, and how far; blocks are added in turn.

    A `norm_factor` of 0, the paper's rule, marks tokens of any norm; as those are no outliers, the default factor is
    used.
    """

    def __init__(self, settings: AnalyzeSettings) -> None:
        self.rule = replace(DetectionRule.of(settings), norm_factor=outlying_factor(settings.norm_factor))
        self._out: list[Tensor] = []  # bool [B, h, w] of each block, as the ratios and what equation (5) marks
        self._ratios: list[Tensor] = []
        self._predicted: list[Tensor] = []

    def add(self, side: BlockTokens) -> None:
        """Add the next block."""
        out = side.masks["outlying"]
        self._out.append(out)
        self._ratios.append(norm_ratios(side.norms))
        self._predicted.append(side.masks.get("equation_5", torch.zeros_like(out)))

    @cached_property
    def marked(self) -> Tensor:
        """The tokens that the rule marks in some block, bool `[B, h, w]`."""
        out, ratios, predicted = (torch.stack(each) for each in (self._out, self._ratios, self._predicted))
        return certain_somewhere(out, ratios, predicted, self.rule).any(dim=0)

    @cached_property
    def by_norm(self) -> Tensor:
        """The tokens that are outlying by norm alone in some block, bool `[B, h, w]`."""
        return torch.stack(self._out).any(dim=0)

    @cached_property
    def furthest(self) -> tuple[list[float], list[int]]:
        """The largest norm ÷ median of each image, and the first block where it is that large."""
        ratios = torch.stack(self._ratios).nan_to_num(0.0, posinf=math.inf)
        largest, blocks = ratios.flatten(2).amax(dim=2).max(dim=0)
        return largest.tolist(), blocks.tolist()


@dataclass(frozen=True)
class InpaintedCosines:
    """Cosines between the tokens after the last block and those of the inpainted original, on the CPU.

    They cover the b images of a batch that have outlying tokens.
    """

    images: list[int]  # their indices in the batch
    patches: Tensor  # [b, h, w]
    cls: Tensor | None  # [b]
    replaced: Tensor  # bool [b, h, w]: by the inpainted pass, in some block


@torch.no_grad()
def inpainted_cosines(
    subject: Subject, images: Tensor, outliers: Outliers, last: BlockTokens, settings: AnalyzeSettings
) -> InpaintedCosines:
    """Run the images of a batch `[B, 3, H, W]` that have outlying tokens again, and return their cosines.

    `last` are the tokens of all images of the batch after the last block.
    """
    found = outliers.marked.flatten(1).any(dim=1).nonzero()[:, 0]  # [b]
    replaced = outliers.marked[found].clone().zero_()
    if not len(found):
        return InpaintedCosines([], replaced.float().cpu(), None, replaced.cpu())

    def seen(_: int, marked: Tensor) -> None:
        replaced.logical_or_(marked)

    backbone = inpainted(subject.running(settings), settings.norm_factor, seen)
    tokens = last_tokens(backbone, subject.module, images[found])
    patches = cosine_similarity(last.patches[found], patch_grid(backbone, tokens, images), dim=-1)
    cls = None if last.cls is None else cosine_similarity(last.cls[found], tokens[:, 0], dim=-1).cpu()
    return InpaintedCosines(found.tolist(), patches.cpu(), cls, replaced.cpu())


@dataclass
class InpaintingCollector:
    """Streamed cosines to the inpainted original, over all images."""

    device: str
    tokens: int = 0
    unmarked: int = 0  # tokens that stand out by norm, but are not marked by the rule
    replaced: int = 0
    images: int = 0  # with outlying tokens
    seen: int = 0  # all images
    by_image: list[ImageInpainting] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cls, self.good, self.marked = (Histogram(SCALE, self.device) for _ in range(3))

    def add(
        self,
        names: Sequence[str],
        subject: Subject,
        images: Tensor,
        outliers: Outliers,
        last: BlockTokens,
        settings: AnalyzeSettings,
    ) -> None:
        """Add one batch: its outlying tokens, and its tokens after the last block."""
        found = inpainted_cosines(subject, images, outliers, last, settings)
        self._add_unmoved(last, ~outliers.marked.flatten(1).any(dim=1))
        self.seen += len(images)
        self.unmarked += int((outliers.by_norm & ~outliers.marked).sum())
        self.images += len(found.images)
        self.replaced += int(found.replaced.sum())
        if not found.images:
            return
        marked, (largest, block) = outliers.marked.cpu(), outliers.furthest
        for row, at in enumerate(found.images):
            cosines, out = found.patches[row], marked[at]
            cls = None if found.cls is None else found.cls[row]
            self.tokens += int(out.sum())
            self.good.add(cosines[~out].to(self.device))
            self.marked.add(cosines[out].to(self.device))
            if cls is not None:
                self.cls.add(cls.to(self.device))
            self.by_image.append(
                ImageInpainting(
                    image=names[at],
                    tokens=int(out.sum()),
                    max_ratio=largest[at],
                    block=block[at],
                    cls_cosine=_known(cls),
                    good_cosine=_known(cosines[~out].median() if not bool(out.all()) else None),
                    marked_cosine=_known(cosines[out].mean()),
                )
            )
        if len(self.by_image) > 2 * MOST_IMAGES:
            self.by_image = _furthest(self.by_image)

    def _add_unmoved(self, last: BlockTokens, chosen: Tensor) -> None:
        """Add the images, bool `[B]`, without outlying tokens: their inpainted pass equals the original's."""
        for histogram, tokens in ((self.good, last.patches), (self.cls, last.cls)):
            if tokens is not None:
                whole = tokens[chosen].isfinite().all(dim=-1)
                histogram.add(torch.where(whole, 1.0, math.nan))

    def merge(self, other: InpaintingCollector) -> None:
        """Add the cosines of other images."""
        for mine, theirs in ((self.cls, other.cls), (self.good, other.good), (self.marked, other.marked)):
            mine.merge(theirs)
        self.tokens += other.tokens
        self.unmarked += other.unmarked
        self.replaced += other.replaced
        self.images += other.images
        self.seen += other.seen
        self.by_image = _furthest([*self.by_image, *other.by_image])

    def to_cpu(self) -> InpaintingCollector:
        """Return a copy on the CPU, which can be sent to another process."""
        moved = InpaintingCollector("cpu")
        moved.merge(self)
        return moved

    def record(self, finite: bool) -> Inpainting:
        """Return the summary; `finite` is True if all tokens are finite."""
        cls, good, marked = (each.distribution() for each in (self.cls, self.good, self.marked))
        gain = gain_of(self.images, cls, good, marked) if finite else None
        return Inpainting(
            gain=gain,
            sentence=gain_sentence(gain, self._counted(), cls, good, marked, self.unmarked),
            tokens=self.tokens,
            unmarked=self.unmarked,
            images=self.images,
            replaced=self.replaced,
            cls_cosine=cls,
            good_cosine=good,
            marked_cosine=marked,
            by_image=tuple(sorted(_furthest(self.by_image), key=lambda each: each.image)),
        )

    def _counted(self) -> str:
        return f"{self.tokens:,} in {self.images:,} of {self.seen:,} images"


def gain_of(images: int, cls: Distribution | None, good: Distribution | None, marked: Distribution | None) -> Gain:
    """Return the gain, from the number of images with outlying tokens and the cosines over all images.

    `defects.detection` says what `healthy` means here.
    """
    if not images:
        return "healthy"
    if any(each is not None and each.p01 < SAME for each in (cls, good)):
        return "features"
    return "marked" if marked is not None and marked.median < SAME else "none"


def gain_sentence(
    gain: Gain | None,
    counted: str,
    cls: Distribution | None,
    good: Distribution | None,
    marked: Distribution | None,
    unmarked: int = 0,
) -> str:
    """Return the gain in words; `counted` states how many tokens are outlying, in how many images.

    `unmarked` tokens stand out by norm, but the rule does not mark them.
    """
    if gain is None:
        return "Tokens are not finite: what a repair could change cannot be determined."
    if gain == "healthy" and unmarked:
        return (
            f"A repair would train nothing: {unmarked:,} tokens stand out by norm, and none of them is certain to be a"
            " defect (--mark norm marks them all)."
        )
    if gain == "healthy":
        return "healthy: no token is outlying in any block; a repair would train nothing."
    whose = f"Without its outlying tokens ({counted})"
    moved = moves(cls, good, marked, _moved)
    if gain == "none":
        return f"{whose} {moved}: outliers cost little, a repair has nothing to gain."
    if gain == "marked":
        return f"{whose} {moved}: a repair could change little but the outlying tokens themselves."
    far = " cls moves far: outliers may carry information, test on a task whether this is an improvement."
    return f"{whose} {moved}: this much a repair could change.{far if moves_far(cls) else ''}"


def moves(
    cls: Distribution | None,
    good: Distribution | None,
    marked: Distribution | None,
    said: Callable[[float, float], str],
) -> str:
    """Return in words how far tokens would move; `said` words a cosine, and the lowest of them that matters."""
    known = [
        *([("cls", said(cls.mean, 1.0))] if cls is not None else []),
        *([("good tokens", said(good.median, good.p01))] if good is not None else []),
        *([("marked ones", said(marked.mean, 1.0))] if marked is not None else []),
    ]
    return ", ".join(f"{who} {'by' if at else 'would move by'} {how}" for at, (who, how) in enumerate(known))


def moves_far(cls: Distribution | None) -> bool:
    """Return True if cls would move so far that only a task can tell whether this is an improvement."""
    return cls is not None and cls.mean < FAR


def angle_of(cosine: float) -> str:
    """Return the angle of a cosine in words: 0°, under 0.1°, 2.6°, 104°."""
    degrees = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
    if 0 < degrees < 0.1:
        return "under 0.1°"
    return f"{degrees:.2g}°" if degrees < 9.95 else f"{degrees:.0f}°"


def _moved(cosine: float, lowest: float) -> str:
    """Return 29° (cosine 0.8746, 1 % below 0.5) in words, without a lowest cosine that is practically 1."""
    below = f", 1 % below {lowest:.4f}" if lowest < AS_GOOD_AS_ONE else ""
    return f"{angle_of(cosine)} (cosine {f'{cosine:.4f}' if cosine < AS_GOOD_AS_ONE else '> 0.9999'}{below})"


def _furthest(images: Sequence[ImageInpainting]) -> list[ImageInpainting]:
    """Return at most `MOST_IMAGES` of the images: those whose cls, or good tokens, moved furthest."""
    return sorted(images, key=lambda each: (_moved_least(each), each.image))[:MOST_IMAGES]


def _moved_least(image: ImageInpainting) -> float:
    known = (each for each in (image.cls_cosine, image.good_cosine, image.marked_cosine) if each is not None)
    return next(known, 1.0)


def _known(cosine: Tensor | None) -> float | None:
    """Return the cosine as a number; None if it is missing or not finite."""
    return cosine.item() if cosine is not None and bool(cosine.isfinite()) else None
