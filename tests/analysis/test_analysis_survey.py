"""All numbers of a survey against a notebook: forward hooks on the module, and numpy and loops over what they saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sinder_cli import UsageError
from sinder_cli.analysis.records import BlockRecord, Distribution, Marked
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.analysis.survey import Surveys, equal_shapes, require_comparable, survey
from sinder_cli.analysis.tokens import BlockTokens, Subject
from sinder_cli.defects.settings import STAGES

Array = np.ndarray[Any, Any]
GRID = (8, 8)
SIDE = 112  # 8 patches along the shorter side
HUGE = 500.0  # of registers


@pytest.fixture(scope="module")
def pictures(photographs: Path, small: Subject, naive: Any) -> list[Tensor]:
    """Photographs of several shapes, normalized; all models here share normalization and patch size."""
    return [naive.pixels(Image.open(path), small.backbone, SIDE) for path in sorted(photographs.iterdir())]


@pytest.fixture(scope="module")
def with_registers(opened: Callable[..., Subject], checkpoint: Callable[..., Path]) -> Subject:
    """The sizes of the official ViT-S with registers, and registers that are huge."""
    path = checkpoint("vits14_reg", change=lambda tensors: tensors["register_tokens"].mul_(HUGE))
    return opened("dinov2_vits14_reg", path)


def surveyed(
    subjects: Sequence[Subject], images: Iterable[Tensor], batch_size: int = 2, components: bool = False, **given: Any
) -> Surveys:
    settings = AnalyzeSettings.model_validate({"device": "cpu", **given})
    batches = equal_shapes(((f"{at}.png", image) for at, image in enumerate(images)), batch_size)
    return survey(subjects, batches, GRID, settings, "cpu", components)


def agrees(found: Distribution | None, values: Array, relative: float = 0.0025, absolute: float = 0.0) -> None:
    """Exact but for the float32 of the model, quantiles to the width of a bin."""
    assert found is not None
    assert found.count == values.size
    for name, expected in (("mean", values.mean()), ("min", values.min()), ("max", values.max())):
        assert getattr(found, name) == pytest.approx(float(expected), rel=1e-4, abs=max(absolute, 1e-5)), name
    for name, share in (("p01", 0.01), ("median", 0.5), ("p99", 0.99)):
        expected = float(np.quantile(values, share))
        assert getattr(found, name) == pytest.approx(expected, rel=relative, abs=absolute), name


def unit(vectors: Array) -> Array:
    return cast("Array", vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def degrees(grid: Array, nu: Array) -> Array:
    return cast("Array", np.degrees(np.arccos(np.minimum(np.abs(unit(grid) @ unit(nu)), 1))))


def outlying(grid: Array) -> Array:
    norms = np.linalg.norm(grid, axis=-1)
    return cast("Array", norms > 3 * np.median(norms))


def equation_5(grid: Array, nu: Array, kernel: int = 3, threshold: float = 4.0) -> Array:
    logits = -np.abs(unit(grid) @ unit(nu))
    mask = logits < logits.mean() - threshold * logits.std(ddof=1)
    border, (h, w) = kernel // 2, mask.shape
    for row in range(h):
        for column in range(w):
            if not (border <= row < h - border and border <= column < w - border):
                mask[row, column] = False
    return cast("Array", mask)


def overlap(a: Sequence[Array], b: Sequence[Array]) -> float | None:
    union = sum(int((x | y).sum()) for x, y in zip(a, b, strict=True))
    return sum(int((x & y).sum()) for x, y in zip(a, b, strict=True)) / union if union else None


def agrees_with_masks(found: Marked | None, masks: Sequence[Array], min_tokens: int = 3) -> None:
    assert found is not None
    assert found.tokens == sum(int(mask.sum()) for mask in masks)
    assert found.share == pytest.approx(found.tokens / sum(mask.size for mask in masks))
    assert found.images == sum(int(mask.sum()) >= min_tokens for mask in masks)
    marked, seen = np.zeros(GRID), np.zeros(GRID)
    for mask in masks:
        h, w = mask.shape
        for row in range(h):
            for column in range(w):
                cell = (math.floor((row + 0.5) / h * GRID[0]), math.floor((column + 0.5) / w * GRID[1]))
                marked[cell] += mask[row, column]
                seen[cell] += 1
    shares = [found.share for found in found.positions]
    assert shares == pytest.approx(sorted((marked / seen)[marked > 0].tolist(), reverse=True)[:20])
    for place in found.positions:
        assert place.share == pytest.approx(marked[place.row, place.column] / seen[place.row, place.column])


def agrees_with_observed(
    block: BlockRecord, grids: Sequence[Array], masks: Sequence[Array], nu: dict[str, Array]
) -> None:
    """The direction of marked tokens from the SVD of all of them, spreads by loops."""
    per_image = [unit(grid[mask]) for grid, mask in zip(grids, masks, strict=True) if mask.any()]
    if not per_image:
        assert block.observed is None
        return
    found = block.observed
    assert found is not None
    tokens = np.concatenate(per_image)
    assert (found.tokens, found.images) == (len(tokens), len(per_image))
    shared = np.linalg.svd(tokens)[2][0]
    assert found.explained == pytest.approx(float(((tokens @ shared) ** 2).mean()), rel=1e-3)
    for stage, direction in nu.items():
        cosine = min(abs(float(shared @ unit(direction))), 1.0)
        assert found.angle_to_predicted_deg[stage] == pytest.approx(math.degrees(math.acos(cosine)), abs=0.1)  # type: ignore[index]
    own = [np.linalg.svd(each)[2][0] for each in per_image]
    within = [1 - float(x @ d) ** 2 for each, d in zip(per_image, own, strict=True) if len(each) > 1 for x in each]
    across = [1 - float(a @ b) ** 2 for i, a in enumerate(own) for b in own[:i]]
    for value, sines in ((found.spread_within_deg, within), (found.spread_across_deg, across)):
        expected = math.degrees(math.asin(math.sqrt(max(0.0, sum(sines) / len(sines))))) if sines else None
        assert value == pytest.approx(expected, rel=1e-2, abs=1e-3) if sines else value is None


def agrees_with_notebook(found: Surveys, subject: Subject, images: Sequence[Tensor], naive: Any) -> list[int]:
    """Every number of every block; returns how many outlying tokens there were, by block."""
    (side,) = found.sides
    assert found.images == len(images)
    by_image = [naive.hooked(subject, image) for image in images]
    directions = {stage: subject.prediction.directions(stage).double().numpy() for stage in STAGES}
    counts = []
    for number, (block, grids) in enumerate(zip(side.blocks, naive.grids(subject, images), strict=True)):
        nu = {stage: directions[stage][number] for stage in STAGES}
        norms = [np.linalg.norm(grid, axis=-1) for grid in grids]
        assert block.block == number
        assert block.nonfinite == 0
        agrees(block.patch_norm, np.concatenate([each.ravel() for each in norms]))
        agrees(block.cls_norm, np.asarray([tokens[number][0].norm().item() for tokens in by_image]))
        registers = [
            tokens[number][at].norm().item() for tokens in by_image for at in range(1, subject.backbone.prefix_tokens)
        ]
        if registers:
            agrees(block.register_norm, np.asarray(registers))
        else:
            assert block.register_norm is None
        for stage in STAGES:
            assert block.gap[stage] == subject.prediction.gaps(stage)[number]
            angles = np.concatenate([degrees(grid, nu[stage]).ravel() for grid in grids])
            agrees(block.angle_deg[stage], angles, absolute=0.055)
        assert block.determined == (block.gap["cumulative"] >= 1.1)
        above = [outlying(grid) for grid in grids]
        agrees_with_masks(block.marked["outlying"], above)
        assert block.marked["above_threshold"] is None
        if block.determined:
            masks = [equation_5(grid, nu["cumulative"]) for grid in grids]
            agrees_with_masks(block.marked["equation_5"], masks)
            assert block.agreement == {"equation_5/outlying": pytest.approx(overlap(masks, above))}
        else:
            assert block.marked["equation_5"] is None
            assert block.agreement == {}
        agrees_with_observed(block, grids, above, nu)
        counts.append(sum(int(mask.sum()) for mask in above))
    return counts


def test_on_the_demo_every_number_is_that_of_forward_hooks(demo: Subject, photographs: Path, naive: Any) -> None:
    names = ("astronaut.png", "chelsea.png", "motorcycle_left.png")
    images = [naive.pixels(Image.open(photographs / name), demo.backbone, 280) for name in names]
    assert len({image.shape for image in images}) == 3
    counts = agrees_with_notebook(surveyed([demo], images), demo, images, naive)
    assert [count > 0 for count in counts] == [False] * 5 + [True] * 7


def test_with_registers_every_number_is_that_of_forward_hooks(
    with_registers: Subject, pictures: list[Tensor], naive: Any
) -> None:
    found = surveyed([with_registers], pictures[:4], batch_size=3)
    agrees_with_notebook(found, with_registers, pictures[:4], naive)
    for block in found.sides[0].blocks:
        assert block.register_norm is not None
        assert block.patch_norm is not None
        assert block.register_norm.count == 4 * 4
        assert block.register_norm.min > 10 * block.patch_norm.max


def test_huge_registers_never_count_as_patches(
    opened: Callable[..., Subject], checkpoint: Callable[..., Path], pictures: list[Tensor]
) -> None:
    """Registers beyond what float32 holds beside patches would show in any patch statistic."""

    def deaf(tensors: dict[str, Tensor], factor: float) -> None:
        tensors["register_tokens"] *= factor
        for name, tensor in tensors.items():
            if name.endswith("attn.proj.weight"):
                tensor.zero_()  # no token hears of another

    ordinary, huge = (
        surveyed([opened("dinov2_custom", checkpoint("small", change=lambda t, f=f: deaf(t, f)))], pictures)
        for f in (1.0, 1e6)
    )
    for a, b in zip(ordinary.sides[0].blocks, huge.sides[0].blocks, strict=True):
        same = {"register_norm"}
        assert a.model_dump(exclude=same) == b.model_dump(exclude=same)
        assert a.register_norm is not None
        assert b.register_norm is not None
        assert b.register_norm.min > 1e5 * a.register_norm.max / 100
        assert b.marked["outlying"] == a.marked["outlying"]


def near(one: Any, other: Any, place: str = "") -> None:
    """Two documents, number by number: quantiles to a bin, counts exactly, all else to the float32 of the model."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            near(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for at, (a, b) in enumerate(zip(one, other, strict=True)):
            near(a, b, f"{place}.{at}")
    elif isinstance(one, float):
        quantile = place.endswith(("p01", "median", "p99"))
        rough = quantile or place.startswith(".observed")  # whose sketch depends a little on the order of images
        assert one == pytest.approx(other, rel=0.002 if rough else 1e-5, abs=0.05 if rough else 2e-3), place
    else:
        assert one == other, place


