"""Views: an image as a task wants it to be seen, and the parts of a backbone's pass that are kept of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import avg_pool2d

from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.weights import BlockTensors, read_block
from sinder_cli.defects.detection import neighbour_averages, norm_ratios, outlying
from sinder_cli.defects.tokens import in_precision, stream_from_embedding
from sinder_cli.errors import UsageError
from sinder_cli.evaluation.contract import Part, View
from sinder_cli.images.decoding import MAX_PIXELS, UnreadableImageError
from sinder_cli.images.preprocessing import MIN_PATCHES, Preprocessing, whole_patches

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from sinder_cli.images.preprocessing import Pixels

OF_BLOCKS = frozenset({"norms", "outlying_by_block"})
STEERING: tuple[Part, ...] = ("query", "key", "value")
DERIVED_MEANS = {"smoothed": "mean.smoothed", "blurred": "mean.blurred"}  # kept beside `mean`, for the placebos


@dataclass(frozen=True)
class ViewPreprocessing(Preprocessing):
    """Conversion of an RGB image to the input of a backbone, as a view says."""

    view: View = field(default_factory=lambda: View((), 0))

    @classmethod
    def of(cls, view: View, backbone: Backbone) -> ViewPreprocessing:
        """Return the conversion for a backbone. Raises `UsageError` for sizes that are not whole patches."""
        patch = backbone.patch_size
        sides = {"window": view.window, "stride": view.stride, "crop": view.crop}
        if view.resize == "square" and view.crop is None:
            sides["image size"] = view.size
        least = MIN_PATCHES + view.shift  # patches
        for name, side in sides.items():
            fewest = 1 if name == "stride" else least
            if side is not None and (side % patch or side < fewest * patch):
                why = f"patches are {patch} pixels, and at least {fewest} are needed"
                raise UsageError(f"{name} {side} does not fit", why, f"use {_near(side, patch, fewest)}")
        if view.resize == "fit" and view.size < least * patch:
            why = f"it makes under {least} × {least} patches of {patch} pixels"
            raise UsageError(f"image size {view.size} is too small", why, f"use --image-size {least * patch} or more")
        return cls(view.size, backbone.mean, backbone.std, patch=patch, view=view)

    @property
    def decoded_for(self) -> int | None:
        """The shorter side, in pixels, to which every image is scaled; None if images keep their size."""
        return None if self.view.resize == "none" else self.view.size

    def fit(self, image: Image) -> Pixels:
        """Scale and cut an RGB image to `[H, W, 3]` uint8. Raises `UnreadableImageError` for one too narrow."""
        import numpy as np
        from PIL import Image as pillow

        view, patch, given = self.view, self.patch, image
        least = MIN_PATCHES * patch
        if view.resize != "none":
            scale = view.size / min(image.size)
            exact = view.resize == "square"
            width, height = (_whole(side * scale, 1 if exact else patch) for side in image.size)
            if width * height > MAX_PIXELS:
                raise UnreadableImageError(f"{image.width}×{image.height} pixels are too narrow to be scaled")
            image = image.resize((width, height), pillow.Resampling.BICUBIC)
        elif bounded := bounded_size(image.size, patch, view.most_tokens):
            if min(bounded) < least:
                raise UnreadableImageError(f"{image.width}×{image.height} pixels are too narrow to be scaled down")
            image = image.resize(bounded, pillow.Resampling.BICUBIC)
        side = view.crop or (view.size if view.resize == "square" else None)
        if side is not None:
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        image = whole_patches(image, patch)
        image = image.crop((view.shift * patch, view.shift * patch, image.width, image.height))
        if min(image.size) < least:
            raise UnreadableImageError(
                f"{given.width}×{given.height} pixels make under {MIN_PATCHES} × {MIN_PATCHES} patches of {patch}"
            )
        return np.asarray(image.transpose(pillow.Transpose.FLIP_LEFT_RIGHT) if view.flip else image)

    def bounded_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Return the width and height in pixels to which an image in its own size is scaled down; None if it is not."""
        return bounded_size((width, height), self.patch, self.view.most_tokens) if self.view.resize == "none" else None


