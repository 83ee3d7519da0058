"""The maps of single images against forward hooks and loops, on the demo and on a stub with defects where one wants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sinder_cli import Backbone, UsageError
from sinder_cli.analysis.directions import Basis
from sinder_cli.analysis.per_image import TEMPERATURES, Portrait, portraits, shown_blocks
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.analysis.tokens import Subject
from sinder_cli.defects.prediction import BlockSpectrum, Prediction
from sinder_cli.defects.settings import STAGES
from sinder_cli.defects.spectrum import LeadingPair

GAUSSIAN = {
    3: [[1, 2, 1], [2, 4, 2], [1, 2, 1]],
    5: [[1, 4, 7, 4, 1], [4, 16, 26, 16, 4], [7, 26, 41, 26, 7], [4, 16, 26, 16, 4], [1, 4, 7, 4, 1]],
}


def some_basis(width: int) -> Basis:
    generator = torch.Generator().manual_seed(9)
    turned = torch.linalg.qr(torch.randn(width, 3, generator=generator, dtype=torch.float64)).Q
    return Basis(torch.randn(width, generator=generator, dtype=torch.float64), turned)


def drawn(
    subjects: Sequence[Subject], batches: Sequence[Tensor], basis: Basis | None = None, **given: Any
) -> list[Portrait]:
    settings = AnalyzeSettings.model_validate({"device": "cpu", **given})
    named = [([f"{at}.{i}" for i in range(len(batch))], batch) for at, batch in enumerate(batches)]
    basis = basis or some_basis(subjects[0].backbone.width)
    return list(portraits(subjects, named, basis, settings, "cpu"))


def logits_of(grid: np.ndarray, nu: np.ndarray) -> np.ndarray:
    return -np.abs(grid @ nu) / np.linalg.norm(grid, axis=-1) / np.linalg.norm(nu)


def marked(logits: np.ndarray, margin: int) -> np.ndarray:
    mask = logits < logits.mean() - 4 * logits.std(ddof=1)
    inside = np.zeros_like(mask)
    inside[margin:-margin, margin:-margin] = True
    return mask & inside


def looped_target(grid: np.ndarray, logits: np.ndarray, row: int, column: int, kernel: int, tau: float) -> list[float]:
    """The weighted neighbourhood average of one token, as the tests of the repair have it."""
    reach, total, target = kernel // 2, 0.0, [0.0] * grid.shape[-1]
    for i in range(kernel):
        for j in range(kernel):
            r, c = row + i - reach, column + j - reach
            weight = math.exp((logits[r, c] + 1) / tau) * GAUSSIAN[kernel][i][j]
            total += weight
            for n, value in enumerate(grid[r, c].tolist()):
                target[n] += weight * value
    return [value / total for value in target]


def agrees(portrait: Portrait, subject: Subject, grids: Sequence[np.ndarray], basis: Basis, kernel: int = 3) -> None:
    """One backbone's maps of one image, by block and token by token."""
    (side,) = portrait.sides
    last = grids[-1]
    norms = np.linalg.norm(last, axis=-1)
    np.testing.assert_allclose(side.norms, norms, rtol=1e-4)
    assert side.outlying.tolist() == (norms > 3 * np.median(norms)).tolist()
    projected = (last - basis.mean.numpy()) @ basis.components.numpy()
    np.testing.assert_allclose(side.components, projected, atol=1e-3 * norms.max())
    nus, gaps = subject.prediction.directions().double().numpy(), subject.prediction.gaps()
    first: int | None = None
    for block, grid in enumerate(grids):
        logits = logits_of(grid, nus[block])
        mask = marked(logits, kernel // 2)
        determined = gaps[block] >= 1.1
        if block in side.angles:
            np.testing.assert_allclose(side.angles[block], np.degrees(np.arccos(np.minimum(-logits, 1))), atol=0.05)
            assert (block in side.masks) == determined
            if determined:
                assert side.masks[block].tolist() == mask.tolist()
        if determined and first is None and mask.sum() >= 3:
            first = block
            assert side.targets is not None
            assert side.targets.block == block
            assert side.targets.mask.tolist() == mask.tolist()
            np.testing.assert_allclose(side.targets.norms, np.linalg.norm(grid, axis=-1), rtol=1e-4)
            assert list(side.targets.by_temperature) == [0.01, 0.1, 1.0] == list(TEMPERATURES)
            for tau, moved in side.targets.by_temperature.items():
                expected = np.linalg.norm(grid, axis=-1)
                for row, column in zip(*mask.nonzero(), strict=True):
                    expected[row, column] = math.hypot(*looped_target(grid, logits, row, column, kernel, tau))
                np.testing.assert_allclose(moved, expected, rtol=2e-3, err_msg=f"τ = {tau}")
    assert (side.targets is None) == (first is None)


def by_image(naive: Any, subject: Subject, image: Tensor) -> list[np.ndarray]:
    return [grids[0] for grids in naive.grids(subject, [image])]


def test_on_the_demo_every_map_is_that_of_forward_hooks(demo: Subject, photographs: Path, naive: Any) -> None:
    images = [
        naive.pixels(Image.open(photographs / name), demo.backbone, 280) for name in ("chelsea.png", "coffee.png")
    ]
    basis = some_basis(demo.backbone.width)
    batch = torch.stack(images)  # two images of one shape, that is not square
    assert batch.shape[2] < batch.shape[3]
    found = drawn([demo], [batch], basis)
    assert [portrait.name for portrait in found] == ["0.0", "0.1"]
    for portrait, image in zip(found, images, strict=True):
        assert torch.equal(portrait.image, image)
        assert portrait.patch_cosine is None
        agrees(portrait, demo, by_image(naive, demo, image), basis)
        (side,) = portrait.sides
        assert list(side.angles) == [2, 5, 8, 11]
        assert list(side.masks) == [5, 8, 11]
        assert side.targets is not None
        assert side.targets.block == 5
        assert side.outlying.sum() >= 3
    one_by_one = [drawn([demo], [image[None]], basis)[0] for image in images]
    for together, alone in zip(found, one_by_one, strict=True):
        torch.testing.assert_close(together.sides[0].norms, alone.sides[0].norms)
        assert together.sides[0].attention is not None
        torch.testing.assert_close(together.sides[0].attention, alone.sides[0].attention)


def test_cls_attention_is_the_head_mean_of_the_last_block(small: Subject, photographs: Path, naive: Any) -> None:
    image = naive.pixels(Image.open(photographs / "coffee.png"), small.backbone, 112)
    seen: list[Tensor] = []
    handle = small.module.blocks[-1].attn.qkv.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    naive.hooked(small, image)
    handle.remove()
    q, k, _ = seen[-1].chunk(3, dim=-1)
    heads = [
        torch.softmax(q[:, part] @ k[:, part].T / 8, dim=-1)[0] for part in (slice(0, 64), slice(64, 128))
    ]  # of width 64
    expected = ((heads[0] + heads[1]) / 2)[3:].reshape(8, 12)  # cls and two registers left out
    (portrait,) = drawn([small], [image[None]])
    found = portrait.sides[0].attention
    assert found is not None
    torch.testing.assert_close(found, expected)
    assert found.sum() < 1


def test_without_cls_there_is_no_attention_of_it(small: Subject) -> None:
    headless = replace(small, backbone=replace(small.backbone, has_cls=False))
    (portrait,) = drawn([headless], [torch.zeros(1, 3, 112, 112)])
    assert portrait.sides[0].attention is None


def test_two_sides_are_held_against_each_other_place_by_place(
    demo: Subject, clean: Subject, photographs: Path, naive: Any
) -> None:
    image = naive.pixels(Image.open(photographs / "chelsea.png"), demo.backbone, 140)
    (portrait,) = drawn([demo, clean], [image[None]])
    a, b = (by_image(naive, subject, image)[-1] for subject in (demo, clean))
    expected = (a * b).sum(axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert portrait.patch_cosine is not None
    np.testing.assert_allclose(portrait.patch_cosine, expected, atol=1e-4)
    assert len(portrait.sides) == 2
    assert portrait.sides[0].outlying.any()
    assert not portrait.sides[1].outlying.any()
    assert portrait.sides[1].targets is None
    (same,) = drawn([demo, demo], [image[None]])
    assert same.patch_cosine is not None
    torch.testing.assert_close(same.patch_cosine, torch.ones_like(same.patch_cosine))


# --- a stub: patches are tokens, and a block adds ν to those of its colour

N, PATCH, SIDE = 16, 2, 12


def stub(gaps: Sequence[float] = (2.0, 2.0, 2.0)) -> Subject:
    """Three blocks without attention; block 1 makes red patches defective, block 2 blue ones."""
    generator = torch.Generator().manual_seed(0)
    project = torch.randn(N, 3 * PATCH * PATCH, generator=generator)
    nu = torch.linalg.qr(torch.randn(N, 3, generator=generator)).Q.T

    def embed(_module: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = torch.nn.functional.unfold(images, PATCH, stride=PATCH)  # [B, 3·P·P, patches]
        tokens = (project @ patches).transpose(1, 2)
        tokens = tokens - 0.99 * (tokens @ nu.T) @ nu
        colours = patches.unflatten(1, (3, -1)).mean(dim=2)  # [B, 3, patches]
        return torch.cat([torch.ones(len(images), 1, N), tokens], dim=1), colours

    def run_block(_module: Any, index: int, tokens: Tensor, colours: Tensor) -> Tensor:
        if index == 0:
            return tokens
        wanted = (colours[:, 0 if index == 1 else 2] > 0.95).float()
        return torch.cat([tokens[:, :1], tokens[:, 1:] + 60 * wanted[..., None] * nu[index]], dim=1)

    backbone = Backbone(
        name="stub",
        layers=SimpleNamespace(width=N, blocks=(None,) * 3),  # type: ignore[arg-type]
        weights=SimpleNamespace(),  # type: ignore[arg-type]
        patch_size=PATCH,
        prefix_tokens=1,
        has_cls=True,
        image_size=SIDE * PATCH,
        build=torch.nn.Identity,
        embed=embed,
        run_block=run_block,
        finish=lambda _, tokens: tokens,
    )
    spectra = tuple(BlockSpectrum(block, LeadingPair(nu[block], gap, 1.0), gap, None) for block, gap in enumerate(gaps))
    return Subject(backbone, None, Prediction("stub", N, dict.fromkeys(STAGES, spectra), None))


def picture(seed: int, **spots: list[tuple[int, int]]) -> Tensor:
    image = 0.2 + 0.4 * torch.rand(3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(seed))
    for channel, colour in ((0, "red"), (2, "blue")):
        for row, column in spots.get(colour, []):
            patch = image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            patch.fill_(0.1)
            patch[channel] = 1.0
    return image


RED, BLUE = [(3, 3), (5, 8), (9, 4)], [(2, 6), (6, 2), (8, 9), (9, 9)]


def stub_grids(subject: Subject, image: Tensor) -> list[np.ndarray]:
    tokens, context = subject.backbone.embed(None, image[None])
    grids = []
    for block in range(3):
        tokens = subject.backbone.run_block(None, block, tokens, context)
        grids.append(tokens[0, 1:].reshape(SIDE, SIDE, N).double().numpy())
    return grids


@pytest.mark.parametrize("kernel", [3, 5])
def test_every_image_has_targets_of_its_own_first_defective_block(kernel: int) -> None:
    subject, basis = stub(), some_basis(N)
    images = [
        picture(1, blue=BLUE), picture(2), picture(3, red=RED, blue=BLUE), picture(4, red=RED), picture(5, red=RED[:2])
    ]  # fmt: skip
    found = drawn([subject], [torch.stack(images)], basis, kernel=kernel)
    blocks = [portrait.sides[0].targets.block if portrait.sides[0].targets else None for portrait in found]
    assert blocks == [2, None, 1, 1, None]
    for portrait, image in zip(found, images, strict=True):
        agrees(portrait, subject, stub_grids(subject, image), basis, kernel)
    targets = found[2].sides[0].targets
    assert targets is not None
    assert [tuple(spot) for spot in targets.mask.nonzero().tolist()] == RED


def test_fewer_tokens_than_the_least_make_no_block_defective() -> None:
    (portrait,) = drawn([stub()], [picture(3, red=RED, blue=BLUE)[None]], min_tokens=4)
    assert portrait.sides[0].targets is not None
    assert portrait.sides[0].targets.block == 2


def test_an_undetermined_direction_gives_angles_but_no_mask_or_targets() -> None:
    (portrait,) = drawn([stub((2.0, 1.0, 2.0))], [picture(3, red=RED, blue=BLUE)[None]])
    (side,) = portrait.sides
    assert list(side.angles) == [0, 1, 2]
    assert list(side.masks) == [0, 2]
    assert side.targets is not None
    assert side.targets.block == 2


def test_targets_come_from_the_first_defective_block_even_if_hidden() -> None:
    (portrait,) = drawn([stub()], [picture(3, red=RED)[None]], blocks=(0,))
    (side,) = portrait.sides
    assert list(side.angles) == list(side.masks) == [0]
    assert side.targets is not None
    assert side.targets.block == 1


def test_a_kernel_that_is_not_seen_gives_no_attention() -> None:
    (portrait,) = drawn([stub()], [picture(3)[None]])
    assert portrait.sides[0].attention is None


def test_portraits_are_made_as_they_are_gone_through() -> None:
    taken: list[int] = []

    def batches() -> Iterator[tuple[list[str], Tensor]]:
        for at in range(3):
            taken.append(at)
            yield [f"{at} a", f"{at} b"], torch.stack([picture(at), picture(at + 10)])

    lazily = portraits([stub()], batches(), some_basis(N), AnalyzeSettings(device="cpu"), "cpu")
    assert taken == []
    assert [next(lazily).name for _ in range(2)] == ["0 a", "0 b"]
    assert taken == [0]
    assert [portrait.name for portrait in lazily] == ["1 a", "1 b", "2 a", "2 b"]


@pytest.mark.parametrize(
    ("depth", "blocks"), [(40, (9, 19, 29, 39)), (12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (3, (0, 1, 2)), (1, (0,))]
)
def test_the_last_block_of_each_quarter_is_shown(depth: int, blocks: tuple[int, ...]) -> None:
    assert shown_blocks(depth, None) == blocks


def test_chosen_blocks_are_shown_once_each_and_must_exist() -> None:
    assert shown_blocks(12, (3, 0, 3, 11)) == (3, 0, 11)
    with pytest.raises(UsageError, match="cannot draw block 12: blocks are 0 to 11"):
        shown_blocks(12, (3, 12))


def test_maps_are_float32_and_bool_whatever_the_precision() -> None:
    (portrait,) = drawn([stub()], [picture(3, red=RED)[None]], dtype="bfloat16")
    (side,) = portrait.sides
    for part in (side.components, side.norms, portrait.image, *side.angles.values()):
        assert (part.dtype, part.device.type) == (torch.float32, "cpu")
    assert {mask.dtype for mask in (side.outlying, *side.masks.values())} == {torch.bool}