@pytest.mark.parametrize("norm_threshold", [None, 60.0])
def test_the_size_of_batches_changes_nothing(
    norm_threshold: float | None, small: Subject, pictures: list[Tensor]
) -> None:
    images = [*pictures, *(picture.flip(-1) for picture in pictures)]
    one, three = (
        surveyed([small], images, batch_size=size, norm_threshold=norm_threshold, components=True) for size in (1, 3)
    )
    for a, b in zip(one.sides[0].blocks, three.sides[0].blocks, strict=True):
        near(a.model_dump(), b.model_dump())
    assert one.basis is not None
    assert three.basis is not None
    torch.testing.assert_close(one.basis.mean, three.basis.mean, atol=1e-5, rtol=1e-5)


def test_a_norm_threshold_marks_what_lies_above_it(small: Subject, pictures: list[Tensor], naive: Any) -> None:
    grids = naive.grids(small, pictures)
    threshold = float(np.quantile(np.concatenate([np.linalg.norm(g, axis=-1).ravel() for g in grids[-1]]), 0.9))
    found = surveyed([small], pictures, norm_threshold=threshold, min_gap=0)
    for number, block in enumerate(found.sides[0].blocks):
        masks = [np.linalg.norm(grid, axis=-1) > threshold for grid in grids[number]]
        agrees_with_masks(block.marked["above_threshold"], masks)
        directions = {stage: small.prediction.directions(stage)[number].double().numpy() for stage in STAGES}
        five = [equation_5(grid, directions["cumulative"]) for grid in grids[number]]
        assert block.agreement == {
            "equation_5/outlying": overlap(five, [outlying(grid) for grid in grids[number]]),
            "equation_5/above_threshold": overlap(five, masks),
            "outlying/above_threshold": overlap([outlying(grid) for grid in grids[number]], masks),
        }
        if block.observed:
            assert block.observed.tokens == sum(int(mask.sum()) for mask in masks)
    assert found.sides[0].blocks[-1].observed is not None
    assert [block.marked["above_threshold"] is None for block in surveyed([small], pictures).sides[0].blocks] == [
        True
    ] * 3