def bounded_size(size: tuple[int, int], patch: int, most_tokens: int | None) -> tuple[int, int] | None:
    """Return width and height, in whole patches, of at most `most_tokens` patches and nearly the same shape.

    None for an image (width, height in pixels) that has no more than that.
    """
    width, height = size
    if most_tokens is None or (width // patch) * (height // patch) <= most_tokens:
        return None
    scale = math.sqrt(most_tokens / (width * height))  # patches a pixel
    return int(width * scale) * patch, int(height * scale) * patch


def _whole(side: float, patch: int) -> int:
    return max(1, round(side / patch)) * patch


def _near(side: int, patch: int, fewest: int) -> int:
    return max(fewest, round(side / patch)) * patch


@dataclass(frozen=True)
class Observer:
    """A backbone with its module, ready to be observed in one view; `factor` × the median norm is outlying."""

    backbone: Backbone
    module: nn.Module
    view: View
    factor: float
    steering: BlockTensors | None = None  # norm, query, key and value of the view's block, if they are kept

    @classmethod
    def of(
        cls, backbone: Backbone, module: nn.Module, view: View, factor: float, dtype: str, tf32: bool, device: str
    ) -> Observer:
        """Return an observer. Raises `UsageError` for queries or keys that the backbone's map lacks."""
        wanted = [part for part in STEERING if part in view.parts]
        steering = None
        if wanted:
            block = backbone.layers.blocks[view.block]
            missing = [part for part in wanted if getattr(block.attention, part) is None]
            if missing:
                why = f"its layer map has no {missing[0]} of block {view.block % backbone.depth}"
                raise UsageError(f"cannot evaluate {backbone.name} here", why, "choose another task")
            steering = read_block(backbone.weights, block, device=device, roles=_of_steering)
        return cls(in_precision(backbone, dtype, tf32), module, view, factor, steering)

    @torch.no_grad()
    def observe(self, images: Tensor) -> dict[str, Tensor]:
        """Return the parts of each image of a batch, `[B, …]`, for normalized images `[B, 3, H, W]`."""
        if self.view.window is None:
            return self._whole(images)
        seen = [self._through_windows(image, self.view.window) for image in images]
        return {name: torch.stack([each[name] for each in seen]) for name in seen[0]}

    def _through_windows(self, image: Tensor, side: int) -> dict[str, Tensor]:
        """Return the parts of one image `[3, H, W]`, averaged over the windows that show each patch."""
        stride, patch = self.view.stride or side, self.backbone.patch_size
        height, width = image.shape[1:]
        side_h, side_w = min(side, height), min(side, width)
        places = [(top, left) for top in starts(height, side_h, stride) for left in starts(width, side_w, stride)]
        h, w = height // patch, width // patch
        counts = torch.zeros(h, w, device=image.device)
        sums: dict[str, Tensor] = {}
        for top, left in places:
            found = self._whole(image[None, :, top : top + side_h, left : left + side_w])
            rows, columns = (
                slice(at // patch, (at + length) // patch) for at, length in ((top, side_h), (left, side_w))
            )
            counts[rows, columns] += 1
            for name, value in found.items():
                _add(sums, name, value[0].float(), (h, w), rows, columns, len(places))
        return {name: _averaged(name, value, counts) for name, value in sums.items()}

    def _whole(self, images: Tensor) -> dict[str, Tensor]:
        backbone, parts, prefix = self.backbone, self.view.parts, self.backbone.prefix_tokens
        grid = (images.shape[-2] // backbone.patch_size, images.shape[-1] // backbone.patch_size)
        norms: list[Tensor] = []
        steered = self.view.block % backbone.depth
        before = tokens = None
        for at, stream in enumerate(stream_from_embedding(backbone, self.module, images)):
            tokens = stream
            before = stream if at == steered else before
            norms.append(stream[:, prefix:].float().norm(dim=-1).unflatten(1, grid))
        assert before is not None  # a backbone has a block
        assert tokens is not None
        start, found = norm_ratios(norms[0]), norms[1:]
        by_block = torch.stack([outlying(norm_ratios(each), start, self.factor) for each in found], dim=1)
        marked = by_block.any(dim=1)
        kept: dict[str, Tensor] = {"outlying": marked}  # in every view: the placebos need it
        if "outlying_by_block" in parts:
            kept["outlying_by_block"] = by_block
        if "norms" in parts:
            kept["norms"] = torch.stack(found, dim=1)
        if "stream" in parts:
            kept["stream"] = tokens[:, prefix:].float().unflatten(1, grid)
        if "stream_cls" in parts and backbone.has_cls:
            kept["stream_cls"] = tokens[:, 0].float()
        if {"cls", "patches", "mean"} & set(parts):
            kept |= self._normalized(tokens, grid, marked)
        if self.steering is not None:
            kept |= self._steering_outputs(before, grid)
        if "colour" in parts:
            kept["colour"] = self._colours(images)
        return kept

    def _normalized(self, tokens: Tensor, grid: tuple[int, int], marked: Tensor) -> dict[str, Tensor]:
        """Return what is kept of the tokens after the final norm."""
        backbone, parts = self.backbone, self.view.parts
        tokens = backbone.finish(self.module, tokens).float()
        patches = tokens[:, backbone.prefix_tokens :].unflatten(1, grid)
        kept: dict[str, Tensor] = {}
        if "cls" in parts and backbone.has_cls:
            kept["cls"] = tokens[:, 0]
        if "patches" in parts:
            kept["patches"] = patches
        if "mean" in parts:
            kept["mean"] = patches.mean(dim=(1, 2))
            for kind, name in DERIVED_MEANS.items():
                derived = [
                    DERIVED[kind](each, mask).mean(dim=(0, 1)) for each, mask in zip(patches, marked, strict=True)
                ]
                kept[name] = torch.stack(derived)
        return kept

    def _steering_outputs(self, before: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Return queries, keys and values of the view's block, from the tokens before it, as its map says."""
        block = self.steering
        assert block is not None
        x = block.normed(before[:, self.backbone.prefix_tokens :].float(), block.map.attention.norm, "attention.norm")
        wanted = [part for part in STEERING if part in self.view.parts]
        return {part: block.linear(x, f"attention.{part}").unflatten(1, grid) for part in wanted}

    def _colours(self, images: Tensor) -> Tensor:
        """Return each patch's mean colour, `[B, h, w, 3]`, 0 to 1."""
        mean, std = (images.new_tensor(each).view(3, 1, 1) for each in (self.backbone.mean, self.backbone.std))
        return avg_pool2d(images * std + mean, self.backbone.patch_size).permute(0, 2, 3, 1)


def _of_steering(role: str) -> bool:
    return role.startswith("attention.norm") or role.removesuffix("_bias") in {f"attention.{part}" for part in STEERING}


def starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin: every `stride`, the last at the end."""
    return [*range(0, max(length - window, 0), stride), length - window]


def _add(
    sums: dict[str, Tensor], name: str, value: Tensor, grid: tuple[int, int], rows: slice, columns: slice, windows: int
) -> None:
    """Add one window's part to the sums over the image."""
    if name in {"cls", "stream_cls", "mean", *DERIVED_MEANS.values()}:
        sums[name] = sums.get(name, 0) + value / windows
        return
    leading = name in OF_BLOCKS  # [blocks, h, w]; all others have the grid in front
    shape = (len(value), *grid) if leading else (*grid, *value.shape[2:])
    whole = sums.setdefault(name, value.new_zeros(shape))
    place = (slice(None), rows, columns) if leading else (rows, columns)
    whole[place] += value


def _averaged(name: str, sums: Tensor, counts: Tensor) -> Tensor:
    if name.startswith("outlying"):
        return sums > 0
    if name == "norms" or sums.dim() == 2:
        return sums / counts
    return sums if sums.dim() == 1 else sums / counts[..., None]


def smoothed(patches: Tensor, marked: Tensor) -> Tensor:
    """Return patches `[h, w, N]` with marked ones, bool `[h, w]`, replaced by their unmarked neighbours' average."""
    if not bool(marked.any()) or bool(marked.all()):
        return patches
    whole = patches.masked_fill(marked[..., None], 0)  # an infinite token would spoil the sums over its neighbours
    return torch.where(marked[..., None], neighbour_averages(whole, marked), patches)


def blurred(patches: Tensor, marked: Tensor) -> Tensor:  # noqa: ARG001  # every token, marked or not
    """Return the 3 × 3 averages of patches `[h, w, N]`; at the border, of those that are there."""
    grid = patches.permute(2, 0, 1)[None]
    return avg_pool2d(grid, 3, stride=1, padding=1, count_include_pad=False)[0].permute(1, 2, 0)


DERIVED = {"smoothed": smoothed, "blurred": blurred}
