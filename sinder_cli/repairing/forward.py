"""The forward pass that the images of a batch share, up to the first defective block of each.

Every block that may lie in a window is recorded separately for the backward pass, from a detached input to its output.
So the loss of a defect is propagated back through blocks that have run already, and graphs that no window reaches any
more are dropped on the way. Shapes: B images still in the pass, T tokens, N width, h × w patches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from sinder_cli.backbone.contract import Backbone
from sinder_cli.defects.detection import (
    DetectionRule,
    alignment_logits,
    block_evidence,
    defective_now,
    norm_ratios,
    unsettled,
)
from sinder_cli.defects.tokens import patch_grid

if TYPE_CHECKING:
    from torch import Tensor, nn

# Going back through a recorded block costs 1.75 of its forward passes (measured: float32, width 384, 1370 tokens) for
# all images that went through it; recording it again costs 2.75, but only for the defective images.
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
        """Return the same block for some of the images, bool `[B]`, without the graph."""
        return Passed(self.block, self.entering.detach()[chosen], None)


@dataclass(frozen=True)
class BlockDefects:
    """The images of a batch that are defective at `block`, possibly together with others that share their window."""

    block: int
    images: Tensor  # [B]: their places in the batch
    window: list[Passed]  # ends with `block`
    tokens: Tensor  # [B, T, N] after `block`
    logits: Tensor  # [B, h, w]
    masks: Tensor  # bool [B, h, w]
    defective: Tensor  # bool [B]
    context: Any

    def alone(self) -> BlockDefects:
        """Return the same without the other images, and without graphs."""
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
        """Drop the graphs: their blocks have to be recorded again."""
        self.window[:] = [replace(passed, leaving=None) for passed in self.window]


@dataclass(frozen=True)
class Interest:
    """The decisions about an image that is defective at a block."""

    gradient: bool  # compute its gradient there
    onward: bool  # let it go on to later blocks, which may have a defect of their own


FIRST_ALONE = Interest(gradient=True, onward=False)


def recorded(backbone: Backbone, module: nn.Module, block: int, tokens: Tensor, context: Any) -> tuple[Tensor, Tensor]:
    """Run one block on `[B, T, N]` for a separate backward pass; return its input, as a leaf, and its output.

    The graph leads to that leaf, and to the parameters of the block that require gradients.
    """
    entering = tokens.detach().requires_grad_()
    with torch.enable_grad():
        return entering, backbone.run_block(module, block, entering, context)


@dataclass
class ForwardPass:
    """The images of a batch on their way through the blocks; those that have left it are gone from all tensors.

    Ask for the `next_defects` until there are none, and after each time say what is `wanted` of them.
    """

    backbone: Backbone
    module: nn.Module
    directions: Directions
    rule: DetectionRule
    window: int
    images: Tensor  # [B, 3, H, W]: for the patch grid
    context: Any
    tokens: Tensor  # [b, T, N]
    start: Tensor  # [b, h, w]: norm ratios at the embedding
    places: Tensor  # [b]: in the batch
    known: Tensor | None  # bool [b, blocks, h, w]
    block: int = 0  # the next one
    behind: deque[Passed] = field(default_factory=deque)  # the latest recorded blocks

    @classmethod
    @torch.no_grad()
    def entering(
        cls,
        backbone: Backbone,
        module: nn.Module,
        directions: Directions,
        images: Tensor,
        rule: DetectionRule,
        window: int,
        known: Tensor | None = None,
    ) -> ForwardPass:
        """Embed images `[B, 3, H, W]`.

        `known`, bool `[B, blocks, h, w]`, are tokens that the original marks: they stay defective until they have
        settled among their neighbours.
        """
        tokens, context = backbone.embed(module, images)
        start = norm_ratios(patch_grid(backbone, tokens, images).float().norm(dim=-1))
        places = torch.arange(len(images), device=tokens.device)
        return cls(backbone, module, directions, rule, window, images, context, tokens, start, places, known)

    @cached_property
    def judged(self) -> set[int]:
        """The blocks that can be defective: the last one shows tokens that are not finite, if nothing else."""
        last = self.backbone.depth - 1
        return {block for block in range(last) if self.rule.can_mark(self.directions.gaps[block])} | {last}

    @torch.no_grad()
    def next_defects(self) -> BlockDefects | None:
        """Run on to the next block with a defective image; return None if there is none, or if all images have left.

        An image with tokens that are not finite is treated as defective, with no token masked: its loss is NaN, and it
        does not count as clean.
        """
        earliest = min(self.judged) - self.window + 1  # first block of any window
        while self.block < self.backbone.depth and len(self.tokens):
            block = self.block
            self._run(block, self.window if block >= earliest else 0)
            self.block += 1
            if block in self.judged and (found := self._defects(block)) is not None:
                return found
        return None

    def wanted(self, found: BlockDefects, interests: Sequence[Interest]) -> BlockDefects | None:
        """Let images that are not to go on leave; return the defects that a gradient is wanted of, None without any.

        There is one interest for each defective image. The caller should keep the result under the name of what it
        gives, so that the graphs of images that are left out do not live on, and removes a block from the window when
        it is done with it.
        """
        rows = found.defective.nonzero()[:, 0]
        asked, stays = torch.zeros_like(found.defective), ~found.defective
        asked[rows] = torch.tensor([each.gradient for each in interests], device=rows.device)
        stays[rows] = torch.tensor([each.onward for each in interests], device=rows.device)
        if not asked.any():
            return None
        self._keep(stays)
        found = replace(found, defective=asked)
        return found.alone() if asked.float().mean() < RECORDED_SHARE else found

    def _run(self, block: int, window: int) -> None:
        """Run one block, and record it among the last `window`; 0 records nothing."""
        if not window:
            self.tokens = self.backbone.run_block(self.module, block, self.tokens, self.context)
            return
        if len(self.behind) == window:
            self.behind.popleft()
        entering, leaving = recorded(self.backbone, self.module, block, self.tokens, self.context)
        self.behind.append(Passed(block, entering, leaving))
        self.tokens = leaving.detach()

    def _defects(self, block: int) -> BlockDefects | None:
        """Return the images that are defective after a block; None if there are none."""
        patches = patch_grid(self.backbone, self.tokens, self.images)
        logits = alignment_logits(patches, self.directions.nu[block])
        evidence = block_evidence(patches, logits, self.directions.gaps[block], self.rule)
        masks = defective_now(evidence.ratios, self.start, evidence.predicted, self.rule)
        if self.known is not None:
            masks |= _still_defective(patches, masks, self.known[:, block])
        broken = ~logits.isfinite().flatten(1).all(dim=1)
        defective = (masks.flatten(1).sum(dim=1) >= self.rule.min_tokens) | broken  # [b]
        if not defective.any():
            return None
        return BlockDefects(block, self.places, list(self.behind), self.tokens, logits, masks, defective, self.context)

    def _keep(self, stay: Tensor) -> None:
        """Let the other images leave, bool `[b]`; recorded graphs are forgotten, since the defects use them up."""
        self.behind = deque(passed.of(stay) for passed in self.behind)
        self.tokens, self.start, self.places = self.tokens[stay], self.start[stay], self.places[stay]
        self.known = None if self.known is None else self.known[stay]


def _still_defective(patches: Tensor, masks: Tensor, known: Tensor) -> Tensor:
    """Return the known tokens that have not settled: patches `[B, h, w, N]`, masks and known `[B, h, w]` → same."""
    found = torch.zeros_like(known)
    for image in known.flatten(1).any(dim=1).nonzero()[:, 0].tolist():
        found[image] = unsettled(patches[image], masks[image] | known[image]) & known[image]
    return found