def test_the_rule_of_equation_5_follows_its_settings(small: Subject, pictures: list[Tensor], naive: Any) -> None:
    found = surveyed([small], pictures, min_gap=0, mask_threshold=2.0, kernel=5, min_tokens=2)
    grids = naive.grids(small, pictures)
    total = 0
    for number, block in enumerate(found.sides[0].blocks):
        nu = small.prediction.directions()[number].double().numpy()
        masks = [equation_5(grid, nu, kernel=5, threshold=2.0) for grid in grids[number]]
        agrees_with_masks(block.marked["equation_5"], masks, min_tokens=2)
        total += sum(int(mask.sum()) for mask in masks)
    assert total > 0


def test_an_image_that_is_not_finite_spoils_no_other(small: Subject, pictures: list[Tensor]) -> None:
    broken = pictures[0].clone()
    broken[:, 20, 20] = math.nan
    tokens = broken.shape[1] // 14 * (broken.shape[2] // 14)
    one, other = surveyed([small], pictures[1:]), surveyed([small], [broken, *pictures[1:]])
    for a, b in zip(one.sides[0].blocks, other.sides[0].blocks, strict=True):
        assert (a.nonfinite, b.nonfinite) == (0, tokens)
        assert a.patch_norm is not None
        assert b.patch_norm is not None
        assert a.patch_norm.count == b.patch_norm.count
        near(a.patch_norm.model_dump(), b.patch_norm.model_dump())
        near(a.model_dump()["angle_deg"], b.model_dump()["angle_deg"])
        assert (a.observed is None) == (b.observed is None)


