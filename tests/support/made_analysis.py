"""Results as `analyze` returns them, made without a model: the survey's own sums over tokens that were made up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from sinder_cli.analysis.collectors import BlockCollector, PairCollector
from sinder_cli.analysis.per_image import Portrait, PortraitSide, TargetMaps, shown_blocks
from sinder_cli.analysis.records import Analysis, Side
from sinder_cli.analysis.run import AnalysisResult
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.analysis.survey import Survey
from sinder_cli.analysis.tokens import BlockTokens
from sinder_cli.analysis.verdict import judge
from sinder_cli.defects.detection import DetectionRule, alignments, defect_mask, learning_targets, norm_ratios
from sinder_cli.defects.prediction import BlockSpectrum, Prediction
from sinder_cli.defects.settings import STAGES, Stage
from sinder_cli.defects.spectrum import LeadingPair

PATCH = 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Made:
    """What is to be made up; a defect appears from `first` on in every image."""

    depth: int = 4
    images: int = 3
    grid: tuple[int, int] = (12, 12)
    width: int = 16
    first: int | None = 1
    compared: bool = False
    has_cls: bool = True
    attended: bool = True  # whether the attention of cls could be watched
    broken: int | None = None  # from this block on a token of each image is not finite
    registers: bool = False
    drawn: int = 2
    names: tuple[str, ...] = ()
    models: tuple[str, str] = ("demo_vit", "demo_vit_clean")
    settings: dict[str, Any] | None = None
    skipped: dict[str, str] | None = None

    def result(self) -> AnalysisResult:
        """The result; its portraits can be gone through once."""
        settings = AnalyzeSettings.model_validate(self.settings or {})
        sides = [MadeSide(self, seed, first, settings) for seed, first in enumerate(self._firsts())]
        surveys = tuple(side.survey() for side in sides)
        records = [
            Side(
                model=model,
                weights=f"weights of {model}",
                fingerprint="5e" * 32,
                verdict=judge(survey.blocks, settings.min_tokens),
                blocks=survey.blocks,
            )
            for model, survey in zip(self.models, surveys, strict=False)
        ]
        analysis = Analysis(
            **dict(records[0]),
            sinder="0.1.0",
            images=self.images,
            skipped=self.skipped or {},
            grid=self.grid,
            settings=settings.model_dump(mode="json"),
            other=records[1] if self.compared else None,
            comparison=tuple(self._pairs(sides)) if self.compared else None,
        )
        return AnalysisResult(
            analysis=analysis,
            predictions=tuple(side.prediction() for side in sides),
            surveys=surveys,
            blocks=shown_blocks(self.depth, settings.blocks),
            portraits=self._portraits(sides, settings),
            drawn=self.drawn,
            mean=MEAN,
            std=STD,
        )

    def _firsts(self) -> tuple[int | None, ...]:
        return (self.first, None) if self.compared else (self.first,)

    def _pairs(self, sides: Sequence[MadeSide]) -> Iterator[Any]:
        for block in range(self.depth):
            pair = PairCollector("cpu")
            pair.add([side.block_tokens(block) for side in sides])
            yield pair.record(block)

    def _portraits(self, sides: Sequence[MadeSide], settings: AnalyzeSettings) -> Iterator[Portrait]:
        generator = torch.Generator().manual_seed(7)
        h, w = self.grid
        for index in range(self.drawn):
            ramp = torch.linspace(0, 1, h * PATCH)[:, None] * torch.linspace(1, 0.2, w * PATCH)
            pixels = torch.stack([ramp, ramp.flip(0), ramp.flip(1)]) + 0.05 * torch.rand(3, 1, 1, generator=generator)
            image = (pixels.clamp(0, 1) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
            last = [side.tokens(self.depth - 1)[index % self.images] for side in sides]
            name = self.names[index] if index < len(self.names) else f"image-{index}.jpg"
            found = tuple(side.portrait(index % self.images, settings) for side in sides)
            yield Portrait(name, image, found, cosine_similarity(*last, dim=-1) if self.compared else None)


class MadeSide:
    """One backbone's made-up tokens: they grow with depth, and from `first` on some point along one direction."""

    def __init__(self, made: Made, seed: int, first: int | None, settings: AnalyzeSettings) -> None:
        generator = torch.Generator().manual_seed(3)  # both sides see the same images
        self.made, self.first, self.rule = made, first, DetectionRule.of(settings)
        h, w = made.grid
        coarse = torch.randn(made.images, made.width, 4, 4, generator=generator)
        self.base = interpolate(coarse, (h, w), mode="bicubic").movedim(1, -1)  # varies slowly, as tokens do
        self.noise = torch.randn(self.base.shape, generator=torch.Generator().manual_seed(20 + seed))
        direction = torch.randn(made.width, generator=generator)
        self.direction = direction / direction.norm()
        self.places = torch.randperm((h - 2) * (w - 2), generator=generator)[: 5 * made.images].view(made.images, -1)

    def tokens(self, block: int) -> Tensor:
        """Patch tokens after a block, `[images, h, w, N]`."""
        tokens = (1 + 0.2 * block) * (self.base + (0.3 + 0.02 * block) * self.noise)
        along = tokens @ self.direction
        tokens = tokens - 0.7 * along[..., None] * self.direction
        if self.first is not None and block >= self.first:
            w = self.made.grid[1]
            for image, places in enumerate(self.places.tolist()):
                for count, at in enumerate(places):
                    size = (12 + 6 * count) * (1 + 0.3 * block)
                    tokens[image, 1 + at // (w - 2), 1 + at % (w - 2)] += size * self.direction
        if self.made.broken is not None and block >= self.made.broken:
            tokens[:, 1, 1] = torch.nan
        return tokens

    def nu(self, block: int) -> Tensor:
        """The predicted directions `[4, N]`; the deeper, the nearer to the true one."""
        generator = torch.Generator().manual_seed(50 + block)
        off = torch.randn(4, self.made.width, generator=generator)
        nu = self.direction + off * torch.tensor([0.5, 0.4, 0.3, 0.1])[:, None] / (1 + block)
        return nu / nu.norm(dim=1, keepdim=True)

    def gaps(self, block: int) -> dict[Stage, float]:
        return {stage: 1.02 + 0.4 * block + 0.1 * at for at, stage in enumerate(STAGES)}

    def block_tokens(self, block: int) -> BlockTokens:
        """What the survey takes in."""
        tokens = self.tokens(block)
        norms, cosines = tokens.norm(dim=-1), alignments(tokens, self.nu(block))
        masks: dict[Any, Tensor] = {"outlying": norm_ratios(norms) > 3}
        if self.rule.trusts(self.gaps(block)["cumulative"]):
            masks["equation_5"] = defect_mask(-cosines[..., 3], self.rule)
        means = tokens.mean(dim=(1, 2))
        registers = means[:, None].repeat(1, 4, 1) if self.made.registers else tokens.new_zeros(len(tokens), 0, 1)
        return BlockTokens(tokens, norms, means if self.made.has_cls else None, registers, cosines, masks)

    def prediction(self) -> Prediction:
        stages = {
            stage: tuple(
                BlockSpectrum(block, LeadingPair(self.nu(block)[at], 2.0, 1.0), 2.0, None)
                for block in range(self.made.depth)
            )
            for at, stage in enumerate(STAGES)
        }
        return Prediction("demo", self.made.width, stages, None)

    def survey(self) -> Survey:
        collectors = []
        for block in range(self.made.depth):
            collector = BlockCollector("cpu", self.made.grid, self.rule)
            collector.add(self.block_tokens(block))
            collectors.append(collector)
        records = [each.record(block, self.nu(block), self.gaps(block)) for block, each in enumerate(collectors)]
        found = [collector.observed.direction for collector in collectors]
        none = torch.zeros(self.made.width)
        return Survey(
            blocks=tuple(records),
            curves=tuple(collector.curves() for collector in collectors),
            observed=torch.stack([none if direction is None else direction for direction in found]),
            shares=tuple({rule: place.shares() for rule, place in each.counts.places.items()} for each in collectors),
        )

    def portrait(self, image: int, settings: AnalyzeSettings) -> PortraitSide:
        blocks = [self.block_tokens(block) for block in range(self.made.depth)]
        last, shown = blocks[-1], shown_blocks(self.made.depth, settings.blocks)
        found = {
            block: tokens.masks["equation_5"][image] for block, tokens in enumerate(blocks) if len(tokens.masks) > 1
        }
        attention = torch.rand(self.made.grid, generator=torch.Generator().manual_seed(image)) ** 3
        return PortraitSide(
            components=last.patches[image, ..., :3],
            norms=last.norms[image],
            in_basis=torch.ones_like(last.masks["outlying"][image]),
            outlying=last.masks["outlying"][image],
            angles={block: blocks[block].degrees[image, ..., 3] for block in shown},
            masks={block: found[block] for block in shown if block in found},
            attention=attention / attention.sum() if self.made.has_cls and self.made.attended else None,
            targets=self._targets(image, found, settings),
        )

    def _targets(self, image: int, found: dict[int, Tensor], settings: AnalyzeSettings) -> TargetMaps | None:
        for block, mask in found.items():
            if int(mask.sum()) < settings.min_tokens:
                continue
            tokens = self.tokens(block)[image]
            norms, logits = tokens.norm(dim=-1), -alignments(tokens, self.nu(block))[..., 3]
            moved = {
                tau: norms.masked_scatter(mask, learning_targets(tokens, logits, mask, 3, tau).norm(dim=-1))
                for tau in (0.01, 0.1, 1.0)
            }
            return TargetMaps(block, norms, mask, moved)
        return None
