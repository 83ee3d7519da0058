"""Detection of defective patch tokens: by the predicted direction ν (equation 5), by norm, or by both.

All functions work on the residual stream before the final norm. Shapes: B images, h × w patches, N width.

A model without such tokens is healthy. Three judges say so, each of what it has been asked:

- `repairing.scan.Scan.healthy`: the rule in force marks no token in any block of any image, so that a repair has
  nothing to train. The repair's verdict is `healthy` only if no token is `standing_out` either.
- `analysis.gain`: the same, before a repair; as it asks what outliers cost, a rule by angles alone (`norm_factor` 0)
  gets the default factor.
- `analysis.verdict`: no norm stands out in any block, whatever the rule makes of it. This describes the model, so it
  does not depend on `mark`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sinder_cli.defects.settings import CERTAIN, MIN_GAP, NORM_FACTOR, RISE, DetectionSettings, Mark

if TYPE_CHECKING:
    from torch import Tensor


ENOUGH_TO_COMPARE = 5  # images: among fewer, the usual norm is not known
FLOODED = 2.0  # × the usual norm at a block: in a healthy DINOv2, the median patch and cls stay below 1.4 ×


@dataclass(frozen=True)
class DetectionRule:
    """The rule by which tokens are marked and blocks are called defective.

    Equation (5), its threshold and `min_tokens` are from SINDER, section 4; the conditions on gap and norm are ours.
    """

    threshold: float = 4.0  # marked: logit < mean − 4·std
    min_tokens: int = 3
    min_gap: float = MIN_GAP  # σ₁/σ₂ of the block's direction; 0 for the paper's rule
    margin: int = 1  # border patches that equation (5) never marks: half the neighbourhood's kernel
    norm_factor: float = NORM_FACTOR  # × the median patch norm of the image; 0 for the paper's rule
    mark: Mark = "auto"

    @classmethod
    def of(cls, settings: DetectionSettings) -> DetectionRule:
        """Return the rule that the settings describe."""
        return cls(
            settings.mask_threshold,
            settings.min_tokens,
            settings.min_gap,
            settings.kernel // 2,
            settings.norm_factor,
            settings.mark,
        )

    def trusts(self, gap: float) -> bool:
        """Return True if a direction is determined well enough to call a block defective."""
        return gap >= self.min_gap

    @property
    def marks_by_norm(self) -> bool:
        """True if a norm alone can mark a token, whatever the direction."""
        return self.norm_factor > 0 and self.mark != "weights"

    def can_mark(self, gap: float) -> bool:
        """Return True if a token can be marked in a block whose direction has this gap."""
        return self.marks_by_norm or self.trusts(gap)


def standing_out(rule: DetectionRule) -> DetectionRule:
    """Return the rule for verdicts: tokens that surely stand out by norm count, whatever marks tokens for training."""
    return replace(rule, mark="norm" if rule.mark == "norm" else "auto", norm_factor=rule.norm_factor or NORM_FACTOR)


def alignments(patches: Tensor, directions: Tensor) -> Tensor:
    """Compute `|cos(x, ν)|` in float32: patches `[…, N]`, directions ν `[S, N]` → `[…, S]`."""
    nu = directions.float() / directions.float().norm(dim=-1, keepdim=True)
    tokens = patches.float()
    return ((tokens @ nu.T) / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-12)).abs()


def alignment_logits(patches: Tensor, direction: Tensor) -> Tensor:
    """Compute `−|cos(x, ν)|` in float32: patches `[B, h, w, N]`, ν `[N]` → `[B, h, w]`."""
    return -alignments(patches, direction[None])[..., 0]


def defect_mask(logits: Tensor, rule: DetectionRule) -> Tensor:
    """Mark interior tokens with `logit < mean − threshold·std` of their own image: `[B, h, w]` → bool `[B, h, w]`."""
    mean = logits.mean(dim=(1, 2), keepdim=True)
    std = logits.std(dim=(1, 2), keepdim=True)
    mask = logits < mean - rule.threshold * std
    return mask & interior(mask, rule.margin)


def interior(mask: Tensor, margin: int) -> Tensor:
    """Return a mask that is True away from the border: bool `[h, w]` for any mask `[…, h, w]`."""
    inside = torch.zeros(mask.shape[-2:], dtype=torch.bool, device=mask.device)
    inside[margin : mask.shape[-2] - margin, margin : mask.shape[-1] - margin] = True
    return inside


def norm_ratios(norms: Tensor) -> Tensor:
    """Divide the norms of patch tokens, `[B, h, w]`, by the median of their own image, which ignores NaN."""
    return norms / norms.flatten(1).nanmedian(dim=1).values[:, None, None]


def outlying(ratios: Tensor, start: Tensor, factor: float) -> Tensor:
    """Mark tokens whose norm stands out, and has risen since the embedding: bool, as `ratios` `[…, B, h, w]`.

    `start` `[B, h, w]` are the ratios at the embedding: a token that stands out there already does so by its image.
    """
    return (ratios > factor) & (ratios > RISE * start)


@dataclass(frozen=True)
class BlockEvidence:
    """What the patch tokens after one block show, `[B, h, w]` each."""

    norms: Tensor
    ratios: Tensor  # norm over the median norm of the image
    predicted: Tensor  # bool: equation (5), with a direction that is determined


def block_evidence(patches: Tensor, logits: Tensor, gap: float, rule: DetectionRule) -> BlockEvidence:
    """Return the evidence of one block, from its patches `[B, h, w, N]` and their logits to its direction."""
    norms = patches.float().norm(dim=-1)
    return BlockEvidence(norms, norm_ratios(norms), defect_mask(logits, rule) & rule.trusts(gap))


def defective_now(ratios: Tensor, start: Tensor, predicted: Tensor, rule: DetectionRule) -> Tensor:
    """Mark the defective tokens by the evidence of one block: `[B, h, w]` each → bool `[B, h, w]`.

    `predicted` are those that equation (5) marks with a direction that is determined. With `auto`, a token is marked if
    it is outlying, and either predicted too or so far out that there is no doubt.
    """
    if rule.norm_factor == 0:
        return predicted
    return certain(outlying(ratios, start, rule.norm_factor), ratios, predicted, rule)


def certain(out: Tensor, ratios: Tensor, predicted: Tensor, rule: DetectionRule) -> Tensor:
    """Return those of the outlying tokens that the evidence of one block marks, bool of the shape of `out`."""
    if rule.mark == "norm":
        return out
    if rule.mark == "weights":
        return out & predicted
    return out & (predicted | (ratios > CERTAIN * rule.norm_factor))


def defective_somewhere(ratios: Tensor, start: Tensor, predicted: Tensor, rule: DetectionRule) -> Tensor:
    """Mark as `defective_now` in all blocks, `[blocks, B, h, w]`; with `auto`, also tokens outlying twice in a row."""
    if rule.norm_factor == 0:
        return predicted
    return certain_somewhere(outlying(ratios, start, rule.norm_factor), ratios, predicted, rule)


def certain_somewhere(out: Tensor, ratios: Tensor, predicted: Tensor, rule: DetectionRule) -> Tensor:
    """Return those of the outlying tokens that are `certain`, or with `auto` outlying twice in a row, as `out`.

    All are `[blocks, B, h, w]`.
    """
    now = certain(out, ratios, predicted, rule)
    if rule.mark != "auto":
        return now
    stays = torch.zeros_like(out)
    stays[:-1] |= out[1:]
    stays[1:] |= out[:-1]
    return now | (out & stays)


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


# Binomial 3 × 3 and the usual integer 5 × 5 Gaussian, as in the authors' code; weights are renormalized afterwards.
GAUSSIANS = {
    3: [[1, 2, 1], [2, 4, 2], [1, 2, 1]],
    5: [[1, 4, 7, 4, 1], [4, 16, 26, 16, 4], [7, 26, 41, 26, 7], [4, 16, 26, 16, 4], [1, 4, 7, 4, 1]],
}


def learning_targets(patches: Tensor, logits: Tensor, mask: Tensor, kernel: int, temperature: float) -> Tensor:
    """Return the weighted neighbourhood average of each masked token, `[M, N]`, in row-major order of the mask.

    patches `[h, w, N]`, logits `[h, w]`, mask bool `[h, w]`, True in the interior only. Weights over the
    kernel × kernel neighbourhood, the token itself included, are `exp(logit/τ) · gaussian`, renormalized.
    """
    reach = kernel // 2
    offsets = torch.arange(-reach, reach + 1, device=patches.device)
    rows, columns = mask.nonzero(as_tuple=True)  # [M]
    r = rows[:, None, None] + offsets[:, None]  # [M, k, 1]
    c = columns[:, None, None] + offsets[None, :]  # [M, 1, k]
    gaussian = torch.tensor(GAUSSIANS[kernel], dtype=torch.float32, device=patches.device)
    near = logits[r, c]  # [M, k, k]
    near = near - near.amax(dim=(1, 2), keepdim=True)  # does not change the weights, and avoids 0/0 at a small τ
    weights = torch.exp(near / temperature) * gaussian
    weights = weights / weights.sum(dim=(1, 2), keepdim=True)
    return torch.einsum("mij,mijn->mn", weights, patches[r, c].float())


def neighbour_averages(patches: Tensor, marked: Tensor) -> Tensor:
    """Return the average of each token's unmarked neighbours: `[h, w, N]`, marked bool `[h, w]` → `[h, w, N]` float32.

    The eight neighbours have the weights of the binomial 3 × 3 kernel. A marked token without an unmarked neighbour
    uses marked ones that have been averaged already, so that marked regions are filled inwards. If every token is
    marked, each is its own average.
    """
    tokens = patches.float()
    filled, known = tokens, ~marked
    if not bool(known.any()):
        return tokens
    while not bool(known.all()):
        sums, weights = _binomial_sums(filled, known)
        reached = ~known & (weights > 0)
        filled = torch.where(reached[..., None], sums / weights.clamp_min(1)[..., None], filled)
        known = known | reached
    sums, weights = _binomial_sums(tokens, ~marked)  # an unmarked token uses only unmarked neighbours
    whole = ~marked & (weights > 0)
    return torch.where(whole[..., None], sums / weights.clamp_min(1)[..., None], filled)


def _binomial_sums(tokens: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted sum over the known neighbours of each token `[h, w, N]`, and that of the weights `[h, w]`."""
    h, w, _ = tokens.shape
    sums, weights = torch.zeros_like(tokens), torch.zeros(h, w, device=tokens.device)
    padded = torch.nn.functional.pad(tokens * known[..., None], (0, 0, 1, 1, 1, 1))
    present = torch.nn.functional.pad(known.float(), (1, 1, 1, 1))
    for i in range(3):
        for j in range(3):
            weight = GAUSSIANS[3][i][j] * ((i, j) != (1, 1))
            if weight:
                sums += weight * padded[i : i + h, j : j + w]
                weights += weight * present[i : i + h, j : j + w]
    return sums, weights


