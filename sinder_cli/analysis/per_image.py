"""Maps to draw of each image: norms, angles, masks, principal components, targets, and the attention of cls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sinder_cli.analysis.directions import Basis
from sinder_cli.analysis.gain import Outliers, inpainted_cosines
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.analysis.tokens import BlockTokens, Subject, block_by_block, in_basis
from sinder_cli.defects.detection import learning_targets
from sinder_cli.defects.settings import STAGES
from sinder_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


TEMPERATURES = (0.01, 0.1, 1.0)  # τ of the learning targets that are drawn
SHOWN_BLOCKS = 4
CUMULATIVE = STAGES.index("cumulative")


@dataclass(frozen=True)
class TargetMaps:
    """Norms of one image at its first defective block: as they are, and with equation (5)'s tokens at their target."""

    block: int
    norms: Tensor  # [h, w], as they are
    mask: Tensor  # bool [h, w]
    by_temperature: dict[float, Tensor]  # τ → [h, w]


@dataclass(frozen=True)
class InpaintedMaps:
    """Comparison of one image with its inpainted original, after the last block."""

    cosine: Tensor  # [h, w]
    marked: Tensor  # bool [h, w]: outlying in some block
    cls_cosine: float | None


@dataclass(frozen=True)
class PortraitSide:
    """Maps of one backbone's tokens of one image."""

    components: Tensor  # [h, w, 3]: last block, in the shared basis
    norms: Tensor  # [h, w]: last block
    in_basis: Tensor  # bool [h, w]: the tokens from which the basis was computed
    outlying: Tensor  # bool [h, w]: last block
    angles: dict[int, Tensor]  # block → [h, w] degrees to ν of the cumulative stage
    masks: dict[int, Tensor]  # block → bool [h, w], equation (5); blocks whose direction is determined
    attention: Tensor | None  # [h, w]: of cls in the last block, mean over heads; None without cls
    targets: TargetMaps | None  # None where no block of this image is defective
    inpainted: InpaintedMaps | None = None  # None if no token is outlying in any block, or if not requested


@dataclass(frozen=True)
class Portrait:
    """One image, and the maps of each backbone."""

    name: str
    image: Tensor  # [3, H, W] float32: what the backbones saw, normalized
    sides: tuple[PortraitSide, ...]
    patch_cosine: Tensor | None  # [h, w]: between both sides' last blocks


