"""One step: find the first defective block of each image, and project the loss's gradient onto singular values.

    1. Run the blocks one by one, each recorded by itself, until the first defective one.
    2. Pull the gradient of the loss back through the last ≤ window blocks, from the defective one down.
    3. ∂L/∂ε = diag(Uᵀ (∂L/∂W) V), block by block on the way.

No module is swapped and none is parametrized: any attention kernel, autocast and any model class work unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sinder_cli.backbone.contract import Backbone, trained_references
from sinder_cli.backbone.device import float32_products
from sinder_cli.backbone.weights import rows_of
from sinder_cli.defects.detection import (
    DetectionRule,
    interior,
    leaning,
    learning_targets,
    neighbour_averages,
    neighbour_distances,
)
from sinder_cli.defects.tokens import in_precision, patch_grid
from sinder_cli.repairing.deltas import Deltas
from sinder_cli.repairing.forward import (
    FIRST_ALONE,
    BlockDefects,
    Directions,
    ForwardPass,
    Interest,
    recorded,
)
from sinder_cli.repairing.settings import RepairSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


# float16 has no normal number under 6e-5, and the gradient of one feature of a token is about 1e-5 in a ViT-g: 2¹²
# lifts it to 0.07 and leaves room for sums a million times as large. A step that overflows nevertheless is skipped.
LOSS_SCALES = {"float16": 2.0**12}


# Number of random directions that measure how far ordinary tokens move: in the first step at a block, in each later
# step, and in total.
PROBES, MORE_PROBES, ENOUGH_PROBES = 4, 1, 12
# Share of marked tokens above which an image is crowded: there, marked tokens influence ordinary ones and move them
# several times as far as elsewhere, so that the response of the defect's cause would be overestimated.
CROWDED = 0.1


@dataclass(frozen=True)
class BlockGradient:
    """Losses and gradients of the images of a batch that are defective at `block`; by target, with respect to ε."""

    block: int
    losses: tuple[float, ...]  # of each image
    leaving: int  # number of these images that do not go on to later blocks
    excess: float  # the sum of the losses, less those of ordinary tokens
    gradients: dict[str, Tensor]  # ∂(sum of losses)/∂ε, `[r]` each
    responses: dict[str, Tensor] = field(default_factory=dict)  # ∂(ordinary tokens · probe)/∂ε, `[probes, r]` each
    probes: int = 0
    probed: int = 0  # images with probes

    @property
    def finite(self) -> bool:
        """True if neither loss nor gradient has a NaN or an infinity."""
        sums = [part.sum() for each in (self.gradients, self.responses) for part in each.values()]
        return all(map(math.isfinite, self.losses)) and (not sums or math.isfinite(torch.stack(sums).sum().item()))


@dataclass(frozen=True)
class StepGradient:
    """Losses and gradients of one batch, by defective block."""

    parts: tuple[BlockGradient, ...] = ()
    masked_tokens: int = 0
    defective: int = 0  # images
    idle: tuple[tuple[int, float], ...] = ()  # blocks and losses without a gradient, as it is not worth its cost

    @property
    def losses(self) -> tuple[float, ...]:
        """The losses that have a gradient, of each image at each of its defective blocks."""
        return tuple(loss for part in self.parts for loss in part.losses)

    @property
    def first_block(self) -> int | None:
        """The first defective block of these images."""
        return min((*(part.block for part in self.parts), *(block for block, _ in self.idle)), default=None)

    @property
    def gradients(self) -> dict[str, Tensor]:
        """∂/∂ε of the mean loss of the defective images, by target."""
        sums: dict[str, Tensor] = {}
        for part in self.parts:
            for name, gradient in part.gradients.items():
                sums[name] = sums[name] + gradient if name in sums else gradient
        return {name: total / len(self.losses) for name, total in sums.items()}

    @property
    def finite(self) -> bool:
        """True if neither loss nor gradient has a NaN or an infinity."""
        return all(part.finite for part in self.parts)


@torch.no_grad()
def step_gradient(
    deltas: Deltas,
    directions: Directions,
    images: Tensor,
    settings: RepairSettings,
    known: Tensor | None = None,
    probes: Probes | None = None,
    interest: Callable[[int, float], Interest] = lambda _block, _excess: FIRST_ALONE,
) -> StepGradient:
    """Compute the projected gradient of a batch `[B, 3, H, W]`, each image in its own window.

    `known` are the tokens that the original marks, bool `[B, blocks, h, w]`. `probes` draws the random directions of
    ordinary tokens whose responses a greedy step needs. `interest` decides, from a block and the excess of an image's
    loss there, whether a gradient is needed, and whether the image goes on to later blocks.
    """
    backbone = in_precision(deltas.backbone, settings.dtype, settings.tf32)
    rule, scale = DetectionRule.of(settings), LOSS_SCALES.get(settings.dtype, 1.0)
    passing = ForwardPass.entering(backbone, deltas.module, directions, images, rule, settings.window, known)
    parts: list[BlockGradient] = []
    idle: list[tuple[int, float]] = []
    masked, met = 0, torch.zeros(len(images), dtype=torch.bool, device=images.device)
    with _trained(backbone, deltas.module):
        while (found := passing.next_defects()) is not None:
            masked += int(found.masks[found.defective].sum())
            met[found.images[found.defective]] = True
            losses, slopes = _losses(backbone, found, images, settings, scale)
            ways = [interest(found.block, loss.excess) for loss in losses]
            asked = [(loss, way) for loss, way in zip(losses, ways, strict=True) if way.gradient]
            idle += [(found.block, loss.value) for loss, way in zip(losses, ways, strict=True) if not way.gradient]
            found = passing.wanted(found, ways)  # under the same name: graphs of all images must not live on here
            if found is None:
                continue
            seed = _seed(found, [loss for loss, _ in asked], slopes)
            drawn, probed = probes.drawn(backbone, found, images) if probes else ([], 0)
            projected = _window_gradients(backbone, found, [seed, *drawn], deltas, settings.tf32)
            by_target = {name: (slope / scale, answers) for name, (slope, *answers) in projected}
            parts.append(
                BlockGradient(
                    block=found.block,
                    losses=tuple(loss.value for loss, _ in asked),
                    leaving=sum(not way.onward for _, way in asked),
                    excess=sum(loss.excess for loss, _ in asked),
                    gradients={name: gradient for name, (gradient, _) in by_target.items()},
                    responses={name: torch.stack(answers) for name, (_, answers) in by_target.items() if answers},
                    probes=len(drawn),
                    probed=probed,
                )
            )
    return StepGradient(tuple(parts), masked, int(met.sum()), tuple(idle))


def _seed(found: BlockDefects, losses: Sequence[Loss], slopes: Tensor) -> Tensor:
    """Return ∂/∂tokens `[B, T, N]` of the given losses, from that of all, for the images of `found`."""
    seed = torch.zeros_like(found.tokens)
    rows = {place: row for row, place in enumerate(found.images.tolist())}
    for loss in losses:
        seed[rows[loss.image]] = slopes[loss.at]
    return seed


@dataclass
class Probes:
    """Random signs for ordinary tokens, by Hutchinson's trick: E[(∂(x·r)/∂ε)²] = ‖∂x/∂ε‖² for r of independent signs.

    The signs for an image depend only on its own seed, not on its batch or its rank.
    """

    seeds: Sequence[int]  # one per image of the batch
    taken: Mapping[int, int]  # probes drawn before, by block

    def drawn(self, backbone: Backbone, found: BlockDefects, images: Tensor) -> tuple[list[Tensor], int]:
        """Draw seeds `[B, T, N]` of backward passes, signs on ordinary tokens; return the number of images too.

        The images are the defective ones, without crowded ones unless the block has no probes yet. Ordinary tokens are
        prefix tokens, and patches that are neither marked nor `leaning`. The signs are divided by the image's mean
        ordinary norm and by √(number of its ordinary tokens): so the square of a response is, on average, the sum over
        these images of the mean square of relative movements.
        """
        taken = self.taken.get(found.block, 0)
        count = PROBES if not taken else MORE_PROBES if taken < ENOUGH_PROBES else 0
        crowded = found.masks.flatten(1).float().mean(dim=1) > CROWDED
        chosen = (found.defective & ~crowded if taken else found.defective).nonzero()[:, 0].tolist()
        if not count or not chosen:
            return [], 0
        grids = patch_grid(backbone, found.tokens, images)
        probes = found.tokens.new_zeros(count, *found.tokens.shape)  # [count, B, T, N]
        for image in chosen:
            grid, mask = grids[image], found.masks[image]
            weights = torch.ones(found.tokens.shape[1], device=mask.device)
            weights[backbone.prefix_tokens :] = (~mask & ~leaning(grid, mask)).flatten().float()
            weights /= ordinary_scale(grid, mask) * weights.sum().clamp_min(1).sqrt()
            generator = torch.Generator().manual_seed(self.seeds[int(found.images[image])])
            signs = torch.randint(0, 2, (count, *found.tokens.shape[1:]), generator=generator) * 2 - 1
            probes[:, image] = signs.to(found.tokens) * weights[:, None].to(found.tokens)
        return list(probes), len(chosen)


@contextmanager
def _trained(backbone: Backbone, module: nn.Module) -> Iterator[None]:
    """Let the parameters that hold target weights require gradients inside the context."""
    names = {ref.name for block in backbone.layers.blocks for ref in trained_references(block).values()}
    parameters = [module.get_parameter(name) for name in names]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


@dataclass(frozen=True)
class Loss:
    """The loss of one image at one block."""

    image: int  # its place in the batch
    at: int  # its index among those that reached the block
    value: float
    excess: float  # above that of ordinary tokens


def _losses(
    backbone: Backbone, found: BlockDefects, images: Tensor, settings: RepairSettings, scale: float
) -> tuple[list[Loss], Tensor]:
    """Return the loss of each defective image, and scale · ∂(sum of losses)/∂tokens `[B, T, N]`, zero for others."""
    tokens = found.tokens.detach().requires_grad_()
    defective = found.defective.nonzero()[:, 0].tolist()
    with torch.enable_grad():
        grids = patch_grid(backbone, tokens, images)
        losses = torch.stack([_loss(grids[i], found.logits[i], found.masks[i], settings) for i in defective])
        (gradient,) = torch.autograd.grad(losses.sum() * scale, tokens)
    usual = [float(ordinary_loss(grids[i].detach(), found.masks[i])) for i in defective]
    places = found.images[found.defective].tolist()
    each = zip(places, defective, losses.tolist(), usual, strict=True)
    return [Loss(place, at, value, value - least) for place, at, value, least in each], gradient


def _loss(patches: Tensor, logits: Tensor, mask: Tensor, settings: RepairSettings) -> Tensor:
    if settings.target == "weighted":
        return neighbour_loss(patches, logits, mask, settings.kernel, settings.temperature)
    return average_loss(patches, mask)


def _window_gradients(
    backbone: Backbone, found: BlockDefects, seeds: list[Tensor], deltas: Deltas, tf32: bool
) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield ∂/∂ε of each target of the window by name, one for each gradient `[B, T, N]` of the window's output.

    The window is emptied on the way, so that the graph of a block is freed before the next one is needed.
    """
    module = deltas.module
    blocks = [passed.block for passed in found.window]
    if not deltas.by_block.keys() >= set(blocks):
        found.forget()  # decomposing needs the memory
    targets_of = {block: deltas.of_block(block) for block in blocks}
    while found.window:
        passed = found.window.pop()
        entering, leaving = passed.entering, passed.leaving
        if leaving is None:
            entering, leaving = recorded(backbone, module, passed.block, entering, found.context)
        targets = targets_of[passed.block]
        names = list(dict.fromkeys(target.ref.name for target in targets))
        sources = [module.get_parameter(name) for name in names]
        projected: dict[str, list[Tensor]] = {target.name: [] for target in targets}
        onward = [entering] if found.window else []  # the gradient of the first block's input is not needed
        for at, seed in enumerate(seeds):
            with float32_products(tf32):
                gradients = torch.autograd.grad(leaving, [*sources, *onward], seed, retain_graph=at + 1 < len(seeds))
            of_weights, of_input = gradients[: len(sources)], gradients[len(sources) :]
            if of_input:
                (seeds[at],) = of_input
            by_name = dict(zip(names, of_weights, strict=True))
            for target in targets:
                projected[target.name].append(target.basis.project(rows_of(by_name[target.ref.name], target.ref)))
        yield from projected.items()


