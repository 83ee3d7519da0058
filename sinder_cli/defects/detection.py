"""Which patch tokens are defective: by the predicted direction ν (equation 5), by norm, or by both.

All of it looks at the residual stream before the final norm. Shapes: B images, h × w patches, N width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sinder_cli.defects.rules import MIN_GAP, NORM_FACTOR, Mark
from sinder_cli.defects.settings import DetectionSettings

if TYPE_CHECKING:
    from torch import Tensor

RISE = 1.5  # × its own ratio at the embedding: a patch of much contrast has a large norm from the start, and no defect
CERTAIN = 2.0  # × the norm factor: from there on the norm alone is evidence enough in one block


@dataclass(frozen=True)
class DetectionRule:
    """When a token is marked and when a block is called defective.

    Equation (5), its threshold and `min_tokens` are of SINDER, section 4; the gates on gap and norm are ours.
    """

    threshold: float = 4.0  # marked: logit < mean − 4·std
    min_tokens: int = 3
    min_gap: float = MIN_GAP  # σ₁/σ₂ of the block's direction; 0 for the paper's rule
    margin: int = 1  # border patches that equation (5) never marks: half the neighbourhood's kernel
    norm_factor: float = NORM_FACTOR  # × the median patch norm of the image; 0 for the paper's rule
    mark: Mark = "auto"

    @classmethod
    def of(cls, settings: DetectionSettings) -> DetectionRule:
        """The rule that the settings describe."""
        return cls(
            settings.mask_threshold,
            settings.min_tokens,
            settings.min_gap,
            settings.kernel // 2,
            settings.norm_factor,
            settings.mark,
        )

    def trusts(self, gap: float) -> bool:
        """Whether a direction is determined well enough to call a block defective."""
        return gap >= self.min_gap


def alignments(patches: Tensor, directions: Tensor) -> Tensor:
    """`|cos(x, ν)|` in float32: patches `[…, N]`, directions ν `[S, N]` → `[…, S]`."""
    nu = directions.float() / directions.float().norm(dim=-1, keepdim=True)
    tokens = patches.float()
    return ((tokens @ nu.T) / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-12)).abs()


def alignment_logits(patches: Tensor, direction: Tensor) -> Tensor:
    """`−|cos(x, ν)|` in float32: patches `[B, h, w, N]`, ν `[N]` → `[B, h, w]`."""
    return -alignments(patches, direction[None])[..., 0]


def defect_mask(logits: Tensor, rule: DetectionRule) -> Tensor:
    """Interior tokens with `logit < mean − threshold·std` of their own image: `[B, h, w]` → bool `[B, h, w]`."""
    mean = logits.mean(dim=(1, 2), keepdim=True)
    std = logits.std(dim=(1, 2), keepdim=True)
    mask = logits < mean - rule.threshold * std
    return mask & interior(mask, rule.margin)


def interior(mask: Tensor, margin: int) -> Tensor:
    """True away from the border: bool `[h, w]` for any mask `[…, h, w]`."""
    inside = torch.zeros(mask.shape[-2:], dtype=torch.bool, device=mask.device)
    inside[margin : mask.shape[-2] - margin, margin : mask.shape[-1] - margin] = True
    return inside


def norm_ratios(norms: Tensor) -> Tensor:
    """Norms of patch tokens over the median of their own image, `[B, h, w]`; one that is not finite hides none."""
    return norms / norms.flatten(1).nanmedian(dim=1).values[:, None, None]


def outlying(ratios: Tensor, start: Tensor, factor: float) -> Tensor:
    """Tokens whose norm has come to stand out in some block: bool, of the shape of `ratios` `[…, B, h, w]`.

    `start` `[B, h, w]` are their ratios at the embedding: what stands out there already is a matter of the image.
    """
    return (ratios > factor) & (ratios > RISE * start)


def defective_now(ratios: Tensor, start: Tensor, predicted: Tensor, rule: DetectionRule) -> Tensor:
    """The tokens that are marked by what one block shows of them: `[B, h, w]` each → bool `[B, h, w]`.

    `predicted` are those that equation (5) marks with a direction that is determined. By `auto` a token is marked if it
    is outlying, and either predicted too or so far out that there is no doubt.
    """
    if rule.norm_factor == 0:
        return predicted
    return certain(outlying(ratios, start, rule.norm_factor), ratios, predicted, rule)


def certain(out: Tensor, ratios: Tensor, predicted: Tensor, rule: DetectionRule) -> Tensor:
    """Those of the outlying tokens that are marked by what one block shows of them, bool of the shape of `out`."""
    if rule.mark == "norm":
        return out
    if rule.mark == "weights":
        return out & predicted
    return out & (predicted | (ratios > CERTAIN * rule.norm_factor))


def defective_somewhere(ratios: Tensor, start: Tensor, predicted: Tensor, rule: DetectionRule) -> Tensor:
    """The same for all blocks, `[blocks, B, h, w]`: what stays outlying in the next block is certain as well."""
    now = torch.stack([defective_now(each, start, seen, rule) for each, seen in zip(ratios, predicted, strict=True)])
    if rule.mark != "auto" or rule.norm_factor == 0:
        return now
    out = outlying(ratios, start, rule.norm_factor)
    stays = torch.zeros_like(out)
    stays[:-1] |= out[1:]
    stays[1:] |= out[:-1]
    return now | (out & stays)
