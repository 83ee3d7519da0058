"""What the patch tokens do, block by block, over a set of images (always before the final norm)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch

from sinder_cli.backbone.describe import Backbone
from sinder_cli.defects.detection import DetectionRule, alignment_logits, defect_mask
from sinder_cli.defects.prediction import Prediction
from sinder_cli.defects.settings import AnalyzeSettings
from sinder_cli.defects.spectrum import angle_between, fixed_sign
from sinder_cli.defects.tokens import in_precision, outlier_mask, patch_grid, residual_stream

if TYPE_CHECKING:
    from torch import Tensor, nn

SKETCH_ROWS = 8  # singular directions kept of the outlying tokens seen so far


@dataclass(frozen=True)
class BlockSurvey:
    """One row of `sinder analyze`; norms are of the residual stream, angles in degrees."""

    block: int
    median_norm: float
    p99_norm: float
    max_norm: float
    masked_tokens: int  # equation (5); 0 where the direction is not determined
    masked_images: int  # images in which the block counts as defective
    outlier_tokens: int  # above 3 × the median norm of their image
    cls_norm: float | None  # median
    register_norm: float | None  # median
    gap: float  # σ₁/σ₂ of the predicted direction
    angle_to_predicted: float | None  # between the predicted and the observed direction; None without outliers


@dataclass
class BlockCollector:
    """Collects one block's statistics image by image."""

    norms: list[Tensor] = field(default_factory=list)
    cls_norms: list[Tensor] = field(default_factory=list)
    register_norms: list[Tensor] = field(default_factory=list)
    masked_tokens: int = 0
    masked_images: int = 0
    outlier_tokens: int = 0
    sketch: Tensor | None = None  # [≤ SKETCH_ROWS, N]

    def add_outliers(self, tokens: Tensor) -> None:
        """Fold the unit vectors of outlying tokens `[M, N]` into the running singular directions."""
        finite = tokens[tokens.norm(dim=1).isfinite()]
        unit = finite / finite.norm(dim=1, keepdim=True)
        rows = unit if self.sketch is None else torch.cat([self.sketch, unit])
        _, S, Vt = torch.linalg.svd(rows, full_matrices=False)
        self.sketch = S[:SKETCH_ROWS, None] * Vt[:SKETCH_ROWS]

    @property
    def observed_direction(self) -> Tensor | None:
        """The direction the outlying tokens share: the leading right singular vector of their unit vectors, `[N]`."""
        return None if self.sketch is None else fixed_sign(self.sketch[0] / self.sketch[0].norm())


@torch.no_grad()
def collect(
    backbone: Backbone,
    module: nn.Module,
    images: Tensor,
    prediction: Prediction,
    rule: DetectionRule,
    blocks: list[BlockCollector],
) -> None:
    """Run one batch `[B, 3, H, W]` and add every block's tokens to its collector."""
    gaps = prediction.gaps()
    nu = prediction.directions().to(images.device)
    registers = slice(int(backbone.has_cls), backbone.prefix_tokens)
    for index, tokens in enumerate(residual_stream(backbone, module, images)):
        collector = blocks[index]
        patches = patch_grid(backbone, tokens, images).float()
        norms = patches.norm(dim=-1)
        collector.norms.append(norms.flatten().cpu())
        if backbone.has_cls:
            collector.cls_norms.append(tokens[:, 0].float().norm(dim=-1).cpu())
        collector.register_norms.append(tokens[:, registers].float().norm(dim=-1).flatten().cpu())
        outliers = outlier_mask(norms)
        if outliers.any():
            collector.outlier_tokens += int(outliers.sum())
            collector.add_outliers(patches[outliers].cpu())
        if rule.trusts(gaps[index]):
            counts = defect_mask(alignment_logits(patches, nu[index]), rule).flatten(1).sum(dim=1)
            collector.masked_tokens += int(counts.sum())
            collector.masked_images += int((counts >= rule.min_tokens).sum())


def survey(
    backbone: Backbone,
    module: nn.Module,
    prediction: Prediction,
    images: Iterable[Tensor],
    settings: AnalyzeSettings,
    device: str,
) -> tuple[BlockSurvey, ...]:
    """Run normalized images `[3, H, W]` in batches and sum up every block; one row a block."""
    blocks = [BlockCollector() for _ in range(backbone.depth)]
    rule, running = DetectionRule.of(settings), in_precision(backbone, settings.dtype)
    pending = iter(images)
    while batch := list(islice(pending, settings.batch_size)):
        collect(running, module, torch.stack(batch).to(device), prediction, rule, blocks)
    return summarize(blocks, prediction) if blocks[0].norms else ()


def summarize(blocks: list[BlockCollector], prediction: Prediction) -> tuple[BlockSurvey, ...]:
    """One row a block."""
    nu, gaps = prediction.directions(), prediction.gaps()
    rows = []
    for index, collector in enumerate(blocks):
        norms = torch.cat(collector.norms)
        observed = collector.observed_direction
        rows.append(
            BlockSurvey(
                block=index,
                median_norm=norms.median().item(),
                p99_norm=_quantile(norms, 0.99),
                max_norm=norms.max().item(),
                masked_tokens=collector.masked_tokens,
                masked_images=collector.masked_images,
                outlier_tokens=collector.outlier_tokens,
                cls_norm=_median(collector.cls_norms),
                register_norm=_median(collector.register_norms),
                gap=gaps[index],
                angle_to_predicted=None if observed is None else angle_between(observed, nu[index]),
            )
        )
    return tuple(rows)


def _quantile(values: Tensor, q: float) -> float:
    """The q-quantile, linearly interpolated; torch.quantile refuses more than 16 million values."""
    import numpy as np

    return float(np.quantile(values.numpy(), q))


def _median(parts: list[Tensor]) -> float | None:
    values = torch.cat(parts) if parts else torch.empty(0)
    return values.median().item() if len(values) else None