def neighbour_loss(patches: Tensor, logits: Tensor, mask: Tensor, kernel: int, temperature: float) -> Tensor:
    """Return the mean over masked tokens of ‖x − target‖, over the mean token norm of the interior; a scalar.

    One image: patches `[h, w, N]`, logits and mask `[h, w]`. Targets and the scale carry no gradient.
    """
    with torch.no_grad():
        targets = learning_targets(patches, logits, mask, kernel, temperature)
        scale = patches.float()[interior(mask, kernel // 2)].norm(dim=-1).mean()
    return (patches[mask].float() - targets).norm(dim=-1).mean() / scale


def average_loss(patches: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over masked tokens of ‖x − average of the unmarked neighbours‖, over `ordinary_scale`; a scalar.

    One image: patches `[h, w, N]`, mask bool `[h, w]`, border included. Averages and the scale carry no gradient.
    """
    with torch.no_grad():
        targets = neighbour_averages(patches, mask)[mask]
        scale = ordinary_scale(patches, mask)
    return (patches[mask].float() - targets).norm(dim=-1).mean() / scale


def ordinary_scale(patches: Tensor, mask: Tensor) -> Tensor:
    """Return the mean norm of unmarked tokens; of all tokens if every token is marked."""
    norms = patches.float().norm(dim=-1)
    return norms[~mask].mean() if not bool(mask.all()) else norms.mean()


def ordinary_loss(patches: Tensor, mask: Tensor) -> Tensor:
    """Return the loss of unmarked tokens, the least to expect of marked ones; 0 if every token is marked."""
    if bool(mask.all()):
        return patches.new_zeros((), dtype=torch.float32)
    return neighbour_distances(patches, mask)[~mask].mean() / ordinary_scale(patches, mask)
