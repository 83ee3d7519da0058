"""The guard: images that a repair never trains on, and what it is judged by on them while it runs.

The yardstick is the inpainted original (`defects.inpainting`): its cls and its never-marked tokens say what the network
would say without outliers. Nearness to the original is no yardstick, since outliers spoil cls and good tokens by
attention; the number of outliers alone is none either, since a ruined model has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cosine_similarity

from sinder_cli.backbone.contract import Backbone
from sinder_cli.defects.detection import DetectionRule
from sinder_cli.defects.inpainting import inpainted
from sinder_cli.defects.settings import SLACK
from sinder_cli.defects.shift import CELLS, Retrieval, found_again, shifted
from sinder_cli.defects.tokens import last_tokens, patch_grid
from sinder_cli.errors import BadInputError
from sinder_cli.events import Emit, silent, tracked
from sinder_cli.images.loading import shuffled
from sinder_cli.repairing.forward import Directions
from sinder_cli.repairing.scan import Seen, see

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sinder_cli.repairing.loop import Best

WORST = 0.5  # the cosine under which the worst hundredth of good tokens is spoilt, whatever the median is
LEAST_GUARD = 4  # images, where as many can be spared or drawn
SAMPLES = 6  # images whose patch tokens are kept for pictures
SHIFTED = 2  # of these, with a marked token, are looked at in a shifted view too
LEAST_GRID = 5  # patches on a side that every backbone takes
NEARER = 0.75  # of the original's distance to the inpainted original: what lies nearer need not reach the floor


@dataclass(frozen=True)
class Fidelity:
    """Cosines to a yardstick on the guard, last block, before the final norm; None where there is nothing."""

    cls: float | None  # mean
    good: float  # patches that the original never marks: median
    good_mean: float  # mean
    good_p01: float  # and 1st percentile
    marked: float | None  # patches that the original marks at some block: mean

    @classmethod
    def of(cls, patches: Tensor, heads: Tensor | None, ever: Tensor) -> Fidelity:
        """From cosines of patches `[K, h, w]` and of cls `[K]`; `ever`, bool `[K, h, w]`: what the original marks."""
        good = patches[~ever] if not bool(ever.all()) else patches.flatten()
        marked = patches[ever]
        return cls(
            cls=None if heads is None else heads.mean().item(),
            good=good.median().item(),
            good_mean=good.mean().item(),
            good_p01=good.kthvalue(max(1, round(0.01 * len(good)))).values.item(),
            marked=marked.mean().item() if len(marked) else None,
        )

    def as_dict(self) -> dict[str, float | None]:
        """By name, as `summary.json` has it."""
        return asdict(self)

    def holds(self, original: Fidelity, floor: float) -> bool:
        """Whether a state of this fidelity spoils neither cls nor good tokens, given the original's own.

        Neither may lie further from the yardstick than the original does, by more than `SLACK`; and each reaches the
        floor, or is nearer by a quarter of the way: where outliers are many, the yardstick itself is off by more than
        the floor allows. Of good tokens both median and mean are asked, so that no part of them is given up. The worst
        hundredth of good tokens may not fall under both the original's and `WORST`: no
        more is asked of it, since the yardstick leaves in what a soft trigger does to tokens that it never marks.
        """
        if self.good_p01 < min(original.good_p01, WORST) - SLACK:
            return False
        pairs = [(self.good, original.good), (self.good_mean, original.good_mean)]
        pairs += [(self.cls, original.cls)] if self.cls is not None and original.cls is not None else []
        return all(now >= was - SLACK and (now >= floor or 1 - now <= NEARER * (1 - was)) for now, was in pairs)


@dataclass(frozen=True)
class Snapshot:
    """A model on the guard's images: K of them, h × w patches, N width."""

    norms: Tensor  # [blocks, K, h, w]
    ratios: Tensor  # [blocks, K, h, w]: over the median norm of the image
    outlying: Tensor  # bool [blocks, K, h, w]
    standing: Tensor  # bool [K, h, w]: outlying by norm at some block, whatever the rule in force marks
    cls: Tensor | None  # [K, N]: last block
    samples: Tensor  # [≤ SAMPLES, h, w, N]: last block's patch tokens of the first images
    to_inpainted: Tensor  # [K, h, w]: cosine of the last block's patches to the inpainted original's
    to_original: Tensor
    cls_to_inpainted: Tensor | None  # [K]
    cls_to_original: Tensor | None
    ever: Tensor  # bool [K, h, w]: what the original marks at some block

    @property
    def left(self) -> int:
        """Tokens that are outlying at some block."""
        return int(self.outlying.any(dim=0).sum())

    @property
    def finite(self) -> bool:
        """Whether all tokens of the last block are."""
        return bool(self.norms[-1].isfinite().all())

    def require_finite(self, what: str, remedy: str, error: type[BadInputError] = BadInputError) -> None:
        """Raises an `error` where a token is NaN or infinite: nothing of such a model is worth keeping."""
        broken = int((~self.norms[-1].flatten(1).isfinite().all(dim=1)).sum())
        if broken:
            raise error(what, f"its tokens are not finite on {broken} of {self.norms.shape[1]} images", remedy)

    def fidelity(self, to: str = "inpainted") -> Fidelity:
        """Cosines to the `inpainted` or the plain `original`."""
        if to == "inpainted":
            return Fidelity.of(self.to_inpainted, self.cls_to_inpainted, self.ever)
        return Fidelity.of(self.to_original, self.cls_to_original, self.ever)

    def defects(self) -> dict[str, Any]:
        """What `summary.json` says: tokens outlying at some block, and block by block."""
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
class Evaluation:
    """One line of `evaluations.jsonl`: the guard's images after a step."""

    step: int
    outlying: int  # tokens that stand out at some block
    defective_share: float  # of the images
    cls: float | None  # cosines to the inpainted original, as in `Fidelity`
    good: float
    good_p01: float
    marked: float | None
    holds: bool  # whether neither cls nor good tokens are further from it than they may be
    spoilt: bool  # whether they are so without the outliers that are left, too
    best: bool  # whether this is the best state so far


