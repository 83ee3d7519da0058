"""Defect directions from the weights alone: every stage of every block, one block in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch

from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.weights import read_block
from sinder_cli.defects.linearize import attention_part, block_part, mlp_part, plus_identity
from sinder_cli.defects.settings import MIN_GAP, STAGES, Stage
from sinder_cli.defects.spectrum import LeadingPair, angle_between, leading_left
from sinder_cli.errors import BadInputError
from sinder_cli.events import Emit, silent, tracked
from sinder_cli.notebooks import Shown
from sinder_cli.prefetch import loaded_ahead

if TYPE_CHECKING:
    from torch import Tensor


SIDE_BY_SIDE = 2  # searches at a time on a CPU; more only compete for its cache
SETTLED_DEGREES = 5.0  # a direction has settled when no later block turns it further than this


@dataclass(frozen=True)
class BlockSpectrum:
    """The leading pair of one stage of one block, and how far its direction turned from the previous block's."""

    block: int
    pair: LeadingPair
    sigma: float
    angle_to_previous: float | None  # degrees


@dataclass(frozen=True)
class Prediction(Shown):
    """The defects of a backbone as predicted from its weights."""

    model: str
    width: int
    stages: dict[Stage, tuple[BlockSpectrum, ...]]
    position: PositionCheck | None

    def directions(self, stage: Stage = "cumulative") -> Tensor:
        """Return the directions ν of a stage, `[blocks, N]` float32 rows of unit norm, on the CPU."""
        return torch.stack([spectrum.pair.direction.float().cpu() for spectrum in self.stages[stage]])

    def gaps(self, stage: Stage = "cumulative") -> list[float]:
        """Return σ₁/σ₂ of a stage, block by block."""
        return [spectrum.pair.gap for spectrum in self.stages[stage]]

    def settled_from(self, stage: Stage = "cumulative") -> int | None:
        """Return the first block from which the direction is determined and turns by at most 5° per block, or None.

        The last block alone has nothing to turn in, and has not settled.
        """
        settled: int | None = None
        for spectrum in reversed(self.stages[stage]):
            if spectrum.pair.gap < MIN_GAP:
                break
            settled = spectrum.block
            if spectrum.angle_to_previous is None or spectrum.angle_to_previous > SETTLED_DEGREES:
                break
        return None if settled == self.stages[stage][-1].block else settled


def predict(
    backbone: Backbone, stages: Sequence[Stage] = STAGES, emit: Emit = silent, device: str = "cpu"
) -> Prediction:
    """Linearize every block and find the leading left singular vector of the requested stages (SINDER, section 3).

    The stages of a block are searched in parallel: a matrix–vector product keeps only one core busy.
    Raises `BadInputError` naming the first block whose linear part has a NaN or an infinity.
    """
    spectra: dict[Stage, list[BlockSpectrum]] = {stage: [] for stage in STAGES if stage in stages}
    with ThreadPoolExecutor(max_workers=SIDE_BY_SIDE if device == "cpu" else 1) as pool:
        for index, matrices in stage_matrices(backbone, tuple(spectra), emit, device):
            for stage, part in matrices.items():
                _require_finite(part.matrix, backbone, index, stage)
            previous = [rows[-1] if rows else None for rows in spectra.values()]
            found = pool.map(_spectrum, repeat(index), matrices.values(), previous)
            for rows, row in zip(spectra.values(), found, strict=True):
                rows.append(row)
    kept: dict[Stage, tuple[BlockSpectrum, ...]] = {stage: tuple(rows) for stage, rows in spectra.items()}
    return Prediction(backbone.name, backbone.width, kept, check_positions(backbone))


@dataclass(frozen=True)
class ScaledMatrix:
    """One stage of one block, `[N, N]`, divided by exp(log_scale)."""

    matrix: Tensor
    log_scale: float = 0.0


