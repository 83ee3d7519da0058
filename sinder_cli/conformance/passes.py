"""Checks that embed → blocks → norm is the library's forward, tokens are in order, and blocks behave as required."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sinder_cli.backbone.contract import trained_references
from sinder_cli.backbone.weights import rows_of
from sinder_cli.conformance.subject import GRID, NonconformityError, Subject, gaussian, relative_error
from sinder_cli.defects.tokens import last_tokens

SAME = 1e-4  # relative error of two ways to compute one thing in float32, over the depth of a model


def forward_agrees(subject: Subject, forward: Callable[[object, Tensor], Tensor]) -> str:
    """Check that blocks one by one, then the final norm, give what the library's own forward gives, at two sizes."""
    backbone = subject.backbone
    native = backbone.image_size // backbone.patch_size
    errors = []
    for h, w in ((native, native), GRID):
        images = subject.images(1, h, w)
        with torch.no_grad():
            expected = forward(subject.module, images)
        found = _normalized(subject, images)
        if found.shape != expected.shape:
            shapes = f"{list(found.shape)} for {list(expected.shape)}"
            raise NonconformityError(f"at {h} × {w} patches the blocks give {shapes}")
        errors.append(_require_same(found, expected, f"at {h} × {w} patches"))
    return f"relative error {max(errors):.1e}, at {native} × {native} and {GRID[0]} × {GRID[1]} patches"


def images_are_apart(subject: Subject) -> str:
    """Check that a batch of two equals two batches of one, and that a second pass gives the same bits as the first."""
    both = subject.images(2)
    together = _normalized(subject, both)
    alone = torch.cat([_normalized(subject, image[None]) for image in both])
    error = _require_same(together, alone, "a batch of 2 is not two batches of 1:")
    if not torch.equal(together, _normalized(subject, both)):
        raise NonconformityError("two passes over the same images differ: something is random in it")
    return f"relative error {error:.1e}"


def blocks_keep_their_input(subject: Subject) -> str:
    """Check that no block writes into its input tokens: a repair needs them again."""
    tokens, context = subject.embedded(subject.images(1))
    for index in range(subject.backbone.depth):
        before = tokens.clone()
        with torch.no_grad():
            after = subject.backbone.run_block(subject.module, index, tokens, context)
        if not torch.equal(tokens, before):
            raise NonconformityError(f"block {index} changes the tokens that it is given")
        if after.shape != tokens.shape:
            raise NonconformityError(f"block {index} returns {list(after.shape)} for {list(tokens.shape)}")
        tokens = after
    return f"{subject.backbone.depth} blocks"


def gradients_arrive(subject: Subject) -> str:
    """Check that a loss after each block has a gradient at its input, and one other than 0 at every trained weight."""
    backbone, module = subject.backbone, subject.module
    tokens, context = subject.embedded(subject.images(1))
    weights = 0
    for index, block in enumerate(backbone.layers.blocks):
        references = trained_references(block)
        parameters = {name: module.get_parameter(name) for name in {ref.name for ref in references.values()}}
        entering = tokens.detach().requires_grad_()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        leaving = backbone.run_block(module, index, entering, context)
        found = torch.autograd.grad(
            leaving, [entering, *parameters.values()], gaussian(*leaving.shape), allow_unused=True
        )
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        by_name = dict(zip(parameters, found[1:], strict=True))
        for role, ref in references.items():
            gradient = by_name[ref.name]
            if gradient is None or not bool(rows_of(gradient, ref).any()):
                raise NonconformityError(f"block {index}, {role} ({ref}) gets no gradient")
        if found[0] is None:
            raise NonconformityError(f"block {index} passes no gradient to its input")
        weights += len(references)
        tokens = leaving.detach()
    return f"{weights} weights"


@torch.no_grad()
def _normalized(subject: Subject, images: Tensor) -> Tensor:
    return subject.backbone.finish(subject.module, last_tokens(subject.backbone, subject.module, images))


def _require_same(found: Tensor, expected: Tensor, where: str) -> float:
    error = relative_error(found, expected)
    if not error <= SAME:
        raise NonconformityError(f"{where} a relative error of {error:.1e}")
    return error


PROBED = ((0, 0), (1, 3), (3, 1), (4, 6))  # patches of the 5 × 7 whose pixels are changed
NEAR = 1  # patches: how far the stem may mix, as overlapping convolutions do


def tokens_are_counted(subject: Subject) -> str:
    """Check that there are prefix + h · w tokens, and that the prefix, with cls in it, is the same for every image."""
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
    """Check that other pixels in one patch move token prefix + row · w + column most, and others only beside it."""
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
