"""The guard: images that a repair never trains on, and by which it is judged while it runs.

The yardstick is the inpainted original (`defects.inpainting`): its cls and its never-marked tokens show what the
network would output without outliers. Similarity to the original is no yardstick, since outliers spoil cls and good
tokens through attention. The number of outliers alone is none either, since a ruined model has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cosine_similarity, normalize

from sinder_cli.backbone.contract import Backbone
from sinder_cli.defects.detection import LEANING, DetectionRule
from sinder_cli.defects.inpainting import inpainted
from sinder_cli.defects.settings import SLACK
from sinder_cli.defects.shift import CELLS, Retrieval, found_again, shifted
from sinder_cli.defects.tokens import last_tokens, patch_grid
from sinder_cli.errors import BadInputError
from sinder_cli.events import Emit, Measured, silent, tracked
from sinder_cli.repairing.forward import Directions
from sinder_cli.repairing.scan import MarkedBatch, marked_batch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sinder_cli.repairing.loop import Best

WORST = 0.5  # cosine below which the worst 1 % of good tokens counts as spoilt, whatever the median is
SAMPLES = 6  # images whose patch tokens are kept for pictures
SHIFTED = 2  # of these, with a marked token, are examined in a shifted view too
LEAST_GRID = 5  # patches on a side: the smallest grid that every backbone accepts
SAME_WAY = 0.6  # cosine of the directions in which a repair and inpainting move cls, over all images
UNMOVED = 1e-6  # length of a move that rounding makes
FURTHER = 2.0  # times the original's distance that cls may then have
NEARER = 0.75  # of the original's distance to the inpainted original: a nearer state need not reach the floor


@dataclass(frozen=True)
class Fidelity:
    """Cosines of the guard to a yardstick, last block, before the final norm; None without such tokens."""

    cls: float | None  # mean
    good: float  # patches that the original never marks: median
    good_mean: float  # their mean
    good_p01: float  # their 1st percentile
    marked: float | None  # patches that the original marks at some block: mean
    cls_way: float | None = None  # cosine between how cls moved from the original and how inpainting moves it

    @classmethod
    def of(cls, patches: Tensor, heads: Tensor | None, ever: Tensor, way: float | None = None) -> Fidelity:
        """Summarize cosines of patches `[K, h, w]` and cls `[K]`; the original marks `ever`, bool `[K, h, w]`."""
        good = patches[~ever] if not bool(ever.all()) else patches.flatten()
        marked = patches[ever]
        return cls(
            cls=None if heads is None else heads.mean().item(),
            good=good.median().item(),
            good_mean=good.mean().item(),
            good_p01=good.kthvalue(max(1, round(0.01 * len(good)))).values.item(),
            marked=marked.mean().item() if len(marked) else None,
            cls_way=way,
        )

    def as_dict(self) -> dict[str, float | None]:
        """Return the numbers by name, as in `summary.json`."""
        return asdict(self)

    def holds(self, original: Fidelity, floor: float) -> bool:
        """Return True if a state of this fidelity spoils neither cls nor good tokens, compared with the original.

        Neither may be further from the yardstick than the original is, by more than `SLACK`; cls may be up to `FURTHER`
        times as far where it has moved the way that inpainting moves it, since inpainting leaves what a soft trigger
        does to tokens of ordinary norm, and stops short of a model without the defect. Each must also reach the
        floor, or be a quarter nearer to the yardstick than the original: if there are many outliers, the yardstick
        itself is off by more than the floor allows. Both median and mean of good tokens are checked, so that no part of
        them is given up. The 1st percentile of good tokens may not fall below both the original's and `WORST`. Nothing
        more is required of it, since the yardstick keeps what a soft trigger does to tokens that it never marks.
        """
        if self.good_p01 < min(original.good_p01, WORST) - SLACK:
            return False
        pairs = [(self.good, original.good, SLACK), (self.good_mean, original.good_mean, SLACK)]
        if self.cls is not None and original.cls is not None:
            beyond = (FURTHER - 1) * (1 - original.cls) if (self.cls_way or 0) >= SAME_WAY else 0
            pairs.append((self.cls, original.cls, max(SLACK, beyond)))
        return all(now >= was - slack and (now >= floor or 1 - now <= NEARER * (1 - was)) for now, was, slack in pairs)


@dataclass(frozen=True)
class DefectAxis:
    """The direction d in which defects move tokens after the last block, and the place of ordinary tokens along it.

    A trigger that is not steep moves tokens of ordinary norm too, though less. The yardstick never marks them, and so
    keeps what a good repair takes from them. A token that leans towards d in the yardstick, and lies nearer to ordinary
    tokens now, is compared without its part along d. All else of it, N − 1 dimensions, is compared.
    """

    d: Tensor  # [N], unit norm
    usual: float  # median of x·d over the tokens that the original never marks, in the yardstick
    width: float  # `LEANING` times their median distance from it

    @classmethod
    def of(cls, batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> DefectAxis | None:
        """Find the axis from batches of patches `[…, N]`, the yardstick's and the original's, and marks, bool `[…]`.

        `marks` are what the original marks. Returns None if that is no token, or all of them.
        """
        if len({bool(each) for *_, ever in batches for each in ever.unique()}) < 2:
            return None
        moves = [
            (original[ever].double() - yardstick[ever].double()).sum(dim=0) for yardstick, original, ever in batches
        ]
        moved = torch.stack(moves).sum(dim=0)
        if not 0 < moved.norm().item() < math.inf:
            return None
        d = (moved / moved.norm()).to(batches[0][0])
        along = torch.cat([(yardstick @ d)[~ever] for yardstick, _, ever in batches])
        median = along.median()
        return cls(d, median.item(), LEANING * (along - median).abs().median().item())

    def fair(self, tokens: Tensor, yardstick: Tensor, ever: Tensor, cosines: Tensor) -> Tensor:
        """Return the cosines `[…]` between patches `[…, N]` and the yardstick's, of leaning ones without their part."""
        now, was = tokens @ self.d, yardstick @ self.d
        leaning = ~ever & (was > self.usual + self.width) & (now < was) & (now > self.usual - self.width)
        kept, known = (each[leaning] - part[leaning, None] * self.d for each, part in ((tokens, now), (yardstick, was)))
        found = cosines.clone()
        found[leaning] = torch.maximum(cosines[leaning], _cosines(kept, known))
        return found