def stage_matrices(
    backbone: Backbone, stages: Sequence[Stage], emit: Emit, device: str = "cpu"
) -> Iterator[tuple[int, dict[Stage, ScaledMatrix]]]:
    """Yield the matrices of the requested stages, block by block; compute nothing that no stage needs."""
    G: Tensor | None = None
    log_scale = 0.0
    maps = backbone.layers.blocks
    blocks = loaded_ahead(lambda block_map: read_block(backbone.weights, block_map, device=device), maps, ahead=1)
    for index, block in enumerate(tracked(blocks, emit, "predicting", len(maps), "blocks")):
        A = attention_part(block)
        found: dict[Stage, ScaledMatrix] = {"attention": ScaledMatrix(plus_identity(A))}
        if set(stages) != {"attention"}:
            C = mlp_part(block)
            found["mlp"] = ScaledMatrix(plus_identity(C))
            if {"block", "cumulative"} & set(stages):
                E = block_part(A, C, block.map.parallel)
                found["block"] = ScaledMatrix(E)
            if "cumulative" in stages:
                G = E if G is None else E @ G
                scale = float(G.norm()) / math.sqrt(backbone.width)
                if 0 < scale < math.inf:  # else `predict` raises an error that names the block
                    G = G / scale
                    log_scale += math.log(scale)
                found["cumulative"] = ScaledMatrix(G, log_scale)
        yield index, {stage: found[stage] for stage in stages}


def _spectrum(block: int, part: ScaledMatrix, previous: BlockSpectrum | None) -> BlockSpectrum:
    pair = leading_left(part.matrix, previous.pair.direction if previous else None)
    turned = angle_between(pair.direction, previous.pair.direction) if previous else None
    scale = math.exp(min(part.log_scale, 600.0))  # so that a product of very many large gains stays finite
    return BlockSpectrum(block, pair, pair.sigma * scale, turned)


def _require_finite(matrix: Tensor, backbone: Backbone, block: int, stage: Stage) -> None:
    if not math.isfinite(matrix.sum().item()):
        raise BadInputError(
            f"cannot predict the defects of {backbone.name}",
            f"the linear part ({stage}) of block {block} is not finite",
            "do its weights hold NaN or infinity?",
        )


OUTLIER_DEVIATIONS = 6.0  # robust standard deviations (1.4826 × median absolute deviation) above the median norm
OUTLIER_FACTOR = 1.5  # and at least this many times the median norm


@dataclass(frozen=True)
class OutlyingPosition:
    """A position whose embedding stands out: row-major index, norm, and the share of ‖·‖² in one dimension."""

    patch: int
    norm: float
    dimension: int
    share: float


@dataclass(frozen=True)
class PositionCheck:
    """Norms of a position embedding over its patches, and those that stand out."""

    patches: int
    median_norm: float
    max_norm: float
    largest_share: float
    outliers: tuple[OutlyingPosition, ...]


def check_positions(backbone: Backbone) -> PositionCheck | None:
    """Find patches with an outlying position embedding; return None for a backbone without a learned table."""
    position = backbone.layers.position
    if position is None:
        return None
    table = backbone.weights.read([position.weight.name])[position.weight.name].float()
    rows = table.reshape(-1, table.shape[-1])[position.prefix :]  # [patches, N]
    norms = rows.norm(dim=1)
    shares, dimensions = (rows**2 / norms.clamp_min(1e-12)[:, None] ** 2).max(dim=1)
    median = norms.median()
    spread = 1.4826 * (norms - median).abs().median()
    limit = max((median + OUTLIER_DEVIATIONS * spread).item(), OUTLIER_FACTOR * median.item())
    found = (norms > limit).nonzero().flatten().tolist()
    outliers = tuple(OutlyingPosition(i, norms[i].item(), int(dimensions[i]), shares[i].item()) for i in found)
    return PositionCheck(len(rows), median.item(), norms.max().item(), shares.max().item(), outliers)


def write_directions(out: Path | IO[bytes], prediction: Prediction) -> None:
    """Write one `[blocks, N]` float32 tensor per stage as safetensors, to a path or an open file."""
    from sinder_cli.backbone.sources import infos_of
    from sinder_cli.backbone.storing import stream_safetensors, write_safetensors

    tensors = {str(stage): prediction.directions(stage) for stage in prediction.stages}
    metadata = {"model": prediction.model, "content": "defect directions, rows of unit norm"}
    if isinstance(out, Path):
        write_safetensors(out, infos_of(tensors), tensors.values(), metadata)
    else:
        stream_safetensors(out, infos_of(tensors), tensors.values(), metadata)
