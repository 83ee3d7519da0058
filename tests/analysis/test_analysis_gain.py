"""What a repair could change: every number against loops over forward passes, and its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from slow_inpainting import ratios_of, slow_pass
from torch import Tensor

from sinder_cli import Backbone, ModelRequest, UsageError, api
from sinder_cli.analysis import gain as module
from sinder_cli.analysis.directions import Basis
from sinder_cli.analysis.gain import SAME, InpaintingCollector, angle_of, gain_of, gain_sentence
from sinder_cli.analysis.per_image import portraits
from sinder_cli.analysis.records import Distribution, Gain, ImageInpainting, Inpainting
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.analysis.survey import Surveys, equal_shapes, survey
from sinder_cli.analysis.tokens import Subject, block_by_block
from sinder_cli.analysis.verdict import judge
from sinder_cli.defects.detection import DetectionRule, defective_somewhere, outlying
from sinder_cli.defects.prediction import BlockSpectrum, Prediction
from sinder_cli.defects.settings import STAGES, Mark
from sinder_cli.defects.spectrum import LeadingPair
from sinder_cli.requests import AnalyzeRequest

NAMES = ("chelsea.png", "coffee.png", "rocket.jpg")


def surveyed(subjects: Sequence[Subject], images: Sequence[Tensor], batch_size: int = 2, **given: Any) -> Surveys:
    settings = AnalyzeSettings.model_validate({"device": "cpu", **given})
    batches = equal_shapes(((f"{at}.png", image) for at, image in enumerate(images)), batch_size)
    found = survey(subjects, batches, (8, 8), settings, "cpu")
    assert found is not None
    return found


def gain(found: Surveys, side: int = 0) -> Inpainting:
    inpainting = found.sides[side].inpainting
    assert inpainting is not None
    return inpainting


def cosine(a: Tensor, b: Tensor) -> np.ndarray:
    a, b = a.double(), b.double()
    return ((a * b).sum(dim=-1) / a.norm(dim=-1) / b.norm(dim=-1)).numpy()


class Expected:
    """One image in a notebook: its marked tokens, and cosines of the last block's."""

    def __init__(self, subject: Subject, image: Tensor, factor: float) -> None:
        prefix, P = subject.backbone.prefix_tokens, subject.backbone.patch_size
        grid = (image.shape[1] // P, image.shape[2] // P)
        with torch.no_grad():
            embedded = subject.module.embed(image[None])
        blocks = list(subject.module.blocks)
        original, marks = slow_pass(embedded, blocks, prefix, grid, factor, replace=False)
        without, replaced = slow_pass(embedded, blocks, prefix, grid, factor)
        self.ever = sorted(set().union(*marks))
        self.replaced = len(set().union(*replaced))
        patches = cosine(original[-1][0, prefix:], without[-1][0, prefix:])
        self.marked = patches[self.ever]
        self.good = np.delete(patches, self.ever)
        self.cls = float(cosine(original[-1][0, 0], without[-1][0, 0]))
        self.largest = [max(ratios_of(tokens, prefix)) for tokens in original]


def agrees(found: Distribution | None, values: np.ndarray) -> None:
    assert found is not None
    assert found.count == len(values)
    assert (found.mean, found.min, found.max) == pytest.approx((values.mean(), values.min(), values.max()), abs=2e-5)
    for name, share in (("p01", 0.01), ("median", 0.5), ("p99", 0.99)):
        assert getattr(found, name) == pytest.approx(float(np.quantile(values, share)), abs=1.2e-4), name


@pytest.mark.parametrize("factor", [3.0, 6.0])
def test_on_the_demo_every_number_is_that_of_a_notebook(
    factor: float, demo: Subject, photographs: Path, naive: Any
) -> None:
    images = [naive.pixels(Image.open(photographs / name), demo.backbone, 280) for name in NAMES]
    found = gain(surveyed([demo], images, norm_factor=factor, mark="norm"))
    expected = [Expected(demo, image, factor) for image in images]
    assert found.tokens == sum(len(each.ever) for each in expected) > 0
    assert found.replaced == sum(each.replaced for each in expected)
    assert found.images == sum(bool(each.ever) for each in expected)
    agrees(found.good_cosine, np.concatenate([each.good for each in expected]))
    agrees(found.marked_cosine, np.concatenate([each.marked for each in expected]))
    agrees(found.cls_cosine, np.asarray([each.cls for each in expected]))
    assert [each.image for each in found.by_image] == [f"{at}.png" for at, e in enumerate(expected) if e.ever]
    for record in found.by_image:
        own = expected[int(record.image[0])]
        assert record.tokens == len(own.ever)
        assert record.max_ratio == pytest.approx(max(own.largest), rel=1e-4)
        assert own.largest[record.block] == pytest.approx(max(own.largest), rel=1e-4)
        assert record.cls_cosine == pytest.approx(own.cls, abs=2e-5)
        assert record.good_cosine == pytest.approx(sorted(own.good)[(len(own.good) - 1) // 2], abs=2e-5)
        assert record.marked_cosine == pytest.approx(own.marked.mean(), abs=2e-5)
    assert found.gain == gain_of(found.images, found.cls_cosine, found.good_cosine, found.marked_cosine)


def test_the_size_of_batches_changes_nothing(demo: Subject, photographs: Path, naive: Any) -> None:
    images = [naive.pixels(Image.open(photographs / name), demo.backbone, 112) for name in NAMES]
    images += [image.flip(-1) for image in images]
    one, three = (gain(surveyed([demo], images, batch_size=size)) for size in (1, 3))
    assert (one.tokens, one.images, one.replaced) == (three.tokens, three.images, three.replaced)
    for a, b in zip(one.by_image, three.by_image, strict=True):
        assert (a.image, a.tokens, a.block) == (b.image, b.tokens, b.block)
        assert (a.cls_cosine, a.good_cosine, a.marked_cosine) == pytest.approx(
            (b.cls_cosine, b.good_cosine, b.marked_cosine), abs=1e-5
        )


def test_each_side_is_held_against_its_own_inpainted_pass(
    demo: Subject, clean: Subject, photographs: Path, naive: Any
) -> None:
    images = [naive.pixels(Image.open(photographs / name), demo.backbone, 112) for name in NAMES]
    found = surveyed([demo, clean], images)
    assert gain(found).gain in ("marked", "features")
    healthy = gain(found, 1)
    assert (healthy.gain, healthy.tokens, healthy.images, healthy.by_image) == ("healthy", 0, 0, ())
    assert healthy.cls_cosine is not None
    assert (healthy.cls_cosine.count, healthy.cls_cosine.min) == (3, 1.0)
    assert healthy.good_cosine is not None
    assert healthy.good_cosine.count == sum(image.shape[1] // 14 * (image.shape[2] // 14) for image in images)
    assert healthy.marked_cosine is None
    assert healthy.sentence == "healthy: no token is outlying in any block; a repair would train nothing."


def test_only_images_with_outlying_tokens_are_run_again(
    monkeypatch: pytest.MonkeyPatch, demo: Subject, clean: Subject, photographs: Path, naive: Any
) -> None:
    ran: list[int] = []
    original = module.last_tokens

    def counted(backbone: Backbone, of: Any, images: Tensor) -> Tensor:
        ran.append(len(images))
        return original(backbone, of, images)

    monkeypatch.setattr(module, "last_tokens", counted)
    images = [naive.pixels(Image.open(photographs / "chelsea.png"), demo.backbone, 280)] * 2
    surveyed([clean], images)
    assert ran == []
    surveyed([demo], images, inpaint=False)
    assert ran == []
    surveyed([demo], images)
    assert ran == [2]


def test_without_inpainting_nothing_is_said_of_it(demo: Subject, photographs: Path, naive: Any) -> None:
    image = naive.pixels(Image.open(photographs / "chelsea.png"), demo.backbone, 280)
    assert surveyed([demo], [image], inpaint=False).sides[0].inpainting is None


def test_of_an_inpainted_side_no_gain_is_asked_for(demo: Subject, photographs: Path, naive: Any) -> None:
    image = naive.pixels(Image.open(photographs / "chelsea.png"), demo.backbone, 280)
    found = surveyed([demo, demo.inpainted(AnalyzeSettings())], [image])
    assert found.sides[0].inpainting is not None
    assert found.sides[1].inpainting is None
    marked = [block.marked["outlying"] for block in found.sides[1].blocks]
    assert all(each is not None and each.tokens == 0 for each in marked)


# --- a stub: an outlier that is gone before the last block

N, PATCH, DEPTH, SIDE = 12, 2, 4, 8


def passing(first: int = 1, last: int = 2) -> Subject:
    """Two patches are outlying after the blocks from `first` to before `last`, which takes away what was added."""
    generator = torch.Generator().manual_seed(0)
    project = torch.randn(N, 3 * PATCH * PATCH, generator=generator)
    mixing = torch.randn(DEPTH, N, N, generator=generator) / N**0.5
    direction = torch.nn.functional.normalize(torch.randn(N, generator=generator), dim=0)

    def embed(_module: Any, images: Tensor) -> tuple[Tensor, None]:
        patches = (project @ torch.nn.functional.unfold(images, PATCH, stride=PATCH)).transpose(1, 2)
        return torch.cat([torch.ones(len(images), 1, N), patches], dim=1), None

    def run_block(_module: Any, index: int, tokens: Tensor, _context: None) -> Tensor:
        tokens = tokens + (tokens.mean(dim=1, keepdim=True) @ mixing[index]).tanh()
        added = 500 * (int(index == first) - int(index == last))
        spiked = tokens[:, 1:3] + added * direction
        return torch.cat([tokens[:, :1], spiked, tokens[:, 3:]], dim=1)

    backbone = Backbone(
        name="passing",
        layers=SimpleNamespace(width=N, blocks=(None,) * DEPTH),  # type: ignore[arg-type]
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
    pair = LeadingPair(torch.nn.functional.one_hot(torch.tensor(0), N).float(), 1.0, 1.0)
    spectra = tuple(BlockSpectrum(block, pair, 1.0, None) for block in range(DEPTH))
    return Subject(backbone, None, Prediction("passing", N, dict.fromkeys(STAGES, spectra), None))


def some_images(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(1)))


def test_an_outlier_of_the_middle_gives_verdict_and_gain() -> None:
    found = surveyed([passing()], some_images())
    side = found.sides[0]
    tokens = [block.marked["outlying"].tokens for block in side.blocks if block.marked["outlying"]]
    assert tokens == [0, 6, 0, 0]
    verdict = judge(side.blocks, 3)
    assert (verdict.kind, verdict.first_block, verdict.tokens) == ("unpredicted", 1, 6)
    assert verdict.fails
    spoilt = gain(found)
    assert (spoilt.tokens, spoilt.images, spoilt.replaced, spoilt.gain) == (6, 3, 6, "features")
    assert {image.block for image in spoilt.by_image} == {1}


def test_an_image_portrait_holds_it_against_its_inpainted_original() -> None:
    images = torch.stack(some_images(2))
    subject, settings = passing(), AnalyzeSettings(device="cpu")
    basis = Basis(torch.zeros(N, dtype=torch.float64), torch.eye(N, 3, dtype=torch.float64))
    found = list(portraits([subject], [(["a", "b"], images)], basis, settings, "cpu"))
    for at, portrait in enumerate(found):
        maps = portrait.sides[0].inpainted
        assert maps is not None
        assert maps.marked.flatten().nonzero()[:, 0].tolist() == [0, 1]
        assert not portrait.sides[0].outlying.any()  # in the last block
        (record,) = gain(surveyed([subject], [images[at]])).by_image
        assert maps.cls_cosine == pytest.approx(record.cls_cosine, abs=1e-5)
        assert maps.cosine[maps.marked].mean().item() == pytest.approx(record.marked_cosine, abs=1e-5)
        assert maps.cosine[~maps.marked].median().item() == pytest.approx(record.good_cosine, abs=1e-5)
    for given in (settings.model_copy(update={"inpaint": False}), settings.model_copy(update={"norm_factor": 1e4})):
        (first, _) = portraits([subject], [(["a", "b"], images)], basis, given, "cpu")
        assert first.sides[0].inpainted is None


def test_tokens_that_are_not_finite_make_nobody_healthy() -> None:
    images = some_images(2)
    images[0][:] = torch.nan
    found = gain(surveyed([passing(DEPTH, DEPTH)], images))
    assert found.gain is None
    assert "cannot be determined" in found.sentence
    assert found.good_cosine is not None
    assert found.good_cosine.count == SIDE * SIDE


def test_of_many_images_those_that_move_furthest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_IMAGES", 3)
    images = some_images(10)
    found = gain(surveyed([passing()], images, batch_size=2))
    monkeypatch.undo()
    every = gain(surveyed([passing()], images, batch_size=2))
    assert (found.images, len(found.by_image), len(every.by_image)) == (10, 3, 10)
    assert found.cls_cosine == every.cls_cosine

    def moved(image: ImageInpainting) -> float:
        assert image.cls_cosine is not None
        return image.cls_cosine

    furthest = sorted(sorted(every.by_image, key=moved)[:3], key=lambda each: each.image)
    assert [each.image for each in found.by_image] == [each.image for each in furthest]


def test_collectors_of_two_ranks_add_up_to_one() -> None:
    images, settings, subject = some_images(6), AnalyzeSettings(device="cpu"), passing()
    whole = gain(surveyed([subject], images, batch_size=3))
    parts = [InpaintingCollector("cpu"), InpaintingCollector("cpu")]
    for part, chosen in zip(parts, (images[:3], images[3:]), strict=True):
        batch = torch.stack(chosen)
        outliers = module.Outliers(settings)
        nu = subject.directions("cpu")
        names = [f"{at}.png" for at, image in enumerate(images) if any(image is each for each in chosen)]
        for side in block_by_block(subject, batch, nu, settings):
            outliers.add(side)
        part.add(names, subject, batch, outliers, side, settings)
    first = parts[0].to_cpu()
    first.merge(parts[1].to_cpu())
    assert first.record(finite=True) == whole


@pytest.mark.parametrize("mark", ["auto", "weights", "norm"])
@pytest.mark.parametrize("predicted", [True, False])
def test_outliers_are_the_tokens_that_a_repair_would_mark(mark: Mark, predicted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    ratios = torch.randn(6, 4, 9, 9, generator=generator).exp().square()  # [blocks, B, h, w]
    ratios /= ratios.flatten(2).median(dim=2).values[..., None, None]
    along = torch.rand(ratios.shape, generator=generator) < 0.3
    start = torch.full((4, 9, 9), 0.5)
    rule = DetectionRule(mark=mark)
    outliers = module.Outliers(AnalyzeSettings(mark=mark))
    for each, seen in zip(ratios, along, strict=True):
        masks = {"outlying": outlying(each, start, 3.0)} | ({"equation_5": seen} if predicted else {})
        outliers.add(SimpleNamespace(norms=each, masks=masks))  # type: ignore[arg-type]
    expected = defective_somewhere(ratios, start, along & predicted, rule)
    assert torch.equal(outliers.marked, expected.any(dim=0))
    assert torch.equal(outliers.by_norm, outlying(ratios, start, 3.0).any(dim=0))
    assert bool(expected.any()) is (predicted or mark != "weights")


def test_tokens_that_stand_out_and_are_left_are_counted() -> None:
    images, subject = some_images(4), passing()
    taken = gain(surveyed([subject], images, mark="norm"))
    left = gain(surveyed([subject], images, mark="weights"))
    assert taken.unmarked == 0 < taken.tokens
    assert (left.tokens, left.unmarked, left.gain) == (0, taken.tokens, "healthy")
    assert left.sentence.startswith(f"A repair would train nothing: {left.unmarked:,} tokens stand out by norm")


# --- words


def around(value: float, p01: float | None = None) -> Distribution:
    low = value if p01 is None else p01
    return Distribution(count=10, mean=value, min=low, p01=low, median=value, p99=value, max=value)


@pytest.mark.parametrize(
    ("images", "cls", "good", "marked", "expected"),
    [
        (0, 1.0, 1.0, None, "healthy"),
        (3, SAME, SAME, SAME, "none"),
        (3, SAME, SAME, SAME - 1e-6, "marked"),
        (3, SAME, SAME - 1e-6, 1.0, "features"),
        (3, SAME - 1e-6, 1.0, 1.0, "features"),
        (3, None, 1.0, 0.2, "marked"),
    ],
)
def test_what_there_is_to_gain(
    images: int, cls: float | None, good: float, marked: float | None, expected: str
) -> None:
    of_cls, of_marked = (None if value is None else around(value) for value in (cls, marked))
    assert gain_of(images, of_cls, around(good), of_marked) == expected


def test_the_first_percentile_counts_not_the_middle() -> None:
    assert gain_of(3, around(1.0), around(1.0, p01=0.9), around(1.0)) == "features"


def test_the_words_say_how_far_tokens_would_move() -> None:
    told = gain_sentence("features", "12 in 3 of 4 images", around(0.95), around(0.995, 0.97), around(0.5))
    assert told == (
        "Without its outlying tokens (12 in 3 of 4 images) cls would move by 18° (cosine 0.9500), good tokens by 5.7°"
        " (cosine 0.9950, 1 % below 0.9700), marked ones by 60° (cosine 0.5000): this much a repair could change."
    )
    far = gain_sentence("features", "12 in 3 of 4 images", around(0.5), around(0.995), around(0.5))
    assert far.endswith("test on a task whether this is an improvement.")
    alone = gain_sentence("marked", "1 in 1 of 4 images", None, around(1.0), around(0.5))
    assert alone == (
        "Without its outlying tokens (1 in 1 of 4 images) good tokens would move by 0° (cosine > 0.9999), marked"
        " ones by 60° (cosine 0.5000): a repair could change little but the outlying tokens themselves."
    )
    nothing = gain_sentence("none", "1 in 1 of 4 images", around(1.0), around(1.0), around(1.0))
    assert nothing.endswith("outliers cost little, a repair has nothing to gain.")
    assert "cls would move by 0° (cosine > 0.9999), good tokens by 0°" in nothing


@pytest.mark.parametrize("gain", ["none", "marked", "features"])
def test_the_angle_of_cls_is_always_told(gain: Gain) -> None:
    told = gain_sentence(gain, "1 in 1 of 1 images", around(0.9995), around(1.0), around(0.9995))
    assert "cls would move by 1.8° (cosine 0.9995)" in told


@pytest.mark.parametrize(
    ("cosine", "words"),
    [
        (1.0, "0°"),
        (1 - 1e-8, "under 0.1°"),
        (SAME, "2.6°"),
        (0.985, "9.9°"),
        (0.5, "60°"),
        (-0.5, "120°"),
        (-2, "180°"),
    ],
)
def test_an_angle_has_two_digits_and_no_exponent(cosine: float, words: str) -> None:
    assert angle_of(cosine) == words


# --- the verb


def test_the_verb_compares_with_the_inpainted_model(photographs: Path) -> None:
    place = [str(photographs / "chelsea.png")]
    settings = AnalyzeSettings(device="cpu", workers=0, method="inpaint")
    analysis = api.analyze(AnalyzeRequest(ModelRequest("demo_vit"), place, settings)).analysis  # type: ignore[union-attr]
    assert analysis.other is not None
    assert analysis.comparison is not None
    assert analysis.inpainting is not None
    assert (analysis.model, analysis.other.model) == ("demo_vit", "demo_vit, inpainted")
    assert analysis.other.fingerprint == analysis.fingerprint
    assert (analysis.verdict.kind, analysis.other.verdict.first_block) == ("defects", None)
    last = analysis.comparison[-1]
    assert last.cls_cosine is not None
    assert analysis.inpainting.cls_cosine is not None
    assert last.cls_cosine.mean == pytest.approx(analysis.inpainting.cls_cosine.mean, abs=1e-6)
    assert analysis.settings["method"] == "inpaint"
    assert analysis.schema_version == 2


def test_one_comparison_at_a_time(photographs: Path) -> None:
    with pytest.raises(ValueError, match="one comparison at a time"):
        AnalyzeSettings(method="inpaint", clamp=3)
    given = AnalyzeSettings(method="inpaint")
    with pytest.raises(UsageError, match="one is named, one is inpainted"):
        api.analyze(
            AnalyzeRequest(ModelRequest("demo_vit"), [str(photographs)], given, compare=ModelRequest("demo_vit_clean"))
        )


def test_a_stub_with_no_cls_has_no_cosine_of_it() -> None:
    subject = passing()
    headless = replace(subject, backbone=replace(subject.backbone, has_cls=False))
    found = gain(surveyed([headless], some_images()))
    assert found.cls_cosine is None
    assert all(image.cls_cosine is None for image in found.by_image)
    assert "cls" not in found.sentence
