"""The forward pass that the images of a batch share, up to the first defective block of each.

Every block that may lie in a window is recorded separately for the backward pass, from a detached input to its output.
So the loss of a defect is propagated back through blocks that have run already, and graphs that no window reaches any
more are dropped on the way. Shapes: B images still in the pass, T tokens, N width, h × w patches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
    """Run a batch `[B, 3, H, W]` block by block and yield its defects; by default an image leaves at its first.

    `interest` gives one answer for each image of a block with defects; answers for images without one are ignored. The
    block is yielded if a gradient of some image is wanted; images that are not to go on then leave the batch.

    `known`, bool `[B, blocks, h, w]`, are tokens that the original marks: they stay defective until they have settled
    among their neighbours. An image with tokens that are not finite is treated as defective, with no token masked: its
    loss is NaN, and it does not count as clean. The pass continues when the next defects are requested; the caller
    removes a block from the window when it is done with it.
    """
    last = backbone.depth - 1
    judged = {block for block in range(last) if rule.can_mark(directions.gaps[block])} | {last}
    earliest = min(judged) - window + 1  # first block of any window
    batch = _Batch.entering(backbone, module, directions, rule, images, known)
    for block in range(backbone.depth):
        batch.run(block, window if block >= earliest else 0)
        found = batch.defects(block) if block in judged else None  # NaN or infinity stays so: the last block shows it
        if found is None:
            continue
        wanted = interest(found)
        asked = torch.tensor([each.gradient for each in wanted], device=found.defective.device) & found.defective
        if not asked.any():
            continue
        batch.keep(torch.tensor([each.onward for each in wanted], device=asked.device) | ~found.defective)
        found = replace(found, defective=asked)
        if asked.float().mean() < RECORDED_SHARE:
            found = found.alone()  # under the same name: the graphs of all images must not live on here
        yield found
        if not len(batch.tokens):
            return


@dataclass
class _Batch:
    """The images of a batch on their way through the blocks; those that have left it are gone from all tensors."""

    backbone: Backbone
    module: nn.Module
    directions: Directions
    rule: DetectionRule
    images: Tensor  # [B, 3, H, W]: for the patch grid
    context: Any
    tokens: Tensor  # [b, T, N]
    start: Tensor  # [b, h, w]: norm ratios at the embedding
    places: Tensor  # [b]: in the batch
    known: Tensor | None  # bool [b, blocks, h, w]
    behind: deque[Passed] = field(default_factory=deque)  # the latest recorded blocks

    @classmethod
    def entering(
        cls,
        backbone: Backbone,
        module: nn.Module,
        directions: Directions,
        rule: DetectionRule,
        images: Tensor,
        known: Tensor | None,
    ) -> _Batch:
        """Embed images `[B, 3, H, W]`."""
        tokens, context = backbone.embed(module, images)
        start = norm_ratios(patch_grid(backbone, tokens, images).float().norm(dim=-1))
        places = torch.arange(len(images), device=tokens.device)
        return cls(backbone, module, directions, rule, images, context, tokens, start, places, known)

    def run(self, block: int, window: int) -> None:
        """Run one block, and record it among the last `window`; 0 records nothing."""
        if not window:
            self.tokens = self.backbone.run_block(self.module, block, self.tokens, self.context)
            return
        if len(self.behind) == window:
            self.behind.popleft()
        entering, leaving = recorded(self.backbone, self.module, block, self.tokens, self.context)
        self.behind.append(Passed(block, entering, leaving))
        self.tokens = leaving.detach()

    def defects(self, block: int) -> BlockDefects | None:
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

    def keep(self, stay: Tensor) -> None:
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
