"""Task `depth`: monocular depth by a linear probe, by DINOv2's protocol for one layer ("lin. 1").

[patch ; cls] of the last block after the final norm, upsampled by 4, is mapped by one 1 × 1 convolution to scores of
256 depths, evenly spaced; relu and 0.1, normalized, are their weights, and depth is the weighted mean. A convolution of
1 × 1 and bilinear upsampling commute, so that scores are upsampled here, which are fewer than features.
Loss: scale-invariant log loss (λ 0.85) + 0.5 × gradient loss.

Shapes: h × w patches, N width, H × W pixels of the depth map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from sinder_cli import Backbone, hookimpl
from sinder_cli.tasks import (
    Dataset,
    DepthMap,
    Features,
    Part,
    Pixels,
    Places,
    Scores,
    Scoring,
    Task,
    TaskSettings,
    View,
    depth_pairs,
    mean_figure,
    read_depth,
)

from . import TRAINED

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Mask = np.ndarray[Any, np.dtype[np.bool_]]

SINDER_API = 1
SIZE = 480  # pixels of the shorter side: NYUd's
PLAIN, FLIPPED = "plain", "flipped"
BINS, UPSAMPLED, WEIGHT = 256, 4, 0.1
EPS = 0.001  # metres, in logarithms
LAMBDA, GRADIENT = 0.85, 0.5
STRIDES = (1, 2, 4, 6)  # pixels, of the gradient loss
WARMING = 100  # steps in which the loss is the offset alone
DECAY, MOST_GRADIENT = 0.01, 35.0
NYU_NAME, NYU_SHAPE = "sync_depth_", (480, 640)
EIGEN = (45 / 480, 471 / 480, 41 / 640, 601 / 640)  # top, bottom, left, right of the part that counts in NYUd
GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)  # and in KITTI
TRUTHS_KEPT = 64  # depth maps in memory
INDOORS = 10.0  # metres: NYUd's range
NOISE = 0.0014  # metres RMSE, between published repetitions on NYUd


class DepthSettings(TaskSettings):
    """Settings of `depth`."""

    scale: float | None = Field(None, gt=0)  # stored units in a metre: 1000 for NYUd, 256 for KITTI
    min_depth: float = Field(0.001, gt=0)  # metres
    max_depth: float = Field(10.0, gt=0)
    crop: Literal["auto", "none", "eigen", "garg"] = "auto"  # auto: eigen for files that are named and sized as NYUd's
    steps: int = Field(1000, ge=1)
    batch: int = Field(8, ge=1)  # images
    rate: float = Field(1e-4, gt=0)
    flip: bool = True
    train_share: float = Field(0.8, gt=0, lt=1)

    @model_validator(mode="after")
    def _ordered(self) -> DepthSettings:
        if self.min_depth >= self.max_depth:
            raise ValueError("min_depth must be below max_depth")
        return self


def read(places: Places, settings: DepthSettings) -> Dataset:
    """Read images with depth, all of which must have a pixel that counts."""
    found = depth_pairs(
        places,
        settings.train_share,
        settings.scale,
        (settings.min_depth, settings.max_depth),
        lambda path, depth: counting(path, depth, settings),
    )
    test, train = ([Truth(path, settings) for path in paths] for paths in (found.truth, found.train_truth))
    return replace(found, truth=test, train_truth=train)


@dataclass(frozen=True)
class Truth:
    """The depth map of one image."""

    path: Path
    settings: DepthSettings

    def read(self) -> tuple[Tensor, Tensor]:
        """Return depth in metres and the mask of the pixels that count, `[H, W]`."""
        import torch

        depth = read_depth(self.path, self.settings.scale)
        return torch.from_numpy(depth), torch.from_numpy(counting(self.path, depth, self.settings))


def counting(path: Path, depth: DepthMap, settings: DepthSettings) -> Mask:
    """Return the mask of the pixels of a depth map that count: a depth within the range, within the crop."""
    import numpy as np

    valid = np.isfinite(depth) & (depth > settings.min_depth) & (depth < settings.max_depth)
    crop = settings.crop
    if crop == "auto":
        crop = "eigen" if path.name.startswith(NYU_NAME) and depth.shape == NYU_SHAPE else "none"
    if crop == "none":
        return valid
    height, width = depth.shape
    top, bottom, left, right = EIGEN if crop == "eigen" else GARG
    kept = np.zeros_like(valid)
    exact = 1e-6  # 471 / 480 × 480 may be a little under 471
    rows = slice(int(top * height + exact), int(bottom * height + exact))
    kept[rows, int(left * width + exact) : int(right * width + exact)] = True
    return valid & kept


def views(backbone: Backbone, size: int | None, settings: DepthSettings) -> Mapping[str, View]:
    """Show images whole, and once more with left and right exchanged."""
    parts: tuple[Part, ...] = ("patches", "cls") if backbone.has_cls else ("patches",)
    found = {PLAIN: View(parts, size or SIZE)}
    return found | {FLIPPED: View(parts, size or SIZE, flip=True)} if settings.flip else found


@dataclass(frozen=True)
class Head:
    """The linear probe: scores of `depths` `[256]` from patches, weight `[256, N]`, and from cls, `[256, N]`."""

    weight: Tensor
    cls_weight: Tensor | None
    bias: Tensor
    depths: Tensor

    @classmethod
    def drawn(cls, width: int, has_cls: bool, settings: DepthSettings, seed: int, device: str) -> Head:
        """Return a head with random weights, as a convolution of PyTorch has at first."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        bound = (width * (1 + has_cls)) ** -0.5
        drawn = [
            torch.empty(shape).uniform_(-bound, bound, generator=generator).to(device).requires_grad_()
            for shape in ((BINS, width), (BINS, width), (BINS,))
        ]
        depths = torch.linspace(settings.min_depth, settings.max_depth, BINS, device=device)
        return cls(drawn[0], drawn[1] if has_cls else None, drawn[2], depths)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias, *([] if self.cls_weight is None else [self.cls_weight])]

    def depth(self, patches: Tensor, cls: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Return depth in metres, `[H, W]`, from patches `[h, w, N]` and cls `[N]`."""
        import torch
        from torch.nn.functional import interpolate

        from .enlarging import enlarged_sums

        scores = patches @ self.weight.T + self.bias
        if self.cls_weight is not None and cls is not None:
            scores = scores + cls @ self.cls_weight.T
        weights = torch.stack([self.depths, torch.ones_like(self.depths)], dim=1)
        summed, total = enlarged_sums(scores, weights, UPSAMPLED).unbind(dim=-1)
        mean = (summed + WEIGHT * self.depths.sum()) / (total + WEIGHT * BINS)
        return interpolate(mean[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def score(scoring: Scoring) -> Scores:
    """Train a probe, and return its errors on the test images."""
    import torch

    dataset = scoring.dataset
    head = trained(scoring)
    truths = _reader(dataset.truth, "cpu")

    def found(index: int) -> Tensor:
        height, width = truths(index)[0].shape
        return predicted(head, scoring.features.test, index, (height, width), scoring.settings)

    rows = [errors(found(index), *truths(index)) for index in range(len(dataset.truth))]
    rmse, relative, near = torch.tensor(rows, dtype=torch.float64).T
    figures = (
        mean_figure(
            "RMSE", rmse, "lower", "", NOISE if scoring.settings.max_depth <= INDOORS else 0.0, caution=TRAINED
        ),
        mean_figure("AbsRel", relative, "lower", "", caution=TRAINED),
        mean_figure("δ₁", near, caution=TRAINED),
    )
    notes = () if scoring.has_cls else ("the model has no cls: patches alone",)
    return Scores(figures, by_image=-rmse, picture=_pictures(found, truths), notes=notes)


def _reader(truths: Sequence[Truth], device: str) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return a function that reads depth and mask by index, and keeps some in memory."""

    @lru_cache(maxsize=TRUTHS_KEPT)
    def at(index: int) -> tuple[Tensor, Tensor]:
        depth, valid = truths[index].read()
        return depth.to(device), valid.to(device)

    return at


def _features(head: Head, features: Features, index: int) -> tuple[Tensor, Tensor | None]:
    """Return patches `[h, w, N]` and cls `[N]` on the head's device; 0 in place of what is not finite."""
    device = head.bias.device
    patches = features.part("patches", index).to(device).nan_to_num(0, 0, 0)
    cls = None if head.cls_weight is None else features.part("cls", index).to(device).nan_to_num(0, 0, 0)
    return patches, cls


def trained(scoring: Scoring) -> Head:
    """Return a probe trained on the training images; of those seen flipped, the truth is flipped, too."""
    import torch

    from sinder_cli.tasks import tracked

    settings, features = scoring.settings, scoring.features.train
    width = features[PLAIN].part("patches", 0).shape[-1]
    head = Head.drawn(width, scoring.has_cls, settings, scoring.seed, scoring.device)
    truths = _reader(scoring.dataset.train_truth, scoring.device)
    optimizer = torch.optim.AdamW(head.parameters, lr=settings.rate, weight_decay=DECAY)
    generator = torch.Generator().manual_seed(scoring.seed)
    batches = _batches(len(scoring.dataset.train_truth), settings, generator)
    for step in tracked(range(settings.steps), scoring.emit, "depth: probe", settings.steps, "steps"):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * schedule(step, settings.steps)
        maps = []
        for index in batches[step]:
            depth, valid = truths(index)
            flipped = FLIPPED in features and bool(torch.rand((), generator=generator) < 0.5)
            view = FLIPPED if flipped else PLAIN
            patches, cls = _features(head, features[view], index)
            shown = head.depth(patches, cls, (depth.shape[0], depth.shape[1]))
            maps.append((shown, depth.fliplr(), valid.fliplr()) if flipped else (shown, depth, valid))
        loss = log_loss(maps, warming=step < min(WARMING, settings.steps // 4)) + GRADIENT * gradient_loss(maps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters, MOST_GRADIENT)
        optimizer.step()
    for parameter in head.parameters:
        parameter.requires_grad_(False)
    return head


def _batches(images: int, settings: DepthSettings, generator: Any) -> list[list[int]]:
    """Return the images of every step: all of them once, in random order, then all of them again."""
    import torch

    needed = settings.steps * min(settings.batch, images)
    rounds = math.ceil(needed / images)
    order = torch.cat([torch.randperm(images, generator=generator) for _ in range(rounds)])[:needed]
    return [batch.tolist() for batch in order.split(min(settings.batch, images))]


def schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a cosine to 0, over a third of the steps warmed up from 0.001."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    warm = steps // 3
    return cosine * (1 - (1 - step / warm) * 0.999) if step < warm else cosine


Maps = Sequence[tuple["Tensor", "Tensor", "Tensor"]]  # predicted, true, valid, each [H, W], of the images of a batch


def log_loss(maps: Maps, warming: bool = False) -> Tensor:
    """Return √(var g + (1 − λ) mean(g)²) for g = log predicted − log true, over all valid pixels of a batch.

    While warming, the variance is left out.
    """
    import torch

    found = torch.cat([predicted[valid] for predicted, _, valid in maps])
    truth = torch.cat([depth[valid] for _, depth, valid in maps])
    g = (found + EPS).log() - (truth + EPS).log()
    value = (1 - LAMBDA) * g.mean().square()
    if not warming and len(g) > 1:
        value = value + g.var()
    return value.clamp_min(1e-12).sqrt()  # the root has no slope at 0


def gradient_loss(maps: Maps) -> Tensor:
    """Return the mean absolute change of g over two pixels, down and to the right, summed over four strides."""
    import torch

    total = maps[0][0].new_zeros(())
    for stride in STRIDES:
        changes, count = total.new_zeros(()), 0
        for predicted, depth, valid in maps:
            mask = valid[::stride, ::stride]
            g = (predicted[::stride, ::stride] + EPS).log() - (depth[::stride, ::stride].nan_to_num(0) + EPS).log()
            g = torch.where(mask, g, 0)
            down = (g[:-2] - g[2:]).abs()[mask[:-2] & mask[2:]]
            right = (g[:, :-2] - g[:, 2:]).abs()[mask[:, :-2] & mask[:, 2:]]
            changes, count = changes + down.sum() + right.sum(), count + int(mask.sum())
        total = total + changes / max(count, 1)
    return total


def predicted(
    head: Head, features: Mapping[str, Features], index: int, size: tuple[int, int], settings: DepthSettings
) -> Tensor:
    """Return the depth of an image `[H, W]`, averaged over its views, on the CPU."""
    import torch

    found = []
    with torch.no_grad():
        for name, view in features.items():
            depth = head.depth(*_features(head, view, index), size).clamp(settings.min_depth, settings.max_depth)
            found.append(depth.fliplr() if name == FLIPPED else depth)
    return torch.stack(found).mean(dim=0).cpu()


def errors(predicted: Tensor, truth: Tensor, valid: Tensor) -> tuple[float, float, float]:
    """Return RMSE in metres, AbsRel and δ₁ of one image, over its valid pixels."""
    import torch

    found, depth = predicted[valid].double(), truth[valid].double()
    if len(depth) == 0:
        return math.nan, math.nan, math.nan
    rmse = (found - depth).square().mean().sqrt()
    relative = ((found - depth).abs() / depth).mean()
    near = (torch.maximum(found / depth, depth / found) < 1.25).double().mean()
    return rmse.item(), relative.item(), near.item()


def _pictures(
    found: Callable[[int], Tensor], truths: Callable[[int], tuple[Tensor, Tensor]]
) -> Callable[[int], Pixels]:
    return lambda index: _drawn(found(index), *truths(index))


def _drawn(values: Tensor, truth: Tensor, valid: Tensor) -> Pixels:
    """Return a map in colours, on the range of the valid pixels of the truth."""
    from PIL import Image as pillow

    from sinder_cli.tasks import map_picture, shrunk

    known = truth[valid]
    return shrunk(pillow.fromarray(map_picture(values, known.min().item(), known.max().item())))[0]


def truth_picture(dataset: Dataset, index: int) -> Pixels:
    """Draw the depth of one test image, black where there is none."""
    import torch

    depth, known = dataset.truth[index].read()
    return _drawn(torch.where(known, depth, math.nan), depth, known)


TASK = Task(
    name="depth",
    summary="depth by a linear probe; images with depth maps",
    protocol="DINOv2's lin. 1: [patch ; cls] after the final norm, × 4, one 1 × 1 convolution to 256 depths, relu +"
    " 0.1, normalized; scale-invariant log loss + 0.5 × gradient loss; AdamW, cosine, a third of the steps"
    " warm-up; mean with the flipped image at test; errors averaged over images. Differs: features are"
    " extracted once, so that training knows no augmentation but the flip (published: crops, rotations,"
    " colours); 1000 steps of 8 images unless set otherwise (published: 38,400 of 16); images are scaled to"
    " whole patches (published: padded); the gradient loss runs over the pixels (in the published code over"
    " the images of a batch, where it is 0 for two).",
    read=read,
    views=views,
    score=score,
    settings=DepthSettings,
    truth=truth_picture,
)


@hookimpl
def sinder_task() -> Task:
    """Return the task."""
    return TASK
