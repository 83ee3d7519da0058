"""Defect directions from the weights alone: every stage of every block, one block in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from sinder_cli.backbone.blocks import read_block
from sinder_cli.backbone.describe import Backbone
from sinder_cli.defects.linearize import attention_part, block_part, mlp_part, plus_identity
from sinder_cli.defects.positions import PositionCheck, check_positions
from sinder_cli.defects.rules import MIN_GAP
from sinder_cli.defects.spectrum import LeadingPair, angle_between, leading_left
from sinder_cli.errors import BadInputError
from sinder_cli.events import Emit, silent, tracked

if TYPE_CHECKING:
    from torch import Tensor

Stage = Literal["attention", "mlp", "block", "cumulative"]
STAGES: tuple[Stage, ...] = ("attention", "mlp", "block", "cumulative")

SETTLED_DEGREES = 5.0  # a direction has settled when no later block turns it further than this


@dataclass(frozen=True)
class BlockSpectrum:
    """The leading pair of one stage of one block, and how far its direction turned from the previous block's."""

    block: int
    pair: LeadingPair
    sigma: float
    angle_to_previous: float | None  # degrees


@dataclass(frozen=True)
class Prediction:
    """What the weights of a backbone say about its defects."""

    model: str
    width: int
    stages: dict[Stage, tuple[BlockSpectrum, ...]]
    position: PositionCheck | None

    def directions(self, stage: Stage = "cumulative") -> Tensor:
        """The directions ν of a stage, `[blocks, N]` float32 rows of unit norm."""
        return torch.stack([spectrum.pair.direction.float() for spectrum in self.stages[stage]])

    def gaps(self, stage: Stage = "cumulative") -> list[float]:
        """σ₁/σ₂ of a stage, block by block."""
        return [spectrum.pair.gap for spectrum in self.stages[stage]]

    def settled_from(self, stage: Stage = "cumulative") -> int | None:
        """The first block from which on the direction is determined and turns by at most 5° a block; None if never."""
        settled: int | None = None
        for spectrum in reversed(self.stages[stage]):
            if spectrum.pair.gap < MIN_GAP:
                break
            settled = spectrum.block
            if spectrum.angle_to_previous is None or spectrum.angle_to_previous > SETTLED_DEGREES:
                break
        return settled


def predict(
    backbone: Backbone, stages: Sequence[Stage] = STAGES, emit: Emit = silent, device: str = "cpu"
) -> Prediction:
    """Linearize every block and find the leading left singular vector of the stages asked for (SINDER, section 3).

    Raises `BadInputError` naming the first block whose linear part has a NaN or an infinity.
    """
    spectra: dict[Stage, list[BlockSpectrum]] = {stage: [] for stage in STAGES if stage in stages}
    for index, stage, matrix, log_scale in stage_matrices(backbone, stages, emit, device):
        if not math.isfinite(matrix.sum().item()):
            raise BadInputError(
                f"cannot predict the defects of {backbone.name}",
                f"the linear part ({stage}) of block {index} is not finite",
                "do its weights hold NaN or infinity?",
            )
        previous = spectra[stage][-1].pair if spectra[stage] else None
        pair = leading_left(matrix, previous.direction if previous else None)
        turned = angle_between(pair.direction, previous.direction) if previous else None
        scale = math.exp(min(log_scale, 600.0))  # so that a product of very many large gains stays a number
        spectra[stage].append(BlockSpectrum(index, pair, pair.sigma * scale, turned))
    kept: dict[Stage, tuple[BlockSpectrum, ...]] = {stage: tuple(rows) for stage, rows in spectra.items()}
    return Prediction(backbone.name, backbone.width, kept, check_positions(backbone))


def stage_matrices(
    backbone: Backbone, stages: Sequence[Stage], emit: Emit, device: str = "cpu"
) -> Iterator[tuple[int, Stage, Tensor, float]]:
    """The matrix of each stage asked for, block by block, with the logarithm of the factor it was divided by."""
    G: Tensor | None = None
    log_scale = 0.0
    numbered = list(enumerate(backbone.layers.blocks))
    for index, block_map in tracked(numbered, emit, "predicting", len(numbered), "blocks"):
        block = read_block(backbone.weights, block_map, device=device)
        A = attention_part(block)
        if "attention" in stages:
            yield index, "attention", plus_identity(A), 0.0
        if set(stages) == {"attention"}:
            continue
        C = mlp_part(block)
        if "mlp" in stages:
            yield index, "mlp", plus_identity(C), 0.0
        if not {"block", "cumulative"} & set(stages):
            continue
        E = block_part(A, C, block_map.parallel)
        if "block" in stages:
            yield index, "block", E, 0.0
        if "cumulative" in stages:
            G = E if G is None else E @ G
            scale = float(G.norm()) / math.sqrt(backbone.width)
            G = G / scale
            log_scale += math.log(scale)
            yield index, "cumulative", G, log_scale
