"""The learning target and the loss against loops over tokens in plain Python."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from sinder_cli.defects.detection import learning_targets
from sinder_cli.repairing.step import average_loss, neighbour_loss, ordinary_loss, ordinary_scale

N = 8
GAUSSIAN = {
    3: [[1, 2, 1], [2, 4, 2], [1, 2, 1]],
    5: [[1, 4, 7, 4, 1], [4, 16, 26, 16, 4], [7, 26, 41, 26, 7], [4, 16, 26, 16, 4], [1, 4, 7, 4, 1]],
}
Kernel = Literal[3, 5]


def drawn(height: int = 9, width: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(height, width, N, generator=generator), -torch.rand(height, width, generator=generator)


def mask_of(spots: list[tuple[int, int]], like: Tensor) -> Tensor:
    mask = torch.zeros_like(like, dtype=torch.bool)
    for row, column in spots:
        mask[row, column] = True
    return mask


def looped_target(
    patches: list[list[list[float]]], logits: list[list[float]], row: int, column: int, kernel: int, tau: float
) -> list[float]:
    reach, total, target = kernel // 2, 0.0, [0.0] * N
    for i in range(kernel):
        for j in range(kernel):
            r, c = row + i - reach, column + j - reach
            weight = math.exp(logits[r][c] / tau) * GAUSSIAN[kernel][i][j]
            total += weight
            for n in range(N):
                target[n] += weight * patches[r][c][n]
    return [value / total for value in target]


def looped_loss(patches: Tensor, logits: Tensor, spots: list[tuple[int, int]], kernel: int, tau: float) -> float:
    tokens, scores = patches.tolist(), logits.tolist()
    distances = [
        math.dist(tokens[r][c], looped_target(tokens, scores, r, c, kernel, tau)) for r, c in spots
    ]  # fmt: skip
    reach = kernel // 2
    norms = [
        math.hypot(*tokens[r][c])
        for r in range(reach, len(tokens) - reach)
        for c in range(reach, len(tokens[0]) - reach)
    ]
    return sum(distances) / len(distances) / (sum(norms) / len(norms))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("tau", [0.03, 0.1, 1.0])
def test_targets_and_loss_are_those_of_a_loop_over_tokens(kernel: Kernel, tau: float) -> None:
    patches, logits = drawn()
    spots = [(2, 2), (3, 4), (6, 3)]
    mask = mask_of(spots, logits)
    expected = [looped_target(patches.tolist(), logits.tolist(), r, c, kernel, tau) for r, c in spots]
    torch.testing.assert_close(learning_targets(patches, logits, mask, kernel, tau), torch.tensor(expected))
    loss = neighbour_loss(patches, logits, mask, kernel, tau)
    assert loss.item() == pytest.approx(looped_loss(patches, logits, spots, kernel, tau), rel=1e-5)


def test_a_low_temperature_prefers_the_least_aligned_neighbours() -> None:
    patches, logits = drawn()
    logits.fill_(-1.0)
    logits[1, 2] = -0.1
    target = learning_targets(patches, logits, mask_of([(2, 2)], logits), 3, 0.02)
    torch.testing.assert_close(target[0], patches[1, 2], atol=1e-5, rtol=0)


def test_a_tiny_temperature_among_aligned_tokens_gives_no_nan() -> None:
    patches, logits = drawn()
    logits.fill_(-1.0)  # exp(−1/0.001) is 0 in float32
    target = learning_targets(patches, logits, mask_of([(2, 2)], logits), 3, 0.001)
    weights = torch.tensor(GAUSSIAN[3], dtype=torch.float32) / 16
    torch.testing.assert_close(target[0], torch.einsum("ij,ijn->n", weights, patches[1:4, 1:4]))


def test_a_tiny_temperature_suits_each_neighbourhood() -> None:
    patches, logits = drawn()
    logits.fill_(-1.0)
    logits[1, 2], logits[5:8, 2:5] = -0.5, -0.1
    near, far = learning_targets(patches, logits, mask_of([(2, 2), (6, 3)], logits), 3, 0.001)
    torch.testing.assert_close(near, patches[1, 2])
    weights = torch.tensor(GAUSSIAN[3], dtype=torch.float32) / 16
    torch.testing.assert_close(far, torch.einsum("ij,ijn->n", weights, patches[5:8, 2:5]))


def test_targets_and_scale_carry_no_gradient() -> None:
    patches, logits = drawn()
    patches.requires_grad_(True)
    mask = mask_of([(2, 2), (4, 4)], logits)
    (gradient,) = torch.autograd.grad(neighbour_loss(patches, logits, mask, 3, 0.1), patches)
    with torch.no_grad():
        scale = patches[1:-1, 1:-1].norm(dim=-1).mean()
        distance = patches[mask] - learning_targets(patches, logits, mask, 3, 0.1)
    expected = torch.zeros_like(gradient)
    expected[mask] = distance / distance.norm(dim=1, keepdim=True) / 2 / scale
    torch.testing.assert_close(gradient, expected)


def test_the_loss_does_not_change_with_the_tokens_size() -> None:
    patches, logits = drawn()
    mask = mask_of([(2, 2), (4, 4)], logits)
    small, large = (neighbour_loss(factor * patches, logits, mask, 3, 0.1) for factor in (1.0, 1000.0))
    torch.testing.assert_close(small, large)


def test_half_precision_tokens_give_a_float32_loss() -> None:
    patches, logits = drawn()
    mask, half = mask_of([(2, 2), (3, 4)], logits), patches.bfloat16()
    for loss, same in (
        (neighbour_loss(half, logits, mask, 3, 0.1), neighbour_loss(half.float(), logits, mask, 3, 0.1)),
        (average_loss(half, mask), average_loss(half.float(), mask)),
        (ordinary_loss(half, mask), ordinary_loss(half.float(), mask)),
    ):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, same)


def looped_averages(patches: Tensor, mask: Tensor) -> dict[tuple[int, int], list[float]]:
    """Of the unmarked neighbours of each token, which all have some."""
    tokens, found = patches.tolist(), {}
    height, width = mask.shape
    for r in range(height):
        for c in range(width):
            near = [
                (2.0 if i == 0 or j == 0 else 1.0, tokens[r + i][c + j])
                for i in (-1, 0, 1)
                for j in (-1, 0, 1)
                if (i, j) != (0, 0) and 0 <= r + i < height and 0 <= c + j < width and not mask[r + i, c + j]
            ]
            total = sum(weight for weight, _ in near)
            found[r, c] = [sum(weight * token[n] for weight, token in near) / total for n in range(N)]
    return found


def test_losses_of_marked_and_of_ordinary_tokens_are_those_of_loops() -> None:
    patches, logits = drawn()
    mask = mask_of([(0, 0), (3, 4), (3, 5), (8, 2)], logits)
    patches[3, 4] *= 20
    tokens, averages = patches.tolist(), looped_averages(patches, mask)
    away = {(r, c): math.dist(tokens[r][c], average) for (r, c), average in averages.items()}
    ordinary = [spot for spot in away if not mask[spot]]
    scale = sum(math.hypot(*tokens[r][c]) for r, c in ordinary) / len(ordinary)
    assert ordinary_scale(patches, mask).item() == pytest.approx(scale, rel=1e-5)
    marked = [away[spot] for spot in away if mask[spot]]
    assert average_loss(patches, mask).item() == pytest.approx(sum(marked) / 4 / scale, rel=1e-5)
    usual = sum(away[spot] for spot in ordinary) / len(ordinary) / scale
    assert ordinary_loss(patches, mask).item() == pytest.approx(usual, rel=1e-5)


def test_where_every_token_is_marked_the_scale_is_of_all() -> None:
    patches, logits = drawn()
    everywhere = torch.ones_like(logits, dtype=torch.bool)
    torch.testing.assert_close(ordinary_scale(patches, everywhere), patches.norm(dim=-1).mean())
    assert ordinary_loss(patches, everywhere) == 0
