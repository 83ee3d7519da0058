"""The forward pass that the images of a batch share, up to the first defective block of each.

Every block that may lie in a window is recorded for a backward pass of its own, between a detached input and its
output: the loss of a defect goes back through what has run already, and graphs that no window reaches any more are
dropped on the way. Shapes: B images still in the pass, T tokens, N width, h × w patches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sinder_cli.backbone.contract import Backbone
from sinder_cli.defects.detection import (
    DetectionRule,
    alignment_logits,
    defect_mask,
    defective_now,
    norm_ratios,
    unsettled,
)
from sinder_cli.defects.tokens import patch_grid

if TYPE_CHECKING:
    from torch import Tensor, nn

# Going back through a recorded block costs 1.75 of its forward passes (measured: float32, width 384, 1370 tokens) for
# all images that went through it; recording it anew costs 2.75, but for the defective images alone.
RECORDED_SHARE = 1.75 / 2.75


@dataclass(frozen=True)
class Directions:
    """The cumulative defect directions ν `[blocks, N]` of a backbone and σ₁/σ₂ of each."""

    nu: Tensor
    gaps: list[float]


@dataclass(frozen=True)
class Passed:
    """One block of the forward pass; `leaving` has a graph that ends at `entering`, or is None where it has none."""

    block: int
    entering: Tensor  # [B, T, N], a leaf
    leaving: Tensor | None  # [B, T, N]

    def of(self, chosen: Tensor) -> Passed:
        """The same for some of the images, bool `[B]`, without the graph."""
        return Passed(self.block, self.entering.detach()[chosen], None)


@dataclass(frozen=True)
class BlockDefects:
    """The images of a batch that are defective at `block`, perhaps among others that shared their window."""

    block: int
    images: Tensor  # [B]: which of the batch these are
    window: list[Passed]  # ends with `block`
    tokens: Tensor  # [B, T, N] after `block`
    logits: Tensor  # [B, h, w]
    masks: Tensor  # bool [B, h, w]
    defective: Tensor  # bool [B]
    context: Any

    def alone(self) -> BlockDefects:
        """The same without the others, and without graphs."""
        chosen = self.defective
        return replace(
            self,
            images=self.images[chosen],
            window=[passed.of(chosen) for passed in self.window],
            tokens=self.tokens[chosen],
            logits=self.logits[chosen],
            masks=self.masks[chosen],
            defective=chosen[chosen],
        )

    def forget(self) -> None:
        """Let go of the graphs: their blocks have to be recorded anew."""
        self.window[:] = [replace(passed, leaving=None) for passed in self.window]


@dataclass(frozen=True)
class Interest:
    """What is to be done with an image that is defective at a block."""

    gradient: bool  # whether one is to be taken there
    onward: bool  # whether it goes on to later blocks, which may have a defect of their own


FIRST_ALONE = Interest(gradient=True, onward=False)


def recorded(backbone: Backbone, module: nn.Module, block: int, tokens: Tensor, context: Any) -> tuple[Tensor, Tensor]:
    """Run one block on `[B, T, N]` for a backward pass of its own: what entered it, as a leaf, and what left it.

    The graph leads to that leaf, and to those parameters of the block that require gradients.
    """
    entering = tokens.detach().requires_grad_()
    with torch.enable_grad():
        return entering, backbone.run_block(module, block, entering, context)


@torch.no_grad()
def first_defects(
    backbone: Backbone,
    module: nn.Module,
    directions: Directions,
    images: Tensor,
    rule: DetectionRule,
    window: int,
    known: Tensor | None = None,
    interest: Callable[[BlockDefects], Sequence[Interest]] = lambda found: [FIRST_ALONE] * len(found.images),
) -> Iterator[BlockDefects]:
    """Run a batch `[B, 3, H, W]` block by block; an image leaves it at its first defective block of `interest`.

    `interest` gives one answer for each image of what is found; those of images without a defect do not count.

    `known`, bool `[B, blocks, h, w]`, are tokens that the original marks: they stay defective until they have settled
    among their neighbours. An image whose tokens are not finite leaves the batch too, with nothing masked: its loss is
    NaN, and it is not clean. The pass goes on when the next defects are asked for; whoever is done with a block of a
    window takes it out.
    """
    last = backbone.depth - 1
    by_norm = rule.norm_factor > 0 and rule.mark != "weights"
    judged = {block for block in range(last) if by_norm or rule.trusts(directions.gaps[block])} | {last}
    earliest = min(judged) - window + 1  # of all windows
    tokens, context = backbone.embed(module, images)
    start = norm_ratios(patch_grid(backbone, tokens, images).float().norm(dim=-1))
    behind: deque[Passed] = deque()
    places = torch.arange(len(images), device=tokens.device)
    for block in range(backbone.depth):
        if len(behind) == window:
            behind.popleft()
        if block < earliest:
            tokens = backbone.run_block(module, block, tokens, context)
        else:
            entering, leaving = recorded(backbone, module, block, tokens, context)
            behind.append(Passed(block, entering, leaving))
            tokens = leaving.detach()
            del leaving  # so that its graph ends with `behind`
        if block not in judged:  # what is not finite stays so: the last block tells
            continue
        patches = patch_grid(backbone, tokens, images)
        logits = alignment_logits(patches, directions.nu[block])
        predicted = defect_mask(logits, rule) & rule.trusts(directions.gaps[block])
        masks = defective_now(norm_ratios(patches.float().norm(dim=-1)), start, predicted, rule)
        if known is not None:
            masks |= _still_defective(patches, masks, known[:, block])
        broken = ~logits.isfinite().flatten(1).all(dim=1)
        defective = (masks.flatten(1).sum(dim=1) >= rule.min_tokens) | broken  # [B]
        if not defective.any():
            continue
        found = BlockDefects(block, places, list(behind), tokens, logits, masks, defective, context)
        wanted = interest(found)
        asked = torch.tensor([each.gradient for each in wanted], device=defective.device) & defective
        if not asked.any():
            continue
        found = replace(found, defective=asked)
        stay = torch.tensor([each.onward for each in wanted], device=defective.device) | ~defective
        behind = deque(passed.of(stay) for passed in behind)  # its graphs are spent on what is found
        tokens, start, places = tokens[stay], start[stay], places[stay]
        known = None if known is None else known[stay]
        if asked.float().mean() < RECORDED_SHARE:
            found = found.alone()
        yield found
        if not len(tokens):
            return


def _still_defective(patches: Tensor, masks: Tensor, known: Tensor) -> Tensor:
    """The known tokens that have not settled: patches `[B, h, w, N]`, masks and known bool `[B, h, w]` → the same."""
    found = torch.zeros_like(known)
    for image in known.flatten(1).any(dim=1).nonzero()[:, 0].tolist():
        found[image] = unsettled(patches[image], masks[image] | known[image]) & known[image]
    return found