@dataclass(frozen=True)
class Snapshot:
    """Measurements of a model on the guard: K images, h × w patches, N width."""

    norms: Tensor  # [blocks, K, h, w]
    ratios: Tensor  # [blocks, K, h, w]: over the median norm of the image
    outlying: Tensor  # bool [blocks, K, h, w]
    standing: Tensor  # bool [K, h, w]: outlying by norm at some block, whatever the current rule marks
    cls: Tensor | None  # [K, N]: last block
    samples: Tensor  # [≤ SAMPLES, h, w, N]: last block's patch tokens of the first images
    to_inpainted: Tensor  # [K, h, w]: cosine of the last block's patches to the inpainted original's
    judged: Tensor  # [K, h, w]: the same, of tokens that lean towards the defect without their part along it
    to_original: Tensor
    cls_to_inpainted: Tensor | None  # [K]
    cls_to_original: Tensor | None
    ever: Tensor  # bool [K, h, w]: what the original marks at some block
    cls_way: float | None = None  # cosine of how cls moved from the original and how inpainting moves it, all images

    @property
    def left(self) -> int:
        """Number of tokens that are outlying at some block."""
        return int(self.outlying.any(dim=0).sum())

    @property
    def finite(self) -> bool:
        """True if all tokens of the last block are finite."""
        return bool(self.norms[-1].isfinite().all())

    def require_finite(self, what: str, remedy: str, error: type[BadInputError] = BadInputError) -> None:
        """Raise `error` if a token is NaN or infinite: such a model is not worth keeping."""
        broken = int((~self.norms[-1].flatten(1).isfinite().all(dim=1)).sum())
        if broken:
            raise error(what, f"its tokens are not finite on {broken} of {self.norms.shape[1]} images", remedy)

    def fidelity(self, to: str = "inpainted") -> Fidelity:
        """Return the cosines to the `inpainted` or the plain `original`."""
        if to == "inpainted":
            return Fidelity.of(self.judged, self.cls_to_inpainted, self.ever, self.cls_way)
        return Fidelity.of(self.to_original, self.cls_to_original, self.ever)

    def defects(self) -> dict[str, Any]:
        """Return the part of `summary.json` about outlying tokens: those at any block, and those of each block."""
        by_block = [
            {
                "block": block,
                "tokens": int(marked.sum()),
                "fraction": marked.float().mean().item(),
                "max_norm": norms.max().item(),
                "median_norm": norms.median().item(),
                "max_ratio": ratios.max().item(),
            }
            for block, (norms, ratios, marked) in enumerate(zip(self.norms, self.ratios, self.outlying, strict=True))
        ]
        worst = max(by_block, key=lambda each: each["max_ratio"])
        return {
            "tokens": self.left,
            "standing": int(self.standing.sum()),
            "fraction": self.left / self.outlying[0].numel(),
            "images": int(self.outlying.any(dim=0).flatten(1).any(dim=1).sum()),
            "max_ratio": worst["max_ratio"],
            "max_norm": worst["max_norm"],
            "median_norm": worst["median_norm"],
            "worst_block": worst["block"],
            "blocks": by_block,
        }


