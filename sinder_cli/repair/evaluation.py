"""What a repair changes, seen on a fixed set of images: token norms, defects and the cls token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cosine_similarity

from sinder_cli.backbone.describe import Backbone
from sinder_cli.defects.detection import DetectionRule, alignment_logits, defect_mask
from sinder_cli.defects.tokens import last_tokens, outlier_mask, patch_grid, residual_stream
from sinder_cli.errors import BadInputError
from sinder_cli.events import Emit, tracked
from sinder_cli.images.loading import load_in_order, readable, require_some
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.sources import ImageSource
from sinder_cli.repair.forward import Directions
from sinder_cli.repair.settings import RepairSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLES = 6  # images whose patch tokens are kept for pictures


@dataclass(frozen=True)
class Snapshot:
    """The last block's tokens, before the final norm, summed up over a set of images."""

    norms: Tensor  # [K, h, w] patch-token norms
    cls: Tensor | None  # [K, N]
    samples: Tensor  # [≤ SAMPLES, h, w, N] patch tokens of the first images

    def require_finite(self, what: str, remedy: str, error: type[BadInputError] = BadInputError) -> None:
        """Raises an `error` where a token is NaN or infinite: nothing of such a model is worth keeping."""
        broken = int((~self.norms.flatten(1).isfinite().all(dim=1)).sum())
        if broken:
            raise error(what, f"its tokens are not finite on {broken} of {len(self.norms)} images", remedy)

    def defects(self) -> dict[str, float]:
        """Share and number of patch tokens above 3 × their image's median norm; largest and median norm."""
        medians = self.norms.flatten(1).median(dim=1).values
        ratios = self.norms.flatten(1).max(dim=1).values / medians
        outliers = outlier_mask(self.norms)
        return {
            "fraction": outliers.float().mean().item(),
            "tokens": int(outliers.sum()),
            "max_norm": self.norms.max().item(),
            "median_norm": self.norms.median().item(),
            "max_ratio": ratios.max().item(),
        }


@dataclass(frozen=True)
class Evaluation:
    """One line of `evaluations.jsonl`: the model after a step, on images that are held out of its training."""

    step: int
    masked_share: float  # of the patch tokens: marked by equation (5) in the first defective block of their image
    defective_share: float  # of the images
    cls_cosine: float | None  # to the original, mean; None for a backbone without cls


def evaluation_images(
    source: ImageSource, preprocess: Preprocessing, chosen: Sequence[int], unreadable: dict[str, str], emit: Emit
) -> dict[str, Tensor]:
    """The readable ones of the chosen images, `[3, H, W]` by name.

    Those that cannot be decoded are named and added to `unreadable`. If none can, any others are taken, as many.
    Raises `BadInputError` where no image can be decoded.
    """
    most = len(chosen)
    for indices in (chosen, range(len(source))):
        loaded = tracked(load_in_order(source, preprocess, indices), emit, "reading images", len(indices), "images")
        images = dict(islice(readable(loaded, unreadable, emit), most))
        if images:
            return images
    require_some(0, len(unreadable))
    return {}


def take_snapshot(
    backbone: Backbone,
    module: nn.Module,
    images: Sequence[Tensor],
    batch_size: int,
    device: str,
    emit: Emit,
    phase: str,
) -> Snapshot:
    """Run the images `[3, H, W]` through the backbone and keep what a comparison needs."""
    norms: list[Tensor] = []
    cls: list[Tensor] = []
    samples: list[Tensor] = []
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    for batch in tracked(batches, emit, phase, len(batches), "batches"):
        pixels = torch.stack(list(batch)).to(device)
        tokens = last_tokens(backbone, module, pixels)
        patches = patch_grid(backbone, tokens, pixels)
        norms.append(patches.norm(dim=-1).cpu())
        cls.append(tokens[:, 0].cpu())
        if sum(len(part) for part in samples) < SAMPLES:
            samples.append(patches.cpu())
    return Snapshot(torch.cat(norms), torch.cat(cls) if backbone.has_cls else None, torch.cat(samples)[:SAMPLES])


@torch.no_grad()
def evaluate(
    step: int,
    backbone: Backbone,
    module: nn.Module,
    directions: Directions,
    images: Sequence[Tensor],
    before: Snapshot,
    settings: RepairSettings,
    device: str,
) -> Evaluation:
    """Look at the images `[3, H, W]` that `before` is a snapshot of, with the module as it is after a step."""
    marked = defective = tokens = 0
    cosines: list[Tensor] = []
    for start in range(0, len(images), settings.batch_size):
        pixels = torch.stack(list(images[start : start + settings.batch_size])).to(device)
        masks, last = _first_masks(backbone, module, directions, pixels, DetectionRule.of(settings))
        marked += int(masks.sum())
        tokens += masks.numel()
        defective += int(masks.flatten(1).any(dim=1).sum())
        if before.cls is not None:
            original = before.cls[start : start + len(pixels)]
            cosines.append(cosine_similarity(original.double(), last[:, 0].cpu().double(), dim=-1))
    cosine = torch.cat(cosines).mean().item() if cosines else None
    return Evaluation(step, marked / tokens, defective / len(images), cosine)


def _first_masks(
    backbone: Backbone, module: nn.Module, directions: Directions, images: Tensor, rule: DetectionRule
) -> tuple[Tensor, Tensor]:
    """The defect mask of each image's first defective block, bool `[B, h, w]`, and the last block's tokens."""
    masks: Tensor | None = None
    for block, tokens in enumerate(residual_stream(backbone, module, images)):
        marked = defect_mask(alignment_logits(patch_grid(backbone, tokens, images), directions.nu[block]), rule)
        enough = marked.flatten(1).sum(dim=1) >= rule.min_tokens
        marked &= (enough & rule.trusts(directions.gaps[block]))[:, None, None]
        masks = marked if masks is None else torch.where(masks.flatten(1).any(dim=1)[:, None, None], masks, marked)
    assert masks is not None  # a layer map has blocks
    return masks, tokens.float()


def cls_cosine(before: Snapshot, after: Snapshot) -> float | None:
    """Mean cosine between the cls tokens of two snapshots of the same images; None for a backbone without cls."""
    if before.cls is None or after.cls is None:
        return None
    return cosine_similarity(before.cls.double(), after.cls.double(), dim=-1).mean().item()