def neighbour_distances(patches: Tensor, marked: Tensor) -> Tensor:
    """Return the distance of each token to its unmarked neighbours' average: `[h, w, N]`, bool `[h, w]` → `[h, w]`."""
    return (patches.float() - neighbour_averages(patches, marked)).norm(dim=-1)


SETTLED_QUANTILE = 0.9  # of the distances of unmarked tokens: a marked token no further away than this has settled


def unsettled(patches: Tensor, marked: Tensor) -> Tensor:
    """Return the marked tokens that are further from their neighbours than 90 % of unmarked ones: bool `[h, w]`."""
    if bool(marked.all()):
        return marked
    distances = neighbour_distances(patches, marked)
    usual = distances[~marked]
    kth = max(1, round(SETTLED_QUANTILE * len(usual)))
    return marked & (distances > usual.kthvalue(kth).values)


LEANING = 3.0  # × the median distance from the median: two standard deviations of a Gaussian


def leaning(patches: Tensor, marked: Tensor) -> Tensor:
    """Return the unmarked tokens that the defect moves too, though less: bool `[h, w]`.

    A trigger that is not steep is activated a little by many tokens, sometimes by whole surfaces; and GELU and SiLU
    fall below zero before they rise. Tokens are projected on the mean difference between marked tokens and their
    neighbours' average. Those returned are further from the median of unmarked tokens than `LEANING` times the median
    distance from it, on either side. patches `[h, w, N]`, marked bool `[h, w]`.
    """
    if bool(marked.all()) or not bool(marked.any()):
        return torch.zeros_like(marked)
    tokens = patches.float()
    along = tokens @ (tokens - neighbour_averages(tokens, marked))[marked].mean(dim=0)  # [h, w]
    usual = along[~marked]
    median = usual.median()
    return ~marked & ((along - median).abs() > LEANING * (usual - median).abs().median())