def shown_blocks(depth: int, chosen: Sequence[int] | Literal["all"] | None) -> tuple[int, ...]:
    """Return the blocks to draw: those chosen, else the last of each quarter of the depth (9, 19, 29, 39 of 40).

    Raises `UsageError` for a block that does not exist.
    """
    if chosen is None:
        quarters = min(SHOWN_BLOCKS, depth)
        return tuple((at + 1) * depth // quarters - 1 for at in range(quarters))
    if chosen == "all":
        return tuple(range(depth))
    beyond = [block for block in chosen if block >= depth]
    if beyond:
        raise UsageError(f"cannot draw block {beyond[0]}", f"blocks are 0 to {depth - 1}", "change --blocks")
    return tuple(dict.fromkeys(chosen))


@torch.no_grad()
def portraits(
    subjects: Sequence[Subject],
    batches: Iterable[tuple[list[str], Tensor]],
    basis: Basis,
    settings: AnalyzeSettings,
    device: str,
) -> Iterator[Portrait]:
    """Run named batches `[B, 3, H, W]` again and yield each image's maps, one image at a time."""
    for names, batch in batches:
        images = batch.to(device)
        runs = [_run(subject, images, basis, settings) for subject in subjects]
        lasts = [last for last, _ in runs]
        cosine = cosine_similarity(lasts[0], lasts[1], dim=-1).cpu() if len(runs) == 2 else None  # [B, h, w]
        for at, name in enumerate(names):
            sides = tuple(sides[at] for _, sides in runs)
            yield Portrait(name, batch[at].cpu(), sides, None if cosine is None else cosine[at])


def _run(
    subject: Subject, images: Tensor, basis: Basis, settings: AnalyzeSettings
) -> tuple[Tensor, list[PortraitSide]]:
    """Run one backbone on a batch; return the last block's patches `[B, h, w, N]` and each image's maps."""
    nu = subject.directions(images.device)
    shown = shown_blocks(subject.backbone.depth, settings.blocks)
    angles: dict[int, Tensor] = {}
    masks: dict[int, Tensor] = {}
    targets: list[TargetMaps | None] = [None] * len(images)
    outliers = Outliers(settings)
    last: BlockTokens | None = None
    with ClsAttention() as watched:
        for block, side in enumerate(block_by_block(subject, images, nu, settings)):
            outliers.add(side)
            found = side.masks.get("equation_5")
            if block in shown:
                angles[block] = side.degrees[..., CUMULATIVE].cpu()
                if found is not None:
                    masks[block] = found.cpu()
            if found is not None:
                targets = [old or _targets(block, side, at, settings) for at, old in enumerate(targets)]
            last = side
    assert last is not None  # a backbone has a block
    attention = _cls_map(watched.weights, subject, last)
    components, norms = basis.project(last.patches), last.norms.cpu()
    inpainted = _inpainted(subject, images, outliers, last, settings)
    outlying, used = last.masks["outlying"].cpu(), in_basis(last, settings).cpu()
    return last.patches, [
        PortraitSide(
            components=components[at],
            norms=norms[at],
            in_basis=used[at],
            outlying=outlying[at],
            angles={block: part[at] for block, part in angles.items()},
            masks={block: part[at] for block, part in masks.items()},
            attention=None if attention is None else attention[at],
            targets=targets[at],
            inpainted=inpainted.get(at),
        )
        for at in range(len(images))
    ]


def _inpainted(
    subject: Subject, images: Tensor, outliers: Outliers, last: BlockTokens, settings: AnalyzeSettings
) -> dict[int, InpaintedMaps]:
    """Return the maps of those images of the batch that have outlying tokens, by their index."""
    if not (settings.inpaint and subject.original):
        return {}
    found = inpainted_cosines(subject, images, outliers, last, settings)
    marked = outliers.marked.cpu()
    return {
        at: InpaintedMaps(found.patches[row], marked[at], None if found.cls is None else found.cls[row].item())
        for row, at in enumerate(found.images)
    }


def _targets(block: int, side: BlockTokens, at: int, settings: AnalyzeSettings) -> TargetMaps | None:
    """Return the learning targets of one image of the batch; None if the image is not defective in this block."""
    mask = side.masks["equation_5"][at]
    if int(mask.sum()) < settings.min_tokens:
        return None
    patches, logits = side.patches[at], -side.cosines[at, ..., CUMULATIVE]
    norms = side.norms[at].cpu()
    moved = {}
    for temperature in TEMPERATURES:
        target = learning_targets(patches, logits, mask, settings.kernel, temperature)
        moved[temperature] = norms.masked_scatter(mask.cpu(), target.norm(dim=-1).cpu())
    return TargetMaps(block, norms, mask.cpu(), moved)


def _cls_map(weights: Tensor | None, subject: Subject, side: BlockTokens) -> Tensor | None:
    """Return the attention of cls to the patches, `[B, h, w]`: the mean over heads of weights `[B, heads, T]`."""
    B, h, w, _ = side.patches.shape
    prefix = subject.backbone.prefix_tokens
    if weights is None or not subject.backbone.has_cls or weights.shape[0::2] != (B, prefix + h * w):
        return None
    return weights.mean(dim=1)[:, prefix:].unflatten(1, (h, w)).cpu()


SOFTMAX = frozenset({torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax})


class ClsAttention(TorchFunctionMode):
    """Context that keeps the attention weights of the first token, `[B, heads, T]`, of the last attention inside it.

    `weights` stays None if attention is computed by a kernel that is not known here, such as that of xformers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is scaled_dot_product_attention:
            self._keep(_first_row(*args, **kwargs))
        elif func in SOFTMAX and isinstance(result, torch.Tensor) and result.dim() == 4:
            self._keep(result[:, :, 0])
        return result

    def _keep(self, weights: Tensor) -> None:
        if weights.dim() == 3:
            self.weights = weights.detach().float()


def _first_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,  # noqa: ARG001  # the arguments of the fused kernel, by its names
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001
    is_causal: bool = False,  # noqa: ARG001
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return softmax(q₀Kᵀ · scale + mask) of the first query, `[B, heads, T]`, from q and K `[B, heads, T, d]`."""
    if enable_gqa:  # several heads of queries share a key
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = (query[..., :1, :].float() @ key.float().transpose(-2, -1))[..., 0, :]
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is not None:
        row = attn_mask[..., 0, :]
        scores = scores.masked_fill(~row, -math.inf) if row.dtype == torch.bool else scores + row
    return scores.softmax(dim=-1)
