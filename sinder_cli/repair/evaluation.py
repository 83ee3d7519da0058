"""What a repair changed, seen on a fixed set of images: token norms, defects and the cls token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cosine_similarity

from sinder_cli.backbone.describe import Backbone
from sinder_cli.defects.tokens import last_tokens, outlier_mask, patch_grid
from sinder_cli.errors import BadInputError
from sinder_cli.events import Emit, tracked
from sinder_cli.images.choosing import spread
from sinder_cli.images.loading import load_in_order, readable, require_some
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.sources import ImageSource

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLES = 6  # images whose patch tokens are kept for pictures


@dataclass(frozen=True)
class Snapshot:
    """The last block's tokens, before the final norm, summed up over a set of images."""

    norms: Tensor  # [K, h, w] patch-token norms
    cls: Tensor | None  # [K, N]
    samples: Tensor  # [≤ SAMPLES, h, w, N] patch tokens of the first images

    def require_finite(self, what: str, remedy: str) -> None:
        """Raises `BadInputError` where a token is NaN or infinite: nothing of such a model is worth keeping."""
        broken = int((~self.norms.flatten(1).isfinite().all(dim=1)).sum())
        if broken:
            raise BadInputError(what, f"its tokens are not finite on {broken} of {len(self.norms)} images", remedy)

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


def evaluation_images(
    source: ImageSource, preprocess: Preprocessing, most: int, unreadable: dict[str, str], emit: Emit
) -> dict[str, Tensor]:
    """Up to `most` readable images `[3, H, W]` by name, spread evenly over the source.

    Those that cannot be decoded are named and added to `unreadable`. Raises `BadInputError` if none can.
    """
    everything = range(len(source))
    for indices in (
        spread(everything, most),
        everything,
    ):  # if none of the chosen can be read, take any before giving up
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


def cls_cosine(before: Snapshot, after: Snapshot) -> float | None:
    """Mean cosine between the cls tokens of two snapshots of the same images; None for a backbone without cls."""
    if before.cls is None or after.cls is None:
        return None
    return cosine_similarity(before.cls.double(), after.cls.double(), dim=-1).mean().item()