def test_a_model_beside_itself_is_itself(small: Subject, pictures: list[Tensor]) -> None:
    found = surveyed([small, small], pictures, norm_threshold=60.0, min_gap=0, mask_threshold=2.0)
    assert found.sides[0].blocks == found.sides[1].blocks
    assert len(found.pairs) == 3
    for pair, block in zip(found.pairs, found.sides[0].blocks, strict=True):
        assert pair.patch_cosine is not None
        assert pair.cls_cosine is not None
        assert (pair.patch_cosine.min, pair.cls_cosine.min) == pytest.approx((1, 1), abs=1e-5)
        assert pair.cls_cosine.count == len(pictures)
        marks = {rule: found is not None and found.tokens > 0 for rule, found in block.marked.items()}
        assert pair.agreement == {rule: 1.0 if some else None for rule, some in marks.items()}
        assert pair.agreement["equation_5"] == 1.0


def test_the_twins_compare_as_in_a_notebook(demo: Subject, clean: Subject, photographs: Path, naive: Any) -> None:
    images = [naive.pixels(Image.open(path), demo.backbone, 280) for path in sorted(photographs.iterdir())[:2]]
    found = surveyed([demo, clean], images)
    left, right = (naive.grids(subject, images) for subject in (demo, clean))
    cls = [[tokens[0] for tokens in naive.hooked(subject, image)] for subject in (demo, clean) for image in images]
    for number, pair in enumerate(found.pairs):
        a, b = left[number], right[number]
        cosines = np.concatenate([(unit(x) * unit(y)).sum(axis=-1).ravel() for x, y in zip(a, b, strict=True)])
        agrees(pair.patch_cosine, cosines, relative=0, absolute=6e-4)
        of_cls = [float(torch.cosine_similarity(cls[at][number], cls[at + 2][number], dim=0)) for at in range(2)]
        agrees(pair.cls_cosine, np.asarray(of_cls), relative=0, absolute=6e-4)
        assert pair.block == number
        expected = overlap([outlying(x) for x in a], [outlying(x) for x in b])
        assert pair.agreement == ({"outlying": expected})
        assert expected == (None if number < 5 else 0.0)
    assert [
        min(p.patch_cosine.min, p.cls_cosine.min) > 0.9999 for p in found.pairs if p.patch_cosine and p.cls_cosine
    ] == [number < 5 for number in range(12)]


def test_components_are_those_of_both_sides_tokens(
    demo: Subject, clean: Subject, photographs: Path, naive: Any
) -> None:
    images = [naive.pixels(Image.open(path), demo.backbone, 112) for path in sorted(photographs.iterdir())[:2]]
    grids = {subject.backbone.name: naive.grids(subject, images)[-1] for subject in (demo, clean)}

    def expected(chosen: Callable[[Array], Array]) -> Array:
        tokens = np.concatenate([grid[chosen(grid)] for side in grids.values() for grid in side])
        return cast("Array", np.linalg.svd(tokens - tokens.mean(axis=0), full_matrices=False)[2][:3])

    everything = surveyed([demo, clean], images, components=True).basis
    ordinary = surveyed([demo, clean], images, components=True, exclude_masked=True, min_gap=1e9).basis
    nothing = surveyed([demo, clean], images).basis
    assert everything is not None
    assert ordinary is not None
    assert nothing is None
    all_of_them = expected(lambda grid: np.ones(grid.shape[:2], dtype=bool))
    not_outlying = expected(lambda grid: ~outlying(grid))
    for basis, right in ((everything, all_of_them), (ordinary, not_outlying)):
        cosines = (basis.components.numpy().T * right).sum(axis=1)
        np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-3)
    assert abs(float(all_of_them[0] @ not_outlying[0])) < 0.5  # the defect is the first component, unless left out


