"""The projected gradient against autograd through W₀ + U diag(ε) Vᵀ in a whole, differentiable forward pass."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sinder_cli.backbone.layermap import trained_references
from sinder_cli.defects.detection import DetectionRule, alignment_logits
from sinder_cli.repair import step
from sinder_cli.repair.basis import singular_basis
from sinder_cli.repair.deltas import Deltas
from sinder_cli.repair.settings import RepairSettings
from sinder_cli.repair.step import Directions, StepGradient, first_defects, step_gradient

RED = [(3, 3), (5, 8), (9, 4)]
BLUE = [(2, 6), (6, 2), (8, 8), (8, 9)]
EARLY, LATE, DEPTH = 1, 4, 6


def gradient_of(planted: Any, images: list[Tensor], **settings: Any) -> StepGradient:
    deltas = Deltas(planted.backbone, planted.module)
    chosen = RepairSettings.model_validate(settings)
    return step_gradient(planted.backbone, planted.module, planted.directions, deltas, torch.stack(images), chosen)


def looped_loss(grid: Tensor, nu: Tensor, marked: list[tuple[int, int]], tau: float = 0.1) -> Tensor:
    """The loss of one image, kernel 3, written token by token; differentiable in the marked tokens."""
    gaussian = [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    fixed = grid.detach()
    height, width, _ = grid.shape
    distances = []
    for row, column in marked:
        weights, target = 0.0, torch.zeros_like(nu)
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                token = fixed[row + i, column + j]
                logit = -abs(float(token @ nu) / float(token.norm()))
                weight = math.exp(logit / tau) * gaussian[i + 1][j + 1]
                weights += weight
                target = target + weight * token
        distances.append((grid[row, column] - target / weights).norm())
    norms = [float(fixed[r, c].norm()) for r in range(1, height - 1) for c in range(1, width - 1)]
    return torch.stack(distances).mean() / (sum(norms) / len(norms))


def autograd_gradients(
    planted: Any, image: Tensor, block: int, marked: list[tuple[int, int]]
) -> tuple[float, dict[str, Tensor]]:
    """∂L/∂ε of every target of every block up to `block`, and the loss, through the parametrized model."""
    stored = dict(planted.module.state_dict())
    epsilons: dict[str, Tensor] = {}
    changes: dict[str, list[tuple[Any, Tensor]]] = {}
    for index in range(block + 1):
        for role, ref in trained_references(planted.backbone.layers.blocks[index]).items():
            start, stop = ref.rows or (0, len(stored[ref.name]))
            U, _, Vt = torch.linalg.svd(stored[ref.name][start:stop], full_matrices=False)
            epsilon = torch.zeros(len(Vt), dtype=U.dtype, requires_grad=True)
            epsilons[f"blocks.{index}.{role}"] = epsilon
            changes.setdefault(ref.name, []).append(((start, stop), U @ torch.diag(epsilon) @ Vt))
    for name, parts in changes.items():
        whole = torch.zeros_like(stored[name])
        for (start, stop), change in parts:
            padding = (0, 0, start, len(whole) - stop)
            whole = whole + torch.nn.functional.pad(change, padding)
        stored[name] = stored[name] + whole
    stream = torch.func.functional_call(planted.module, stored, (image[None],))
    grid = stream[block][0, 1:].unflatten(0, (12, 12))
    loss = looped_loss(grid, planted.directions.nu[block].double(), marked)
    return loss.item(), dict(zip(epsilons, torch.autograd.grad(loss, list(epsilons.values())), strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, name


@pytest.mark.parametrize(
    ("colour", "block", "spots"), [("red", EARLY, RED), ("blue", LATE, BLUE)], ids=["early", "late"]
)
def test_the_projected_gradient_is_autograds_through_the_parametrized_weights(
    planted: Any, colour: str, block: int, spots: list[tuple[int, int]]
) -> None:
    image = planted.image(0, **{colour: spots})
    loss, expected = autograd_gradients(planted, image, block, spots)
    found = gradient_of(planted, [image])
    assert (found.first_block, found.masked_tokens, len(found.losses)) == (block, len(spots), 1)
    assert found.losses[0] == pytest.approx(loss, rel=1e-5)
    assert_same(found.gradients, expected)


def test_only_the_blocks_of_the_window_get_gradients(planted: Any) -> None:
    image = planted.image(0, blue=BLUE)
    _, everywhere = autograd_gradients(planted, image, LATE, BLUE)
    window = {name: gradient for name, gradient in everywhere.items() if int(name.split(".")[1]) in (LATE - 1, LATE)}
    assert_same(gradient_of(planted, [image], window=2).gradients, window)


def test_images_with_defects_at_different_blocks_share_a_step_as_the_mean_of_their_own(planted: Any) -> None:
    images = [
        planted.image(0, blue=BLUE),
        planted.image(1),  # clean
        planted.image(2, red=RED),
        planted.image(3, blue=BLUE[1:]),
    ]
    together = gradient_of(planted, images, window=4)  # blocks 0 and 1, and blocks 1 to 4
    alone = [gradient_of(planted, [image], window=4) for image in images]
    assert [single.first_block for single in alone] == [LATE, None, EARLY, LATE]
    assert together.first_block == EARLY
    assert together.masked_tokens == sum(single.masked_tokens for single in alone)
    assert sorted(together.losses) == pytest.approx(sorted(loss for single in alone for loss in single.losses))
    names = {name for single in alone for name in single.gradients}
    mean = {name: sum(single.gradients.get(name, torch.zeros(1)) for single in alone) / 3 for name in names}
    assert_same(together.gradients, mean)


def test_an_image_leaves_with_the_input_of_its_own_window(planted: Any) -> None:
    images = torch.stack([planted.image(2, red=RED), planted.image(0, blue=BLUE)])
    early, late = first_defects(planted.backbone, planted.module, planted.directions, images, DetectionRule(), 2)
    stream = planted.module(images)
    assert (early.block, early.start, late.block, late.start) == (EARLY, EARLY - 1, LATE, LATE - 1)
    torch.testing.assert_close(early.entering, planted.module.embed(images)[:1])
    torch.testing.assert_close(late.entering, stream[LATE - 2][1:])
    assert late.masks[0].nonzero().tolist() == [list(spot) for spot in BLUE]


def test_a_block_whose_direction_is_not_determined_is_never_defective(planted: Any) -> None:
    image = planted.image(0, red=RED)
    assert gradient_of(planted, [image], min_gap=0).first_block == 0  # the paper's rule
    assert gradient_of(planted, [image]).first_block == EARLY
    doubtful = Directions(planted.directions.nu, [1.05] * DEPTH)
    assert first_defects(planted.backbone, planted.module, doubtful, image[None], DetectionRule(), 2) == []


def test_too_few_marked_tokens_make_no_defect(planted: Any) -> None:
    image = planted.image(0, red=RED[:2])
    assert gradient_of(planted, [image]).first_block is None
    assert gradient_of(planted, [image], min_tokens=2).first_block == EARLY


def test_a_clean_image_gives_no_gradient_and_decomposes_nothing(planted: Any) -> None:
    deltas = Deltas(planted.backbone, planted.module)
    images = planted.image(1)[None]
    found = step_gradient(planted.backbone, planted.module, planted.directions, deltas, images, RepairSettings())
    assert found == StepGradient((), {}, None, 0)
    assert found.finite
    assert deltas.touched == []


def test_a_step_leaves_weights_and_gradient_flags_as_they_were(planted: Any) -> None:
    before = {name: tensor.clone() for name, tensor in planted.module.state_dict().items()}
    gradient_of(planted, [planted.image(0, red=RED)])
    assert all(torch.equal(before[name], tensor) for name, tensor in planted.module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in planted.module.parameters())
    assert all(parameter.grad is None for parameter in planted.module.parameters())


def test_an_image_with_nan_tokens_is_not_clean(planted: Any) -> None:
    found = gradient_of(planted, [planted.image(0, green=[(5, 5)]), planted.image(1)])
    assert len(found.losses) == 1
    assert math.isnan(found.losses[0])
    assert not found.finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_noticed(bad: float) -> None:
    fine = {"blocks.0.mlp.up": torch.ones(3)}
    assert StepGradient((1.0,), fine, 0, 3).finite
    assert not StepGradient((1.0,), fine | {"blocks.0.mlp.down": torch.tensor([1.0, bad])}, 0, 3).finite
    assert not StepGradient((1.0, bad), fine, 0, 3).finite


def test_bfloat16_passes_give_nearly_the_same_gradient_in_float32(single: Any) -> None:
    images = [single.image(0, torch.float32, blue=BLUE), single.image(2, torch.float32, red=RED)]
    exact, mixed = gradient_of(single, images), gradient_of(single, images, dtype="bfloat16")
    assert mixed.first_block == exact.first_block == EARLY
    assert {gradient.dtype for gradient in mixed.gradients.values()} == {torch.float32}
    both = (torch.cat([found.gradients[name] for name in exact.gradients]) for found in (exact, mixed))
    assert torch.nn.functional.cosine_similarity(*both, dim=0) > 0.99


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_a_basis_projects_a_gradient_onto_the_diagonal_of_its_singular_vectors(shape: tuple[int, int]) -> None:
    weight, gradient = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = singular_basis(weight)
    expected = [float(basis.U[:, k] @ gradient @ basis.Vt[k]) for k in range(min(shape))]
    assert basis.project(gradient).tolist() == pytest.approx(expected)
    delta = torch.arange(1.0, 1 + min(shape), dtype=torch.float64)
    torch.testing.assert_close(weight + basis.change(delta), basis.U @ torch.diag(basis.S + delta) @ basis.Vt)


@pytest.mark.parametrize(
    ("stored", "used"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_a_basis_is_float32_or_better_and_contiguous(stored: torch.dtype, used: torch.dtype) -> None:
    basis = singular_basis(torch.randn(7, 4).to(stored))
    for tensor in (basis.U, basis.S, basis.Vt):
        assert tensor.dtype == used
        assert tensor.is_contiguous()


def test_an_image_with_nan_tokens_is_not_clean_where_no_direction_is_trusted(planted: Any) -> None:
    untrusted = replace(planted, directions=Directions(planted.directions.nu, [1.0] * DEPTH))
    found = gradient_of(untrusted, [planted.image(0, green=[(5, 5)])])
    assert math.isnan(found.losses[0])
    assert gradient_of(untrusted, [planted.image(0, red=RED)]).losses == ()


def test_nothing_but_the_forward_pass_runs_in_bfloat16(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(patches: Tensor, direction: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return alignment_logits(patches, direction)

    monkeypatch.setattr(step, "alignment_logits", watched)
    gradient_of(single, [single.image(0, torch.float32, red=RED)], dtype="bfloat16")
    assert seen
    assert not any(seen)
