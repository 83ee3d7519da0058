"""Task `segmentation`: IoU by hand and by sklearn, the schedule, a head that separates, and malformed sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from label_sets import halves, labels, write_image, write_label
from sinder_plugins.tasks.labelling import (
    class_picture,
    figures_by_class,
    figures_of,
    mean_class_accuracy,
    mean_iou,
    nearest,
    overlap,
    pixel_accuracy,
    words_by_class,
)
from sinder_plugins.tasks.segmentation import (
    TASK,
    SegmentationSettings,
    batches,
    learning_rate,
    loss_of,
    new_head,
    predicted,
    score,
    trained_head,
)
from sklearn.metrics import accuracy_score, jaccard_score, recall_score
from stub_features import scoring, values
from torch import Tensor

from sinder_cli import BadInputError, ModelRequest, api
from sinder_cli.evaluation.settings import EvaluateSettings
from sinder_cli.evaluation.statistics import resamples
from sinder_cli.requests import EvaluateRequest
from sinder_cli.tasks import LabelRule

SIDE = 84  # pixels: 6 × 6 patches
TRUTH = torch.tensor([[0, 0, 1], [1, 3, -1]])
FOUND = torch.tensor([[0, 1, 1], [1, 0, 2]])  # class 0: 1 of 3; class 1: 2 of 3; class 2: nowhere; class 3: 0 of 1
IOU = (1 / 3 + 2 / 3 + 0) / 3


def sums(*pairs: tuple[Tensor, Tensor], classes: int = 5) -> Tensor:
    return torch.stack([overlap(*pair, classes) for pair in pairs]).sum(dim=0).double()


def test_classes_of_one_name_have_a_figure_each() -> None:
    overlaps = torch.rand(4, 1, 3, 3)
    names = [figure.name for figure in figures_by_class(overlaps, ["road", "door", "door"])]
    assert names == ["IoU, road", "IoU, door (1)", "IoU, door (2)"]


def test_overlap_by_hand_leaves_ignored_pixels_out() -> None:
    assert overlap(TRUTH, FOUND, 5).tolist() == [[1, 2, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 1, 0]]


def test_figures_by_hand_leave_absent_classes_out() -> None:
    found = sums((TRUTH, FOUND))
    assert mean_iou(found).item() == pytest.approx(IOU)
    assert pixel_accuracy(found).item() == pytest.approx(3 / 5)
    assert mean_class_accuracy(found).item() == pytest.approx((1 / 2 + 1 + 0) / 3)


def test_class_that_is_only_predicted_counts_as_zero() -> None:
    found = sums((torch.tensor([[0, 0]]), torch.tensor([[0, 2]])))
    assert mean_iou(found).item() == pytest.approx((1 / 2 + 0) / 2)
    assert mean_class_accuracy(found).item() == pytest.approx(1 / 2)


def test_nothing_to_measure_is_nan() -> None:
    found = sums((torch.full((2, 2), -1), torch.zeros(2, 2, dtype=torch.int64)))
    assert all(each(found).isnan() for each in (mean_iou, pixel_accuracy, mean_class_accuracy))


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_sklearns_over_all_pixels(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pairs = [tuple(torch.randint(0, 6, (5, 7), generator=generator) for _ in range(2)) for _ in range(3)]
    for truth, found in pairs:
        truth[truth == 5] = -1
        found[found == 4] = seed % 4  # class 4 is never predicted, class 5 only predicted
        truth[truth == 3] = 2  # class 3 is only predicted
    truth = torch.cat([each[each != -1] for each, _ in pairs]).numpy()
    guess = torch.cat([found[each != -1] for each, found in pairs]).numpy()
    found = sums(*pairs, classes=9)
    present = np.unique(truth)
    assert mean_iou(found).item() == pytest.approx(jaccard_score(truth, guess, average="macro", zero_division=0))
    assert pixel_accuracy(found).item() == pytest.approx(accuracy_score(truth, guess))
    recall = recall_score(truth, guess, labels=present, average="macro", zero_division=0)
    assert mean_class_accuracy(found).item() == pytest.approx(recall)


def test_figures_of_resampled_images_are_of_joined_pixels() -> None:
    overlaps = torch.stack([overlap(TRUTH, FOUND, 5), overlap(FOUND, FOUND, 5), overlap(TRUTH, TRUTH, 5)])[:, None]
    counts = torch.cat(list(resamples(3, 100, seed=0)))
    for figure in figures_of(overlaps):
        found = figure.value(counts @ figure.statistics)
        pairs = [(TRUTH, FOUND), (FOUND, FOUND), (TRUTH, TRUTH)]
        joined = sums(
            *[pair for pair, times in zip(pairs, counts[7].int().tolist(), strict=True) for _ in range(times)]
        )
        measure = {"mIoU": mean_iou, "accuracy": pixel_accuracy, "mean class accuracy": mean_class_accuracy}[
            figure.name
        ]
        assert found.shape == (100,)
        assert found[7].item() == pytest.approx(measure(joined).item())


def test_figures_are_averaged_over_repetitions() -> None:
    overlaps = torch.stack([overlap(TRUTH, FOUND, 5), overlap(TRUTH, TRUTH, 5)])[None]
    found = values(figures_of(overlaps))
    assert found["mIoU"] == pytest.approx((IOU + 1) / 2)
    assert found["accuracy"] == pytest.approx((3 / 5 + 1) / 2)


def test_classes_are_named_with_their_figures() -> None:
    overlaps = overlap(TRUTH, FOUND, 5)[None, None]
    assert words_by_class(overlaps, "abcde") == "IoU by class: a 33.3, b 66.7, d 0.0; 2 of 5 occur nowhere"
    found = values(figures_by_class(overlaps, "abcde"))
    assert found["IoU, b"] == pytest.approx(2 / 3)
    assert np.isnan(found["IoU, c"])


def test_pictures_have_vocs_colours() -> None:
    colours = class_picture(np.array([[0, 1, 2, 15, 20, -1]]))[0].tolist()
    expected = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]]
    assert colours == expected


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate(step, 40000, 1e-3) for step in range(40000)]
    assert rates[0] == pytest.approx(1e-9)
    assert rates[750] == pytest.approx(1e-3 * (1 - 750 / 40000) * 0.5, rel=1e-3)
    assert rates[1500] == pytest.approx(1e-3 * (1 - 1500 / 40000))
    assert rates[-1] == pytest.approx(1e-3 / 40000)
    assert learning_rate(0, 1, 1e-3) > 0


def test_batches_take_every_image_before_any_again() -> None:
    found = list(batches(6, 2, 9, seed=0))
    rounds = [sorted(index for batch in found[at : at + 3] for index in batch) for at in (0, 3, 6)]
    assert rounds == [list(range(6))] * 3
    assert found == list(batches(6, 2, 9, seed=0))
    assert found != list(batches(6, 2, 9, seed=1))
    assert all(sorted(each) == [0, 1] for each in batches(2, 8, 3, seed=0))


def test_nearest_takes_the_pixel_at_each_centre() -> None:
    rows = torch.arange(6).view(2, 3)
    assert nearest(rows, (4, 6)).tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    assert nearest(torch.arange(9).view(3, 3), (1, 1)).tolist() == [[4]]
    found = torch.randint(0, 9, (13, 7), generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(found[None, None].float(), (29, 5), mode="nearest-exact")[0, 0]
    assert torch.equal(nearest(found, (29, 5)), expected.long())


def test_loss_is_the_mean_over_labelled_points() -> None:
    head = new_head(6, 3, seed=0).eval()
    patches = [torch.randn(2, 3, 6), torch.randn(1, 2, 6)]
    truth = [torch.randint(0, 3, (8, 12)), torch.randint(0, 3, (4, 8))]
    truth[0][:, 4:] = -1
    losses = []
    for each, of in zip(patches, truth, strict=True):
        grid = head(each.flatten(0, 1)).unflatten(0, each.shape[:2]).permute(2, 0, 1)
        larger = torch.nn.functional.interpolate(grid[None], scale_factor=4, mode="bilinear")[0].log_softmax(dim=0)
        losses += [-larger[of[y, x], y, x] for y, x in (of != -1).nonzero().tolist()]
    torch.testing.assert_close(loss_of(head, patches, truth), torch.stack(losses).mean())
    assert loss_of(head, patches[:1], [torch.full((8, 12), -1)]) == 0


@pytest.mark.parametrize("most", [1, 25, 2**24])
def test_prediction_does_not_depend_on_classes_at_a_time(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinder_plugins.tasks.segmentation.MOST_LOGITS", most)
    logits = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0))
    larger = torch.nn.functional.interpolate(logits[None], (5, 9), mode="bilinear")[0]
    assert torch.equal(predicted(logits, (5, 9)), larger.argmax(dim=0))


def striped(tmp_path: Path, images: int = 4) -> tuple[dict[str, list[Tensor]], list[Any]]:
    """Images of 6 × 6 patches that say their class, and labels of 24 × 24 pixels: columns of class 0, 1 and 2."""
    generator = torch.Generator().manual_seed(0)
    of_patch = torch.arange(6).div(2, rounding_mode="floor").expand(6, 6)
    patches = [torch.eye(8)[of_patch] * 5 + 0.05 * torch.randn(6, 6, 8, generator=generator) for _ in range(images)]
    rows = of_patch.repeat_interleave(4, 0).repeat_interleave(4, 1)
    return {"patches": patches}, labels(tmp_path, [rows.tolist()] * images, 4)


def test_head_separates_what_can_be_separated(tmp_path: Path) -> None:
    parts, truth = striped(tmp_path)
    given = scoring(TASK, "whole", parts, truth, "abcd", parts, truth, steps=150, learning_rate=0.1)
    scores = score(given)
    assert values(scores.figures) == {"mIoU": 1.0, "accuracy": 1.0, "mean class accuracy": 1.0}
    assert scores.figures[0].noise == 0.15
    assert scores.notes == (
        "IoU by class: a 100.0, b 100.0, c 100.0; 1 of 4 occur nowhere",
        "1 of 4 classes were never trained on: d",
    )
    assert scores.picture is not None
    assert scores.by_image is not None
    assert TASK.truth is not None
    assert scores.by_image.tolist() == [1.0] * 4
    assert np.array_equal(scores.picture(1), TASK.truth(given.dataset, 1))
    assert scores.picture(1).shape == (24, 24, 3)


def test_images_of_other_shapes_train_together(tmp_path: Path) -> None:
    parts, truth = striped(tmp_path)
    parts["patches"][0] = parts["patches"][0][:3]  # the upper half, labelled by its own file
    truth[0] = labels(tmp_path / "half", [truth[0].read()[:12].tolist()], 4)[0]
    scores = score(scoring(TASK, "whole", parts, truth, "abcd", parts, truth, steps=150, learning_rate=0.1))
    assert values(scores.figures)["mIoU"] == 1


def test_same_seed_trains_the_same_head(tmp_path: Path) -> None:
    parts, truth = striped(tmp_path)

    def weights(seed: int) -> list[Tensor]:
        given = scoring(TASK, "whole", parts, truth, "abcd", parts, truth, seed, steps=5, images_a_step=2)
        return list(trained_head(given)[0].parameters())

    first, again, other = weights(0), weights(0), weights(1)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[2], other[2])


def test_training_is_adamw_on_batch_norm_by_hand(tmp_path: Path) -> None:
    parts, truth = striped(tmp_path)
    given = scoring(TASK, "whole", parts, truth, "abcd", parts, truth, seed=3, steps=4, images_a_step=2)
    head, _ = trained_head(given)
    start = new_head(8, 4, seed=3)
    theta = [each.detach().double().requires_grad_() for each in start.parameters()]  # γ, β, W, b
    m, v = [torch.zeros_like(each) for each in theta], [torch.zeros_like(each) for each in theta]
    mean, variance = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    for step, indices in enumerate(batches(4, 2, 4, seed=3)):
        gamma, beta, W, b = theta
        tokens = torch.cat([parts["patches"][at].double().flatten(0, 1) for at in indices])
        mu, var = tokens.mean(0), tokens.var(0, correction=0)
        mean, variance = 0.9 * mean + 0.1 * mu, 0.9 * variance + 0.1 * tokens.var(0, correction=1)
        logits = ((tokens - mu) / (var + 1e-5).sqrt() * gamma + beta) @ W.T + b
        grid = logits.view(2, 6, 6, 4).permute(0, 3, 1, 2)
        larger = torch.nn.functional.interpolate(grid, (24, 24), mode="bilinear").log_softmax(dim=1)
        labels_of = torch.stack([torch.from_numpy(truth[at].read()) for at in indices])
        gradients = torch.autograd.grad(-larger.gather(1, labels_of[:, None]).mean(), theta)
        rate = learning_rate(step, 4, 1e-3)
        for at, g in enumerate(gradients):
            m[at], v[at] = 0.9 * m[at] + 0.1 * g, 0.999 * v[at] + 0.001 * g * g
            moved = (m[at] / (1 - 0.9 ** (step + 1))) / ((v[at] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            theta[at] = (theta[at] * (1 - rate * 1e-4) - rate * moved).detach().requires_grad_()
    for found, expected in zip(head.parameters(), theta, strict=True):
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(head[0].running_mean.double(), mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(head[0].running_var.double(), variance, atol=1e-5, rtol=0)
    assert not head.training


def test_first_weights_are_drawn_by_the_seed() -> None:
    one, again, other = (new_head(64, 50, seed)[1].weight for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.std().item() == pytest.approx(0.01, rel=0.1)


def test_head_reads_images_of_its_steps_alone(tmp_path: Path) -> None:
    parts, truth = striped(tmp_path)
    given = scoring(TASK, "whole", parts, truth, "abcd", parts, truth, steps=3, images_a_step=2)
    trained_head(given)
    train, test = given.features.train["whole"], given.features.test["whole"]
    assert sum(train.read.values()) == 1 + 3 * 2  # one more for the width
    assert test.read == {}


def test_features_that_are_not_finite_are_survived(tmp_path: Path) -> None:
    parts, truth = striped(tmp_path)
    for patches in parts["patches"]:
        patches[0, 0], patches[5, 5] = torch.nan, torch.inf
    scores = score(scoring(TASK, "whole", parts, truth, "abcd", parts, truth, steps=150, learning_rate=0.1))
    assert values(scores.figures)["accuracy"] > 0.9


def test_label_out_of_range_is_named_while_scoring(tmp_path: Path) -> None:
    parts, truth = striped(tmp_path)
    truth[2] = labels(tmp_path / "odd", [[[0, 7]]], 4)[0]
    with pytest.raises(BadInputError, match=r"odd/0\.png: label 7 is out of range: there are 4 classes"):
        score(scoring(TASK, "whole", parts, truth, "abcd", parts, truth, steps=1))


def test_settings_say_what_values_mean() -> None:
    assert SegmentationSettings().rule == LabelRule(255, None, None)
    assert SegmentationSettings(ignore_label=0, reduce_zero_label=True, classes=5).rule == LabelRule(0, True, 5)


@pytest.mark.parametrize("given", [{"stride": 28}, {"stride": 56, "window": 28}, {"ignore_label": -1}, {"classes": 1}])
def test_settings_that_cannot_work_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        SegmentationSettings(**given)


def requested(weights: Path, data: Path, task: str = "segmentation", **options: Any) -> EvaluateRequest:
    settings = EvaluateSettings(image_size=SIDE, workers=0, no_placebos=True, resamples=100)
    return EvaluateRequest(ModelRequest("dinov2_custom", weights), [task], [data], settings, options={task: options})


@pytest.mark.slow
@pytest.mark.parametrize("windows", [{}, {"window": 70, "stride": 42}])
def test_black_and_white_are_told_apart_through_a_backbone(
    tmp_path: Path, weights: Path, windows: dict[str, int]
) -> None:
    data = halves(halves(tmp_path / "set", 8, split="train"), 4, split="val")
    request = requested(weights, data, steps=100, learning_rate=0.03, **windows)
    task = api.evaluate(request).evaluation.tasks[0]
    found = {figure.name: figure.values[0].value for figure in task.figures}
    assert found["mIoU"] is not None
    assert found["mIoU"] > 80
    assert (task.images, task.trained_on, task.classes) == (4, 8, ("0", "1"))


def one_image(data: Path) -> None:
    for index in (1, 2, 3):
        (data / "images" / f"all{index}.png").unlink()
        (data / "labels" / f"all{index}.png").unlink()


MALFORMED = {
    "label out of range": (
        lambda data: write_label(data / "labels" / "all1.png", np.full((80, 80), 2000)),
        "labels/all1.png: label 2000 is out of range: there are at most 1000 classes",
    ),
    "size mismatch": (
        lambda data: write_label(data / "labels" / "all1.png", np.ones((70, 80))),
        "labels/all1.png: it has 80×70 pixels, and all1.png has 80×80",
    ),
    "missing label": (lambda data: (data / "labels" / "all1.png").unlink(), "images/all1.png: it has no label image"),
    "missing image": (lambda data: (data / "images" / "all1.png").unlink(), "labels/all1.png: it has no image"),
    "colours": (
        lambda data: write_image(data / "labels" / "all1.png", (80, 80)),
        "labels/all1.png: its pixels are colours (RGB), not indices of classes",
    ),
    "unreadable label": (
        lambda data: (data / "labels" / "all1.png").write_bytes(b"no image"),
        "cannot read the label image",
    ),
    "cut label": (
        lambda data: (data / "labels" / "all1.png").write_bytes((data / "labels" / "all0.png").read_bytes()[:70]),
        "cannot read the label image",
    ),
    "one image": (one_image, "set: there is only 1 image"),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segmentation", "clusters"])
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_sets_end_with_one_line(tmp_path: Path, weights: Path, kind: str, task: str) -> None:
    spoil, message = MALFORMED[kind]
    data = halves(tmp_path / "set", 4)
    spoil(data)
    with pytest.raises(BadInputError) as caught:
        api.evaluate(requested(weights, data, task))
    assert caught.value.exit_code == 65
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