def test_curves_and_shares_belong_to_the_records(demo: Subject, photographs: Path, naive: Any) -> None:
    images = [naive.pixels(Image.open(path), demo.backbone, 280) for path in sorted(photographs.iterdir())[:2]]
    (side,) = surveyed([demo], images).sides
    nu = demo.prediction.directions()
    assert side.observed.shape == nu.shape
    for number, block in enumerate(side.blocks):
        curve, shares = side.curves[number].norms, side.shares[number]["outlying"]
        assert curve is not None
        assert block.patch_norm is not None
        assert block.patch_norm.min <= curve.at[0] < curve.at[-1] <= block.patch_norm.max
        assert max(curve.density) == 1
        assert set(side.curves[number].angles) == set(STAGES)
        assert shares.shape == GRID
        marked = block.marked["outlying"]
        assert marked is not None
        assert {(p.row, p.column): p.share for p in marked.positions} == {
            (r, c): shares[r, c].item() for r, c in shares.nonzero().tolist()
        }
        assert ("equation_5" in side.shares[number]) == block.determined
        assert side.observed[number].norm().item() == pytest.approx(1.0 if block.observed else 0.0)


def test_bfloat16_stays_near(demo: Subject, photographs: Path, naive: Any) -> None:
    images = [naive.pixels(Image.open(path), demo.backbone, 280) for path in sorted(photographs.iterdir())[:2]]
    exact, rough = (surveyed([demo], images, dtype=dtype).sides[0] for dtype in ("float32", "bfloat16"))
    assert exact.blocks != rough.blocks
    for a, b in zip(exact.blocks, rough.blocks, strict=True):
        assert a.patch_norm is not None
        assert b.patch_norm is not None
        for name in ("mean", "median", "p99", "max"):
            assert getattr(b.patch_norm, name) == pytest.approx(getattr(a.patch_norm, name), rel=0.02)
        assert (a.marked["outlying"], a.gap) == (b.marked["outlying"], b.gap)
        if a.observed and b.observed:
            angles = [side.observed.angle_to_predicted_deg["cumulative"] for side in (a, b) if side.observed]
            assert angles[0] == pytest.approx(angles[1], abs=0.5)


def test_a_cosine_rounded_above_one_is_an_angle_of_zero() -> None:
    none = torch.zeros(1, 1, 1)
    cosines = torch.tensor([1.0000001, 1.0, 0.5, 0.0]).reshape(1, 1, 1, 4)
    tokens = BlockTokens(torch.zeros(1, 1, 1, 8), none, None, none, cosines, {})
    torch.testing.assert_close(tokens.degrees.flatten(), torch.tensor([0.0, 0.0, 60.0, 90.0]))


def test_no_image_gives_no_side(small: Subject) -> None:
    found = surveyed([small], [], components=True)
    assert (found.sides, found.images) == ((), 0)


def test_backbones_of_one_shape_compare(demo: Subject, clean: Subject, small: Subject) -> None:
    require_comparable([demo.backbone])
    require_comparable([demo.backbone, clean.backbone])
    require_comparable([small.backbone, replace(small.backbone, prefix_tokens=1, image_size=70)])


@pytest.mark.parametrize("fact", ["width", "depth", "patch size", "normalization"])
def test_backbones_that_differ_are_refused_by_what_differs(fact: str, demo: Subject) -> None:
    backbone = demo.backbone
    layers = backbone.layers
    other = replace(
        backbone,
        name="another",
        layers=layers.model_copy(
            update={"width": 384} if fact == "width" else {"blocks": layers.blocks[:5]} if fact == "depth" else {}
        ),
        patch_size=16 if fact == "patch size" else 14,
        mean=(0.5, 0.5, 0.5) if fact == "normalization" else backbone.mean,
    )
    with pytest.raises(UsageError, match=f"cannot compare demo_vit with another: their {fact} differ"):
        require_comparable([backbone, other])
