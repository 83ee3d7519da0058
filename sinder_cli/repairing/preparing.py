"""What a repair starts from, and what of it needs no image: directions from the weights, and the module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.device import exact_device
from sinder_cli.backbone.opening import load_module
from sinder_cli.defects.detection import DetectionRule
from sinder_cli.defects.prediction import predict
from sinder_cli.defects.tokens import in_precision
from sinder_cli.distributed import Ranks
from sinder_cli.events import Emit, Warned
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.sources import ImageSource
from sinder_cli.repairing.deltas import Deltas, SingularBasis, singular_basis
from sinder_cli.repairing.forward import Directions
from sinder_cli.repairing.settings import RepairSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Start:
    """The inputs of a repair, and the `config.json` that describes them."""

    backbone: Backbone
    preprocess: Preprocessing
    source: ImageSource
    settings: RepairSettings
    device: str
    config: dict[str, Any]
    given: int  # number of the user's images, which come first in the source; the others are drawn

    @property
    def running(self) -> Backbone:
        """The backbone in the precision of the settings."""
        return in_precision(self.backbone, self.settings.dtype, self.settings.tf32)

    @property
    def rule(self) -> DetectionRule:
        """The rule that marks tokens."""
        return DetectionRule.of(self.settings)


@dataclass(frozen=True)
class Prepared:
    """A backbone ready for its scan and for steps: directions from the weights, the module, no deltas yet."""

    start: Start
    directions: Directions
    module: nn.Module
    deltas: Deltas
    emit: Emit
    ranks: Ranks


def prepare(
    start: Start, emit: Emit, ranks: Ranks, decompose: Callable[[Tensor], SingularBasis] = singular_basis
) -> Prepared:
    """Prepare everything that needs no image: directions from the weights, the module, no deltas yet."""
    settings, backbone = start.settings, start.backbone
    device = exact_device(start.device)
    prediction = ranks.from_rank0(lambda: predict(backbone, ("cumulative",), emit, device))
    directions = Directions(prediction.directions().to(start.device), prediction.gaps())
    if not any(start.rule.can_mark(gap) for gap in directions.gaps):
        emit(Warned(f"no direction is determined (σ₁/σ₂ < {settings.min_gap} in every block): no token can be marked"))
    module = load_module(backbone, start.device)
    deltas = Deltas(backbone, module, emit, settings.offload, decompose=decompose)
    return Prepared(start, directions, module, deltas, emit, ranks)
