"""Shift retrieval, against a loop over the tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sinder_cli.defects import shift
from sinder_cli.defects.shift import CELLS, NEAR, Retrieval, found_again, shifted


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped(whole: Tensor, view: Tensor) -> list[list[bool]]:
    h, w, _ = whole.shape
    places, tokens = whole - whole.mean(dim=(0, 1)), view - view.mean(dim=(0, 1))
    found = []
    for row in range(h - CELLS):
        found.append([])
        for column in range(w - CELLS):
            token = tokens[row, column]
            cosines = {
                (i, j): float(token @ places[i, j] / token.norm() / places[i, j].norm())
                for i in range(h)
                for j in range(w)
            }
            i, j = max(cosines, key=lambda place: cosines[place])
            found[-1].append(abs(i - CELLS - row) <= NEAR and abs(j - CELLS - column) <= NEAR)
    return found


@pytest.mark.parametrize(("noise", "at_a_time"), [(0.0, 1024), (0.7, 1024), (0.7, 6), (5.0, 1024)])
def test_tokens_are_found_again_as_by_a_loop(noise: float, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift, "AT_A_TIME", at_a_time)
    whole = drawn(7, 9, 12)
    view = 3 + whole[CELLS:, CELLS:] + noise * drawn(7 - CELLS, 9 - CELLS, 12, seed=1)
    found = found_again(whole, view)
    assert found.tolist() == looped(whole, view)
    assert bool(found.all()) is (noise == 0)
    assert bool(found.any()) is True


def test_tokens_that_are_alike_are_not_found_again() -> None:
    whole = drawn(8, 8, 6)
    whole[3, 3] = whole[6, 7] = 20 * drawn(6, seed=2)  # two outliers of one direction
    found = found_again(whole, whole[CELLS:, CELLS:])
    marked = torch.zeros_like(found)
    marked[1, 1] = marked[4, 5] = True
    shares = Retrieval.of(found, marked)
    assert shares.marked == 0.5
    assert shares.others is not None
    assert shares.others > 0.5


def test_a_token_that_is_not_finite_spoils_no_other() -> None:
    whole = drawn(7, 9, 12)
    whole[4, 5, 3] = torch.inf
    found = found_again(whole, whole[CELLS:, CELLS:])
    expected = torch.ones_like(found)
    expected[4 - CELLS, 5 - CELLS] = False
    assert torch.equal(found, expected)


def test_a_group_without_a_token_has_no_share() -> None:
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    assert Retrieval.of(~nothing, nothing) == Retrieval(None, 1.0)
    assert Retrieval.of(nothing, ~nothing) == Retrieval(0.0, None)


def test_a_view_is_cut_at_whole_patches() -> None:
    images = drawn(2, 3, 56, 70)
    assert torch.equal(shifted(images, 14), images[:, :, 28:, 28:])