@dataclass(frozen=True)
class Evaluation(Measured):
    """One line of `evaluations.jsonl`: the guard's images after a step."""

    step: int
    outlying: int  # tokens that stand out at some block
    defective_share: float  # of the images
    cls: float | None  # cosines to the inpainted original, as in `Fidelity`
    good: float
    good_p01: float
    marked: float | None
    holds: bool  # True if neither cls nor good tokens are further from it than allowed
    spoilt: bool  # True if they are too far from it even with the remaining outliers inpainted
    best: bool  # True if this is the best state so far


@dataclass
class Guard:
    """The guard's images, with the tokens of the original and of the inpainted original on them."""

    backbone: Backbone
    module: nn.Module
    directions: Directions
    rule: DetectionRule
    images: dict[str, Tensor]  # [3, H, W] by name
    batch_size: int
    device: str
    emit: Emit = silent
    before: Snapshot = field(init=False)
    latest: Snapshot | None = field(init=False, default=None)  # of the last look
    found_before: Retrieval | None = field(init=False, default=None)  # shift retrieval in the original
    _references: list[tuple[Tensor, Tensor]] = field(init=False, default_factory=list)  # inpainted, original [B, T, N]
    _marked: list[Tensor] = field(init=False, default_factory=list)  # bool [B, h, w]
    _axis: DefectAxis | None = field(init=False, default=None)

    def remember(self) -> None:
        """Run the original and the inpainted original; the module must hold the original weights."""
        marks: list[Tensor] = []
        original: list[MarkedBatch] = []
        yardstick = inpainted(self.backbone, self.rule.norm_factor, lambda _, mask: marks.append(mask))
        for pixels in tracked(self._batches(), self.emit, "evaluating the guard", None, "batches"):
            marks.clear()
            reference = last_tokens(yardstick, self.module, pixels).cpu()
            seen = self._run(pixels)
            ever = (torch.stack(marks) | seen.defective).any(dim=0)
            self._references.append((reference, seen.last.cpu()))
            self._marked.append(ever.cpu())
            original.append(seen)
        known = zip(self._references, self._marked, strict=True)
        self._axis = DefectAxis.of([(self._patches(one), self._patches(other), ever) for (one, other), ever in known])
        self.before = self._snapshot(original)
        self.found_before = self.found_again(self.before)

    def look(self) -> Snapshot:
        """Run the module as it is now on the guard's images, and return the snapshot."""
        self.latest = self._snapshot([self._run(pixels) for pixels in self._batches()])
        return self.latest

    def _snapshot(self, seen: Sequence[MarkedBatch]) -> Snapshot:
        """Combine the batches of the guard's images into a snapshot, compared with the references."""
        last = [each.last.cpu() for each in seen]
        pixels = next(iter(self.images.values()))
        grids = [patch_grid(self.backbone, tokens, pixels[None]) for tokens in last]
        to_inpainted, cls_to_inpainted = self._cosines(last, 0)
        to_original, cls_to_original = self._cosines(last, 1)
        return Snapshot(
            norms=torch.cat([each.norms.cpu() for each in seen], dim=1),
            ratios=torch.cat([each.ratios.cpu() for each in seen], dim=1),
            outlying=torch.cat([each.defective.cpu() for each in seen], dim=1),
            standing=torch.cat([each.standing.cpu() for each in seen]),
            cls=torch.cat([tokens[:, 0] for tokens in last]) if self.backbone.has_cls else None,
            samples=torch.cat(grids)[:SAMPLES].clone(),
            to_inpainted=to_inpainted,
            judged=self._judged(last, to_inpainted),
            to_original=to_original,
            cls_to_inpainted=cls_to_inpainted,
            cls_to_original=cls_to_original,
            ever=torch.cat(self._marked),
            cls_way=self._way(last),
        )

    @torch.no_grad()
    def found_again(self, now: Snapshot) -> Retrieval | None:
        """Compute the shift retrieval of a few images with a marked token, for the module as it is now.

        Returns None if no image has one, if the grid is too small, or if the model accepts no image of another size.
        The result is only reported and decides nothing.
        """
        height, width = now.ever.shape[1:]
        if min(height, width) < LEAST_GRID + CELLS:
            return None
        shown = [at for at in range(len(now.samples)) if bool(now.ever[at].any())][:SHIFTED]
        pixels = list(self.images.values())
        found, marked = [], []
        for at in shown:
            view = shifted(pixels[at][None].to(self.device), self.backbone.patch_size)
            try:
                tokens = patch_grid(self.backbone, last_tokens(self.backbone, self.module, view), view)[0].cpu()
            except ValueError:
                return None
            found.append(found_again(now.samples[at], tokens))
            marked.append(now.ever[at, CELLS:, CELLS:])
        return Retrieval.of(torch.stack(found), torch.stack(marked)) if shown else None

    def _cosines(self, last: Sequence[Tensor], which: int) -> tuple[Tensor, Tensor | None]:
        """Compute the cosines of batches of last tokens `[B, T, N]` to a reference: patches `[K, h, w]`, cls `[K]`."""
        pairs = [_cosines(tokens, known[which]) for tokens, known in zip(last, self._references, strict=True)]
        each = torch.cat(pairs)  # [K, T]
        patches = each[:, self.backbone.prefix_tokens :].unflatten(1, self._marked[0].shape[1:])
        return patches, each[:, 0] if self.backbone.has_cls else None

    def _patches(self, last: Tensor) -> Tensor:
        """Return the patch tokens of a batch `[B, T, N]`: a view `[B, h, w, N]`."""
        return last[:, self.backbone.prefix_tokens :].unflatten(1, self._marked[0].shape[1:])

    def _judged(self, last: Sequence[Tensor], to_inpainted: Tensor) -> Tensor:
        """Return the cosines of patches to the inpainted original by which a state is judged, `[K, h, w]`."""
        if self._axis is None:
            return to_inpainted
        cosines = to_inpainted.split([len(tokens) for tokens in last])
        batches = zip(last, self._references, self._marked, cosines, strict=True)
        parts = [
            self._axis.fair(self._patches(tokens), self._patches(yardstick), ever, found)
            for tokens, (yardstick, _), ever, found in batches
        ]
        return torch.cat(parts)

    def _way(self, last: Sequence[Tensor]) -> float | None:
        """Compute the cosine between how cls has moved from the original and how inpainting moves it, over all images.

        Directions are those of unit vectors' differences `[K, N]`. None without cls, or where either has not moved.
        """
        if not self.backbone.has_cls:
            return None
        heads = torch.cat([tokens[:, 0] for tokens in last])
        inpainted_cls, original = (torch.cat([pair[which][:, 0] for pair in self._references]) for which in (0, 1))
        start = normalize(original.double(), dim=-1)
        moved, meant = (normalize(each.double(), dim=-1) - start for each in (heads, inpainted_cls))
        far, near = max(moved.norm().item(), meant.norm().item()), min(moved.norm().item(), meant.norm().item())
        return (moved * meant).sum().item() / (far * near) if near > UNMOVED and math.isfinite(far) else None

    def _spoilt(self, now: Snapshot, floor: float) -> bool:
        """Return True if the weights have spoilt cls or good tokens, apart from the effect of remaining outliers.

        Remaining outliers may disturb good tokens more than those of the original do, for example if the repair of one
        defect brings out another. So the state is judged with its own outliers inpainted.
        """
        if now.fidelity().holds(self.before.fidelity(), floor) or not now.finite:
            return not now.finite
        if not now.left:
            return True
        without = inpainted(self.backbone, self.rule.norm_factor)
        last = [last_tokens(without, self.module, pixels).cpu() for pixels in self._batches()]
        patches, heads = self._cosines(last, 0)
        found = Fidelity.of(self._judged(last, patches), heads, torch.cat(self._marked), self._way(last))
        return not found.holds(self.before.fidelity(), floor)

    def evaluation(self, step: int, now: Snapshot, floor: float, best: Best | None) -> Evaluation:
        """Return the line of one look, compared with the best state so far, or with the original if there is none."""
        fidelity, was = now.fidelity(), self.before.fidelity()
        holds = now.finite and fidelity.holds(was, floor)
        look = Evaluation(
            step=step,
            outlying=now.left,
            defective_share=float(now.outlying.any(dim=0).flatten(1).any(dim=1).float().mean()),
            cls=fidelity.cls,
            good=fidelity.good,
            good_p01=fidelity.good_p01,
            marked=fidelity.marked,
            holds=holds,
            spoilt=self._spoilt(now, floor),
            best=False,
        )
        beaten = now.left < self.before.left if best is None else best.is_beaten_by(look)
        return replace(look, best=holds and beaten)

    def _run(self, pixels: Tensor) -> MarkedBatch:
        return marked_batch(self.backbone, self.module, self.directions, pixels, self.rule)

    def _batches(self) -> list[Tensor]:
        images = list(self.images.values())
        parts = [images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size)]
        return [torch.stack(part).to(self.device) for part in parts]


def _cosines(tokens: Tensor, reference: Tensor) -> Tensor:
    """Compute the cosines of tokens `[…, N]` to a reference; 0 for those that are not finite."""
    return cosine_similarity(tokens.double(), reference.double(), dim=-1).nan_to_num(0.0).float()