@dataclass
class Guard:
    """The guard's images, and what the original and the inpainted original make of them."""

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

    def remember(self) -> None:
        """Run the original and the inpainted original; the module must hold the original weights."""
        marks: list[Tensor] = []
        original: list[Seen] = []
        yardstick = inpainted(self.backbone, self.rule.norm_factor, lambda _, mask: marks.append(mask))
        for pixels in tracked(self._batches(), self.emit, "looking at the guard", None, "batches"):
            marks.clear()
            reference = last_tokens(yardstick, self.module, pixels).cpu()
            seen = self._see(pixels)
            ever = (torch.stack(marks) | seen.defective).any(dim=0)
            self._references.append((reference, seen.last.cpu()))
            self._marked.append(ever.cpu())
            original.append(seen)
        self.before = self._snapshot(original)
        self.found_before = self.found_again(self.before)

    def look(self) -> Snapshot:
        """The guard's images as the module shows them now."""
        self.latest = self._snapshot([self._see(pixels) for pixels in self._batches()])
        return self.latest

    def _snapshot(self, seen: Sequence[Seen]) -> Snapshot:
        """What batches of the guard's images show, held against the references."""
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
            to_original=to_original,
            cls_to_inpainted=cls_to_inpainted,
            cls_to_original=cls_to_original,
            ever=torch.cat(self._marked),
        )

    @torch.no_grad()
    def found_again(self, now: Snapshot) -> Retrieval | None:
        """Shift retrieval of a few images with a marked token, as the module is now.

        None where no image has one, or where the model takes no image of another size: it decides nothing.
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
        """Of batches of last tokens `[B, T, N]` to a reference of theirs: of patches `[K, h, w]`, of cls `[K]`."""
        pairs = [_cosines(tokens, known[which]) for tokens, known in zip(last, self._references, strict=True)]
        each = torch.cat(pairs)  # [K, T]
        patches = each[:, self.backbone.prefix_tokens :].unflatten(1, self._marked[0].shape[1:])
        return patches, each[:, 0] if self.backbone.has_cls else None

    def _spoilt(self, now: Snapshot, floor: float) -> bool:
        """Whether the weights have lost what good tokens say, whatever outliers they leave.

        Where some are left, they may disturb good tokens more than those of the original do, as where the repair of
        one defect brings out another; so the state is judged with its own outliers inpainted.
        """
        if now.fidelity().holds(self.before.fidelity(), floor) or not now.finite:
            return not now.finite
        if not now.left:
            return True
        without = inpainted(self.backbone, self.rule.norm_factor)
        last = [last_tokens(without, self.module, pixels).cpu() for pixels in self._batches()]
        found = Fidelity.of(*self._cosines(last, 0), torch.cat(self._marked))
        return not found.holds(self.before.fidelity(), floor)

    def evaluation(self, step: int, now: Snapshot, floor: float, best: Best | None) -> Evaluation:
        """One look as a line, against the best state so far; without one, against the original."""
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

    def _see(self, pixels: Tensor) -> Seen:
        return see(self.backbone, self.module, self.directions, pixels, self.rule)

    def _batches(self) -> list[Tensor]:
        images = list(self.images.values())
        parts = [images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size)]
        return [torch.stack(part).to(self.device) for part in parts]


def _cosines(tokens: Tensor, reference: Tensor) -> Tensor:
    """Cosines of tokens `[…, N]`; 0 where one is not finite."""
    return cosine_similarity(tokens.double(), reference.double(), dim=-1).nan_to_num(0.0).float()


def guard_size(count: int, asked: int | None) -> int:
    """How many of so many images the guard takes: a tenth, at least 4 and at most 64; never more than half."""
    wanted = asked if asked is not None else min(max(LEAST_GUARD, round(0.1 * count)), 64)
    return min(wanted, count // 2)


def guard_sizes(given: int, drawn: int, asked: int | None) -> tuple[int, int]:
    """How many of the user's images the guard takes, and how many drawn ones: these alone, or to make up for few."""
    own = guard_size(given, asked)
    if own == 0:
        return 0, guard_size(drawn, asked)
    more = max(0, LEAST_GUARD - own) if asked is None else 0
    return own, min(guard_size(drawn, asked), more)


def guarded(kinds: Sequence[tuple[int, ...]], size: int, seed: int = 0) -> list[int]:
    """Which images the guard takes, by index, in their order: every kind, and half of them with a defect if there are.

    Within a kind they are drawn by the seed: images that follow one another may show the same thing.

    `kinds` are those of the images, empty without a defect. At least half of the images of a kind are left to train on,
    so that one of which there is a single image is not on the guard.
    """
    by_kind: dict[tuple[int, ...], list[int]] = {}
    for index in islice(shuffled(len(kinds), seed), len(kinds)):
        kind = kinds[index]
        by_kind.setdefault(kind, []).append(index)
    clean = by_kind.pop((), [])
    offered = [indices[: len(indices) // 2] for _, indices in sorted(by_kind.items(), key=lambda each: len(each[1]))]
    defective = [group[at] for at in range(max(map(len, offered), default=0)) for group in offered if at < len(group)]
    share = sum(map(len, by_kind.values())) / max(1, len(kinds))
    wanted = min(len(defective), max(round(size * share), (size + 1) // 2))
    taken = defective[:wanted]
    rest = [*clean[: len(clean) if not by_kind else max(1, len(clean) // 2)], *defective[wanted:]]
    return sorted([*taken, *rest[: size - len(taken)]])
