"""Task `dense`: what can be said of dense features without labels, on any images.

(a) Shift retrieval: is a token's nearest neighbour in a shifted view of its image the same place, or within a patch?
(b) Boundary contrast: are neighbours of similar colour more alike than neighbours of unlike colour?
(c) Fidelity of cls, never-marked and marked tokens to the original and to the inpainted original; drift of the Gram
    matrix of an image's tokens; effective rank.
(d) Outlying tokens, and the largest norm over the median: shown, but fewer of them are no success by themselves.

All are taken from the residual stream before the final norm. No figure stands alone: a ruined model, whose tokens hold
little but their place, retrieves better than a clean one.
Shapes: h × w patches, N width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from sinder_cli import Backbone, hookimpl
from sinder_cli.tasks import (
    Dataset,
    Figure,
    Part,
    Pixels,
    Places,
    Scores,
    Scoring,
    Task,
    TaskSettings,
    View,
    mean_figure,
)

if TYPE_CHECKING:
    from torch import Tensor

SINDER_API = 1
CELLS = 2  # patches by which the second view is shifted, down and to the right
WHOLE, SHIFTED = "whole", "shifted"
BLIND = {  # what figures cannot see
    "retrieval": "A ruined model, whose tokens hold little but their place, retrieves well, too.",
    "contrast": "It knows colours, not objects.",
    "fidelity": "It rewards whatever stays near the original.",
    "rank": "Noise has a high rank, too.",
    "outlying": "Fewer of them are no success by themselves.",
}
LEAST_PAIRS = 8  # of neighbours, similar and unlike, for the contrast of an image to be known


class DenseSettings(TaskSettings):
    """Settings of `dense`."""

    similar: float = Field(0.25, gt=0, lt=1)  # quantile of the colour differences up to which neighbours are similar
    unlike: float = Field(0.75, gt=0, lt=1)  # and from which they are unlike

    @model_validator(mode="after")
    def _ordered(self) -> DenseSettings:
        if self.similar >= self.unlike:
            raise ValueError("similar is a smaller quantile than unlike")
        return self


def read(places: Places, settings: DenseSettings) -> Dataset:  # noqa: ARG001
    """Take any images; without any, those that the backbone draws."""
    source = places.images()
    note = f"{len(source):,} images{of(places)}, no labels"
    return Dataset(source, [None] * len(source), note=note)


def of(places: Places) -> str:
    """Return where images come from, in words."""
    return f" of {', '.join(places.data)}" if places.data else ", drawn by the backbone or by sinder"


def views(backbone: Backbone, size: int | None, settings: DenseSettings) -> Mapping[str, View]:  # noqa: ARG001
    """Show images whole, and once more without their first rows and columns."""
    side = size or backbone.image_size
    parts: tuple[Part, ...] = ("stream", "stream_cls", "norms", "colour", "outlying", "outlying_by_block")
    return {WHOLE: View(parts, side), SHIFTED: View(("stream", "outlying"), side, shift=CELLS)}


def score(scoring: Scoring) -> Scores:
    """Return the figures of one side, over the images of the set."""
    import torch

    rows = [_measured(scoring, index) for index in range(len(scoring.dataset.test))]
    found = {
        name: torch.tensor([row.get(name, math.nan) for row in rows], dtype=torch.float64) for name in _names(rows)
    }

    def tokens(name: str, label: str) -> Figure:
        return mean_figure(label, found[name], weights=found[f"{name} tokens"], caution=BLIND["retrieval"])

    figures = [
        tokens("found marked", "shift retrieval, marked"),
        tokens("found near", "shift retrieval, beside marked"),
        tokens("found others", "shift retrieval, others"),
        mean_figure("boundary contrast", found["contrast"], unit="", caution=BLIND["contrast"]),
        mean_figure(
            "boundary contrast, shuffled", found["shuffled"], "neither", unit="", caution="The null: what chance gives."
        ),
        *(
            mean_figure(f"{kind} to {to}", found[f"{kind} {to}"], "neither", unit="", caution=BLIND["fidelity"])
            for to in ("inpainted", "original")
            for kind in ("cls", "good", "marked")
            if f"{kind} {to}" in found
        ),
        mean_figure("Gram drift from original", found["gram"], "neither", unit="", caution=BLIND["fidelity"]),
        mean_figure("effective rank", found["rank"], "neither", unit="", caution=BLIND["rank"]),
    ]
    if scoring.side not in ("smoothed", "blurred"):  # which change tokens at the end, and no block
        figures += [
            mean_figure("outlying tokens", found["outlying"], "neither", caution=BLIND["outlying"]),
            mean_figure("largest norm / median", found["largest"], "neither", unit="", caution=BLIND["outlying"]),
        ]
    broken = int(found["finite"].eq(0).sum())
    words = "image has" if broken == 1 else "images have"
    notes = [f"{broken:,} {words} tokens that are not finite: left out where nothing can be measured"] if broken else []
    if scoring.side not in ("smoothed", "blurred"):
        largest, shares = _by_block(scoring)
        notes.append(f"outlying tokens by block: {', '.join(f'{100 * share:.2g} %' for share in shares)}")
        notes.append(f"largest norm / median by block: {', '.join(f'{ratio:.3g}' for ratio in largest)}")
    return Scores(tuple(figures), by_image=_overall(found), picture=_pictures(scoring), notes=tuple(notes))


def _by_block(scoring: Scoring) -> tuple[list[float], list[float]]:
    """Return, over all images, the largest norm over the image's median in each block, and the outlying share there."""
    import torch

    whole = scoring.features.test[WHOLE]
    worst = [_ratios(whole.part("norms", index)).flatten(1).amax(dim=1) for index in range(len(whole))]
    marked = [whole.part("outlying_by_block", index).float().flatten(1) for index in range(len(whole))]
    shares = sum(each.sum(dim=1) for each in marked) / sum(each.shape[1] for each in marked)
    return torch.stack(worst).amax(dim=0).tolist(), torch.as_tensor(shares).tolist()


