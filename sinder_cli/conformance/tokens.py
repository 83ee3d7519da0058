"""Whether prefix tokens are counted right, and patch tokens lie row by row after them."""

from __future__ import annotations

import torch

from sinder_cli.conformance.records import NonconformityError
from sinder_cli.conformance.subject import GRID, Subject

PROBED = ((0, 0), (1, 3), (3, 1), (4, 6))  # patches of the 5 × 7 whose pixels are changed
NEAR = 1  # patches: how far the stem may mix, as overlapping convolutions do


def tokens_are_counted(subject: Subject) -> str:
    """There are prefix + h · w tokens; the prefix is the same for every image, and cls is a part of it."""
    backbone = subject.backbone
    images = subject.images(2)
    tokens, _ = subject.embedded(images)
    expected = (2, backbone.prefix_tokens + GRID[0] * GRID[1], backbone.width)
    if tuple(tokens.shape) != expected:
        what = f"{backbone.prefix_tokens} prefix tokens and {GRID[0]} × {GRID[1]} patches of width {backbone.width}"
        raise NonconformityError(f"embed gives {list(tokens.shape)}, not {what} for 2 images")
    if backbone.has_cls and not backbone.prefix_tokens:
        raise NonconformityError("it has a cls token, and no prefix token that could be one")
    one, other = tokens[:, : backbone.prefix_tokens]
    different = (one != other).any(dim=1).nonzero()[:, 0].tolist()
    if different:
        raise NonconformityError(f"prefix token {different[0]} depends on the image, as patch tokens do")
    return f"{backbone.prefix_tokens} prefix tokens" + (", cls first" if backbone.has_cls else ", no cls")


def patches_lie_row_by_row(subject: Subject) -> str:
    """Other pixels in one patch change the token prefix + row · w + column most, and none that is not beside it."""
    backbone, P = subject.backbone, subject.backbone.patch_size
    image, other = subject.images(1), subject.images(1, seed=1)
    before, _ = subject.embedded(image)
    changed_tokens = 0
    for row, column in PROBED:
        mixed = image.clone()
        inside = (..., slice(row * P, (row + 1) * P), slice(column * P, (column + 1) * P))
        mixed[inside] = other[inside]
        after, _ = subject.embedded(mixed)
        moved = (after - before)[0].norm(dim=1)  # [T]
        most = int(moved.argmax()) - backbone.prefix_tokens
        if most != row * GRID[1] + column:
            raise NonconformityError(f"the pixels of patch {row}, {column} move patch token {most} most")
        changed = (moved > 0).nonzero()[:, 0] - backbone.prefix_tokens
        far = torch.maximum((changed // GRID[1] - row).abs(), (changed % GRID[1] - column).abs()) > NEAR
        if bool((far | (changed < 0)).any()):
            raise NonconformityError(f"the pixels of patch {row}, {column} move {len(changed)} tokens, even far ones")
        changed_tokens = max(changed_tokens, len(changed))
    return f"one patch moves {changed_tokens} token" + ("s" if changed_tokens > 1 else "")
