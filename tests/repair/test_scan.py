"""The scan of the original: its marks against a loop over blocks and images, and its file."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from threaded_ranks import side_by_side
from tiny_runs import RED, SIZE, Pictures

from sinder_cli.defects.detection import CERTAIN, RISE, DetectionRule, standing_out
from sinder_cli.distributed import ALONE, Ranks
from sinder_cli.errors import BadInputError
from sinder_cli.events import Emit, Noted, silent
from sinder_cli.images.decoding import LATER_PAGES
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.repairing.choosing import rarest_first, to_train_on
from sinder_cli.repairing.deltas import Deltas
from sinder_cli.repairing.forward import Directions
from sinder_cli.repairing.preparing import Prepared, Start
from sinder_cli.repairing.scan import (
    BlockOutliers,
    FarTokens,
    ImageOutliers,
    Scan,
    marked_batch,
    scan,
)
from sinder_cli.repairing.settings import RepairSettings

DEPTH = 6
SPOTS = {0: RED, 1: [], 2: [(0, 0), (11, 5)], 3: [(6, 6)]}


def pictures(planted: Any) -> Pictures:
    return Pictures(*[planted.image(index, torch.float32, red=spots) for index, spots in SPOTS.items()])


def scanned(
    planted: Any,
    source: Pictures,
    unreadable: dict[str, str] | None = None,
    ranks: Ranks = ALONE,
    emit: Emit = silent,
    **settings: Any,
) -> Scan:
    chosen = RepairSettings.model_validate({"workers": 0} | settings)
    preprocess = Preprocessing(SIZE, planted.backbone.mean, planted.backbone.std)
    start = Start(planted.backbone, preprocess, source, chosen, "cpu", {}, len(source))
    deltas = Deltas(planted.backbone, planted.module)
    prepared = Prepared(start, planted.directions, planted.module, deltas, emit, ranks)
    return scan(prepared, range(len(source)), {} if unreadable is None else unreadable)


def looped_marks(planted: Any, picture: torch.Tensor) -> tuple[list[set[int]], list[set[int]], list[float]]:
    """By block: tokens that are marked by `auto`, those among them that equation (5) marks, and the largest ratio."""
    pixels = (picture.double() * 255).round() / 255
    tokens, context = planted.backbone.embed(planted.module, pixels.float()[None])

    def ratios(tokens: torch.Tensor) -> list[float]:
        norms = tokens[0, 1:].norm(dim=-1).tolist()
        middle = sorted(norms)[(len(norms) - 1) // 2]
        return [norm / middle for norm in norms]

    start = ratios(tokens)
    blocks, predictions = [], []
    for block in range(DEPTH):
        tokens = planted.backbone.run_block(planted.module, block, tokens, context)
        blocks.append(ratios(tokens))
        nu = planted.directions.nu[block]
        logits = [-abs(float(x @ nu) / float(x.norm()) / float(nu.norm())) for x in tokens[0, 1:]]
        mean = sum(logits) / len(logits)
        std = math.sqrt(sum((logit - mean) ** 2 for logit in logits) / (len(logits) - 1))
        inside = [0 < at // 12 < 11 and 0 < at % 12 < 11 for at in range(144)]
        trusted = planted.directions.gaps[block] >= 1.1
        predictions.append({at for at in range(144) if trusted and inside[at] and logits[at] < mean - 4 * std})
    out = [{at for at in range(144) if block[at] > 3 and block[at] > RISE * start[at]} for block in blocks]
    marked = []
    for block in range(DEPTH):
        beside = set().union(*(out[other] for other in (block - 1, block + 1) if 0 <= other < DEPTH))
        certain = {at for at in out[block] if blocks[block][at] > 3 * CERTAIN}
        marked.append(out[block] & (certain | predictions[block] | beside))
    by_weights = [marks & seen for marks, seen in zip(marked, predictions, strict=True)]
    return marked, by_weights, [max(block) for block in blocks]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_scan_marks_what_a_loop_over_blocks_marks(single_writer: Any, batch_size: int) -> None:
    gaps = [1.0, 2.0, 2.0, 1.0, 1.0, 1.0]
    blue = single_writer.module.nu[1]  # the writer writes along it
    planted = type(single_writer)(
        single_writer.module, single_writer.backbone, Directions(blue.expand(DEPTH, -1), gaps), single_writer.image
    )
    source = pictures(planted)
    found = scanned(planted, source, batch_size=batch_size)
    looped = [looped_marks(planted, tensor) for tensor in source.tensors if tensor is not None]
    assert any(marks for _, by_weights, _ in looped for marks in by_weights)
    assert [image.name for image in found.images] == [f"picture {index}" for index in range(4)]
    for image, (marked, _, _) in zip(found.images, looped, strict=True):
        assert {block: set(places) for block, places in image.blocks.items()} == {
            block: marks for block, marks in enumerate(marked) if marks
        }
        assert image.finite
        assert image.grid == (12, 12)
        assert image.standing == len(set().union(*marked))
    for block, outliers in enumerate(found.blocks):
        assert outliers.block == block
        assert outliers.tokens == sum(len(marked[block]) for marked, _, _ in looped)
        assert outliers.images == sum(bool(marked[block]) for marked, _, _ in looped)
        assert outliers.marked_by_weights == sum(len(seen[block]) for _, seen, _ in looped)
        assert outliers.max_ratio == pytest.approx(max(most[block] for _, _, most in looped), rel=1e-4)
        assert outliers.gap == gaps[block]
    assert found.tokens == 4 * 144
    assert not found.healthy
    assert [image.kind for image in found.images] == [(1,), (), (1,), (1,)]
    assert not any(image.flooded for image in found.images)


def test_a_shared_direction_is_predicted_where_near_and_determined(single_writer: Any) -> None:
    red, blue = single_writer.module.nu  # the writer writes along blue
    source = pictures(single_writer)

    def seen(nu: torch.Tensor, gap: float) -> BlockOutliers:
        directions = Directions(nu.expand(DEPTH, -1), [gap] * DEPTH)
        planted = type(single_writer)(single_writer.module, single_writer.backbone, directions, single_writer.image)
        return scanned(planted, source).blocks[1]

    near, far = seen(-blue, 2.0), seen(red, 2.0)
    assert near.angle_deg is not None
    assert far.angle_deg is not None
    assert near.angle_deg < 30 < far.angle_deg
    assert (near.predicted, far.predicted, seen(blue, 1.05).predicted) == (True, False, False)
    assert seen(blue, math.inf).gap == 1e12  # a number that JSON has


class WithPages(Pictures):
    """Pictures 3 and 4 have two pages."""

    def load(self, index: int, side: int | None = None) -> Image.Image:
        page = super().load(index, side)
        page.info |= {LATER_PAGES: True} if index in (3, 4) else {}
        return page


def test_two_ranks_find_what_one_finds(single_writer: Any) -> None:
    flood = [(row, column) for row in range(9) for column in range(12)]
    spots = [RED, [], flood, RED[:2], [(6, 6)], [], RED[1:], [(1, 1)]]
    source = WithPages(*[single_writer.image(at, torch.float32, red=red) for at, red in enumerate(spots)])
    source.tensors[5] = None
    missed: dict[str, str] = {}
    notes: list[list[object]] = [[], [], []]
    alone = scanned(single_writer, source, missed, ALONE, notes[2].append, batch_size=2)
    told: list[dict[str, str]] = [{}, {}]
    both = side_by_side(
        lambda ranks: scanned(single_writer, source, told[ranks.rank], ranks, notes[ranks.rank].append, batch_size=2)
    )
    assert [image.name for image in alone.images if image.flooded] == ["picture 2"]
    assert alone.unreadable == {5: "it is broken"}
    assert told == [missed, missed] == [{"picture 5": "it is broken"}] * 2
    headless = replace(single_writer, backbone=replace(single_writer.backbone, has_cls=False))
    assert [image.flooded for image in scanned(headless, source).images] == [image.flooded for image in alone.images]
    for heard in notes:
        (note,) = [event.text for event in heard if isinstance(event, Noted)]
        assert re.fullmatch(r"only the first page or frame is used of 2 images \(picture \d, …\)", note)
    for found in both:
        assert (found.images, found.tokens, found.unreadable) == (alone.images, alone.tokens, alone.unreadable)
        for block, expected in zip(found.blocks, alone.blocks, strict=True):
            near = replace(expected, max_ratio=pytest.approx(expected.max_ratio, rel=1e-5))
            if expected.angle_deg is not None:
                near = replace(near, angle_deg=pytest.approx(expected.angle_deg, abs=1e-2))
            assert block == near


def test_moments_of_other_images_are_added() -> None:
    nu = torch.nn.functional.normalize(torch.arange(1.0, 9.0), dim=0)
    patches = torch.randn(3, 2, 2, 8, generator=torch.Generator().manual_seed(0)) + 3 * nu
    ratios = torch.tensor([3.01, 3.0, 0.5, 9.0]).view(1, 2, 2).expand(3, 2, 2)
    whole, one, other = FarTokens(), FarTokens(), FarTokens()
    whole.add(4, patches, ratios, DetectionRule())
    one.add(4, patches[:1], ratios[:1], DetectionRule())
    other.add(4, patches[1:], ratios[1:], DetectionRule(norm_factor=0))  # 0: the default
    other.add(2, patches[1:], ratios[1:], DetectionRule())
    one.merge(other)
    assert set(one.moments) == {2, 4}
    torch.testing.assert_close(one.moments[4], whole.moments[4])
    far = [token / token.norm() for image in patches for token in (image[0, 0], image[1, 1])]
    torch.testing.assert_close(whole.moments[4], sum(torch.outer(unit, unit) for unit in far))
    assert torch.equal(one.moments[2], other.moments[2])
    assert (one.angle(3, nu), one.angle(2, nu) is None) == (None, False)


@pytest.mark.parametrize(
    ("mark", "factor", "expected"),
    [
        ("weights", 0.0, ("auto", 3.0)),
        ("weights", 5.0, ("auto", 5.0)),
        ("norm", 4.0, ("norm", 4.0)),
        ("auto", 0.0, ("auto", 3.0)),
    ],
)
def test_verdicts_count_what_stands_out_whatever_marks(mark: Any, factor: float, expected: tuple[str, float]) -> None:
    found = standing_out(DetectionRule(threshold=2.5, min_tokens=7, mark=mark, norm_factor=factor))
    assert (found.mark, found.norm_factor, found.threshold, found.min_tokens) == (*expected, 2.5, 7)


def test_levels_are_medians_and_norms_of_cls_of_every_block(single_writer: Any) -> None:
    images = torch.stack([single_writer.image(at, torch.float32, red=RED) for at in range(3)])
    arguments = (single_writer.backbone, single_writer.module, single_writer.directions)
    found = marked_batch(*arguments, images, DetectionRule())
    tokens, context = single_writer.backbone.embed(single_writer.module, images)
    expected = []
    for block in range(DEPTH):
        tokens = single_writer.backbone.run_block(single_writer.module, block, tokens, context)
        for part in (slice(1, None), slice(1)):
            norms = [sorted(float(token.norm()) for token in image[part]) for image in tokens]
            expected.append([each[(len(each) - 1) // 2] for each in norms])
    torch.testing.assert_close(found.levels, torch.tensor(expected))


def test_an_image_that_cannot_be_decoded_is_left_out(single_writer: Any) -> None:
    source = pictures(single_writer)
    source.tensors[1] = None
    unreadable: dict[str, str] = {}
    found = scanned(single_writer, source, unreadable)
    assert unreadable == {"picture 1": "it is broken"}
    assert set(found.by_name) == {"picture 0", "picture 2", "picture 3"}
    assert found.tokens == 3 * 144


def test_images_without_an_outlying_token_are_healthy(single_writer: Any) -> None:
    found = scanned(single_writer, Pictures(*[single_writer.image(index) for index in range(2)]))
    assert found.healthy
    assert all(block.tokens == 0 and block.angle_deg is None and not block.predicted for block in found.blocks)
    unmarked = scanned(single_writer, pictures(single_writer), mark="weights")  # no direction is determined
    assert unmarked.healthy
    assert unmarked.standing > 0
    assert all(block.tokens == 0 and block.angle_deg is None for block in unmarked.blocks)


def test_an_image_whose_tokens_are_not_finite_is_told_apart(single_writer: Any) -> None:
    found = scanned(single_writer, Pictures(single_writer.image(0), single_writer.image(1, green=[(5, 5)])))
    assert [image.finite for image in found.images] == [True, False]
    assert all(math.isfinite(block.max_ratio) for block in found.blocks)


def test_an_image_is_not_finite_if_a_single_number_is_not(single_writer: Any) -> None:
    def run_block(module: Any, index: int, tokens: torch.Tensor, context: Any) -> torch.Tensor:
        leaving = single_writer.backbone.run_block(module, index, tokens, context)
        if index == DEPTH - 1:
            leaving[1, 7, 3] = math.inf
        return leaving

    planted = replace(single_writer, backbone=replace(single_writer.backbone, run_block=run_block))
    found = scanned(planted, Pictures(*[single_writer.image(index) for index in range(3)]), batch_size=3)
    assert [image.finite for image in found.images] == [True, False, True]
    assert (found.blocks[-1].tokens, found.blocks[-1].angle_deg) == (1, None)  # no direction
    with pytest.raises(BadInputError, match="the backbone is broken"):
        found.require_finite()


def test_the_marks_of_an_image_are_masks_again() -> None:
    image = ImageOutliers("a", 0, (2, 3), True, {1: (0, 5), 3: (4,)})
    assert image.first_marks(4).nonzero().tolist() == [[1, 0, 0], [1, 1, 2], [3, 1, 1]]
    assert (image.kind, ImageOutliers("b", 4, (2, 3), True, {}).kind) == ((1, 3), ())
    again = ImageOutliers("c", 0, (2, 3), True, {4: (1, 5), 1: (0, 5), 3: (5,), 2: (3,)})  # in no order
    assert again.kind == (1, 2, 4)
    assert again.first_marks(5).flatten(1).nonzero().tolist() == [[1, 0], [1, 5], [2, 3], [4, 1]]


EXAMPLE = Scan(
    (
        ImageOutliers("größer \udcff.png", 2, (2, 3), True, {1: (0, 5), 10: (4,)}, 3, True),
        ImageOutliers("b", 4, (2, 3), False, {}),
    ),
    (BlockOutliers(0, 0, 0, 0, 1.5, 1e12, None, False), BlockOutliers(1, 2, 1, 1, 9.5, 2.0, 12.5, True)),
    12,
    {3: "it is broken"},
)


def test_a_scan_is_read_as_it_was_written(tmp_path: Path) -> None:
    EXAMPLE.write(tmp_path / "outliers.json")
    assert Scan.read(tmp_path / "outliers.json") == EXAMPLE


def test_a_scan_goes_by_places_and_not_by_names() -> None:
    source = Pictures(*[torch.zeros(3, 4, 4)] * 5)
    assert [image.name for image in EXAMPLE.named_as_in(source).images] == ["picture 2", "picture 4"]
    with pytest.raises(BadInputError, match="the list of images is shorter than it was"):
        EXAMPLE.named_as_in(Pictures(*[torch.zeros(3, 4, 4)] * 4))


def test_a_model_that_is_not_finite_is_never_called_healthy() -> None:
    with pytest.raises(BadInputError, match=r"the backbone is broken: .* on 1 of 2 images, such as b"):
        EXAMPLE.require_finite()
    replace(EXAMPLE, images=EXAMPLE.images[:1]).require_finite()


def test_tokens_that_stand_out_are_summed_over_images() -> None:
    assert EXAMPLE.standing == 3
    assert replace(EXAMPLE, images=EXAMPLE.images * 2).standing == 6


def test_a_scan_of_a_model_is_read_as_written(single_writer: Any, tmp_path: Path) -> None:
    found = scanned(single_writer, pictures(single_writer))
    found.write(tmp_path / "outliers.json")
    assert Scan.read(tmp_path / "outliers.json") == found


def test_a_scan_of_an_earlier_version_has_no_flooded_image(tmp_path: Path) -> None:
    path = tmp_path / "outliers.json"
    EXAMPLE.write(path)
    stored = json.loads(path.read_text())
    for image in stored["images"]:
        del image["flooded"]
    path.write_text(json.dumps(stored))
    assert Scan.read(path) == replace(EXAMPLE, images=tuple(replace(each, flooded=False) for each in EXAMPLE.images))


@pytest.mark.parametrize("kept", [0, 1, 40, 200, -3])
def test_a_torn_file_is_bad_input(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "outliers.json"
    EXAMPLE.write(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadInputError, match=r"cannot read .*outliers") as caught:
        Scan.read(path)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("images", None),
        ("blocks", [{"block": 0}]),
        ("images", [{"name": "a", "grid": [2], "finite": True, "blocks": {}}]),
        ("images", [{"name": "a", "grid": [2, 3], "finite": True, "blocks": []}]),
        ("images", [{"name": "a", "grid": [2, 3], "finite": True, "blocks": {"x": [0]}}]),
    ],
)
def test_a_file_of_another_form_is_bad_input(place: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "outliers.json"
    EXAMPLE.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {place: value}))
    with pytest.raises(BadInputError, match="cannot read"):
        Scan.read(path)


def test_flooded_images_are_trained_on_only_without_others() -> None:
    def image(name: str, kind: int | None, flooded: bool) -> ImageOutliers:
        return ImageOutliers(name, 0, (1, 1), True, {} if kind is None else {kind: (0,)}, flooded=flooded)

    images = [image("a", 4, False), image("b", 4, True), image("c", 7, True), image("d", None, False)]
    assert [each.name for each in to_train_on(images)] == ["a", "c"]
    assert to_train_on([]) == []


def test_images_come_in_turn_the_rarest_kind_first() -> None:
    kinds = [4, 4, 4, 2, 7, 7]
    images = [ImageOutliers(str(at), 10 * at, (1, 1), True, {kind: (0,)}) for at, kind in enumerate(kinds)]
    assert rarest_first(images) == [30, 40, 0, 50, 10, 20]
    assert rarest_first([]) == []