def _ratios(norms: Tensor) -> Tensor:
    """Divide norms `[blocks, h, w]` by the median of the image at each block."""
    return norms / norms.flatten(1).nanmedian(dim=1).values[:, None, None]


def _names(rows: list[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _overall(found: Mapping[str, Tensor]) -> Tensor:
    """Rank images by the share of their tokens that are found again."""
    import torch

    kinds = ("marked", "near", "others")
    total, count = (torch.stack([found[f"found {kind}{end}"] for kind in kinds]).sum(dim=0) for end in ("", " tokens"))
    return total / count


def _measured(scoring: Scoring, index: int) -> dict[str, float]:
    """Return all numbers of one image."""
    whole = scoring.features.test[WHOLE]
    patches = whole.part("stream", index)
    marked = scoring.original.test[WHOLE].part("outlying", index)
    found = _retrieval(patches, scoring.features.test[SHIFTED].part("stream", index), marked)
    contrast, shuffled = boundary_contrast(
        patches, whole.part("colour", index), scoring.settings.similar, scoring.settings.unlike, scoring.seed + index
    )
    numbers = found | {"contrast": contrast, "shuffled": shuffled, "rank": effective_rank(patches)}
    numbers["finite"] = float(bool(patches.isfinite().all()))
    numbers |= _fidelity(scoring, index, patches, marked)
    numbers["outlying"] = whole.part("outlying", index).float().mean().item()
    numbers["largest"] = _ratios(whole.part("norms", index)).max().item()
    numbers["finite"] *= float(math.isfinite(numbers["largest"]))
    return numbers


def _retrieval(patches: Tensor, view: Tensor, marked: Tensor) -> dict[str, float]:
    """Return how many tokens are found again, and how many there are, by kind: marked, beside marked, others."""
    from torch.nn.functional import max_pool2d

    from sinder_cli.tasks import found_again

    found = found_again(patches, view)
    around = max_pool2d(marked.float()[None, None], 3, stride=1, padding=1)[0, 0].bool()
    kinds = {"marked": marked, "near": around & ~marked, "others": ~around}
    numbers = {}
    for kind, group in kinds.items():
        seen = group[CELLS:, CELLS:]
        numbers[f"found {kind}"] = float((found & seen).sum())
        numbers[f"found {kind} tokens"] = float(seen.sum())
    return numbers


def boundary_contrast(
    patches: Tensor, colours: Tensor, similar: float, unlike: float, seed: int
) -> tuple[float, float]:
    """Return the mean cosine of neighbours of similar colour less that of neighbours of unlike colour, and a null.

    Neighbours are patches at distance one, right or below. Similar and unlike are those whose colours differ less than
    the first quantile of the image's differences, and more than the second. The null permutes the colours of patches.
    patches `[h, w, N]`, colours `[h, w, 3]`.
    """
    import torch
    from torch.nn.functional import normalize

    tokens = normalize(patches - patches.mean(dim=(0, 1)), dim=-1)
    cosines = torch.cat(
        [(tokens[1:] * tokens[:-1]).sum(-1).flatten(), (tokens[:, 1:] * tokens[:, :-1]).sum(-1).flatten()]
    )

    def contrast(colours: Tensor) -> float:
        down, right = colours[1:] - colours[:-1], colours[:, 1:] - colours[:, :-1]
        differences = torch.cat([down.norm(dim=-1).flatten(), right.norm(dim=-1).flatten()])
        low, high = (torch.quantile(differences, at) for at in (similar, unlike))
        alike, apart = cosines[differences <= low], cosines[differences >= high]
        if min(len(alike), len(apart)) < LEAST_PAIRS or not bool(high > low):
            return math.nan
        return (alike.mean() - apart.mean()).item()

    order = torch.randperm(colours.shape[0] * colours.shape[1], generator=torch.Generator().manual_seed(seed))
    return contrast(colours), contrast(colours.flatten(0, 1)[order].view_as(colours))


def effective_rank(patches: Tensor) -> float:
    """Return the exponential of the entropy of the normalized singular values of an image's centred tokens."""
    import torch

    if not bool(patches.isfinite().all()):
        return math.nan
    tokens = (patches - patches.mean(dim=(0, 1))).flatten(0, 1)
    gram = (tokens.T @ tokens if tokens.shape[0] > tokens.shape[1] else tokens @ tokens.T).double()
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = values.sum()
    if not bool(total > 0):  # one colour, or NaN
        return math.nan
    shares = values / total
    return math.exp(-(shares * shares.clamp_min(1e-300).log()).sum().item())


def _fidelity(scoring: Scoring, index: int, patches: Tensor, marked: Tensor) -> dict[str, float]:
    """Return cosines of cls, never-marked and marked tokens to the original and to the inpainted original."""
    from torch.nn.functional import cosine_similarity

    numbers: dict[str, float] = {}
    for to, side in (("original", scoring.original), ("inpainted", scoring.inpainted)):
        if side is None:
            continue
        reference = side.test[WHOLE]
        cosines = cosine_similarity(patches, reference.part("stream", index), dim=-1)
        for kind, group in (("good", ~marked), ("marked", marked)):
            numbers[f"{kind} {to}"] = cosines[group].mean().item() if bool(group.any()) else math.nan
        if scoring.has_cls:
            own = scoring.features.test[WHOLE].part("stream_cls", index)
            numbers[f"cls {to}"] = cosine_similarity(own, reference.part("stream_cls", index), dim=-1).item()
        if to == "original":
            numbers["gram"] = gram_drift(patches, reference.part("stream", index))
    return numbers


def gram_drift(patches: Tensor, reference: Tensor) -> float:
    """Return the root mean square difference of the cosines between all pairs of tokens, to those of the reference.

    For unit tokens A and B, `[T, N]`: ‖AAᵀ − BBᵀ‖² = ‖AᵀA‖² + ‖BᵀB‖² − 2 ‖AᵀB‖², which needs no T × T matrix.
    """
    from torch.nn.functional import normalize

    one, other = (normalize(each.flatten(0, 1).double(), dim=-1) for each in (patches, reference))
    squared = (one.T @ one).square().sum() + (other.T @ other).square().sum() - 2 * (one.T @ other).square().sum()
    return (squared.clamp_min(0).sqrt() / len(one)).item()


def _pictures(scoring: Scoring) -> Callable[[int], Pixels]:
    from sinder_cli.tasks import pca_picture

    return lambda index: pca_picture(
        scoring.features.test[WHOLE].part("stream", index), scoring.original.test[WHOLE].part("stream", index)
    )


TASK = Task(
    name="dense",
    summary="shift retrieval, boundary contrast, fidelity and outliers, without labels",
    protocol="No labels; tokens of the last block before the final norm. Shift retrieval: nearest neighbour by cosine,"
    " centred per image, in a view shifted by 2 patches, within 1 patch. Boundary contrast: neighbours of similar less"
    " neighbours of unlike colour. A ruined model retrieves well too: no figure stands alone.",
    read=read,
    views=views,
    score=score,
    settings=DenseSettings,
)


@hookimpl
def sinder_task() -> Task:
    """Return the task."""
    return TASK
